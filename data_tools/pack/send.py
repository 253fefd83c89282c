"""A pack whose input or output lies in a store: it is made on this machine, and then sent.

A pack is whole or not there, and folders of a store cannot be renamed. So it is made in the user's
cache (which needs room for all of it), under a name that the same command finds again, and its
files are sent in the order in which readers need them: the index last. On a cluster its nodes write
it into the store themselves (`stored_draft`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vlp.caches import cache_folder, hold
from vlp.data import stores
from vlp.data.index_file import NAME
from vlp.data.stored import StoredPath, destination, source
from vlp.data.stores import is_address
from vlp.data_tools.pack.target import check_target
from vlp.privacy import without_secrets

# Options, folder, its name in messages, address of the input.
Pack = Callable[[argparse.Namespace, Path, Path, str], int]
_AT_ONCE = 4  # files that are sent
_ADVICE = "Wait until it is done, or name another folder with --to"


def packed(args: argparse.Namespace, pack: Pack) -> int:
    """Fetch the input, let `pack` make the shards here, and send them; returns its status."""
    from vlp.data_tools._run.writers import writing

    target = destination(args.to)
    room = cache_folder() / "packs" / _digest(args)
    hold(room)
    try:
        # The nodes of a cluster do not see what is made here.
        if not isinstance(target, StoredPath) or args.ray is not None:
            check_target(target, args.overwrite)
            address = str(source(args.source)) if is_address(args.source) else ""
            status = pack(_with_input_here(args, room / "in"), target, target, address)
        else:
            with writing(target, advice=_ADVICE, part=(1, 1)):
                status = _made_and_sent(args, target, room, pack)
    # No later call could go on with it: what was found wrong stays wrong.
    except (ValueError, FileExistsError):
        shutil.rmtree(room, ignore_errors=True)
        raise
    shutil.rmtree(room, ignore_errors=True)
    return status


def _digest(args: argparse.Namespace) -> str:
    """What tells a command, and the input that it reads, from another."""
    options = {name: value for name, value in vars(args).items() if isinstance(value, _PLAIN)}
    # Which may change from call to call.
    for name in ("storage", "processes", "ray"):
        options.pop(name, None)

    # A pack that waits to be sent, and a copy of the input, are of what was there when they were
    # made. Of a folder only its own entries are seen.
    states = []
    for path in [source(text) for text in (args.source, args.captions) if text]:
        if path.exists():
            status = path.stat()
            states.append([status.st_size, status.st_mtime_ns])
    text = json.dumps([without_secrets(options), states], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


_PLAIN = (str, int, float, list, bool, type(None))


def _with_input_here(args: argparse.Namespace, folder: Path) -> argparse.Namespace:
    """The options with names of this machine."""
    source = _here(args.source, folder)
    captions = args.captions and _here(args.captions, folder)
    return argparse.Namespace(**{**vars(args), "source": source, "captions": captions})


def _here(text: str, folder: Path) -> str:
    """The path on this machine of a file that an option names."""
    path = source(text)
    if not isinstance(path, StoredPath):
        return text
    if not path.is_file():
        raise ValueError(
            f"{path} is no file of the store; `vlp data pack` reads a folder of images on this "
            "machine only: copy it here, or name a tar"
        )
    folder.mkdir(parents=True, exist_ok=True)
    local = folder / path.name
    if not local.exists():
        stores.fetch(str(path), local)
    return str(local)


def _made_and_sent(args: argparse.Namespace, target: StoredPath, room: Path, pack: Pack) -> int:
    whole = room / "whole"
    if whole.exists():
        print(f"goes on sending the pack that an earlier call made in {whole}")
    else:
        check_target(target, args.overwrite)
        status = pack(_with_input_here(args, room / "in"), whole, target, "")
        if status != 0:
            return status

    # What an earlier pack left over would count among the shards, or pass for a new one of its
    # size. A call may be killed before all of it is gone.
    cleared = room / "cleared"
    if not cleared.exists():
        check_target(target, args.overwrite)
        for path in target.rglob("*"):
            path.unlink()
        cleared.touch()

    # A shard before its statistics, and the index of all last.
    paths = [path for path in whole.rglob("*") if path.is_file()]
    tars = [path for path in paths if path.suffix == ".tar"]
    indices = [path for path in paths if path.name == NAME]
    others = [path for path in paths if path not in (*tars, *indices)]
    there = stores.below(str(target))
    for group in (tars, others, indices):
        _send(group, whole, target, there)
    print(f"{target}: {len(paths)} files sent")
    return 0


def _send(
    paths: list[Path], whole: Path, target: StoredPath, there: dict[str, stores.Info]
) -> None:
    """Put files of the folder `whole` below `target`, but for shards that are `there`."""

    def put(path: Path) -> None:
        place = str(target / path.relative_to(whole))
        known = there.get(place)
        if path.suffix != ".tar" or known is None or known["size"] != path.stat().st_size:
            stores.put(path, place)

    with ThreadPoolExecutor(_AT_ONCE, "send") as pool:
        for _ in pool.map(put, paths):
            pass
