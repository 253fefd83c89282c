"""A pack whose input or output lies in a store: it is made on this machine, and then sent.

A pack is whole or not there, and folders of a store cannot be renamed. So it is made in the user's
cache (which needs room for all of it), under a name that the same command finds again, and its
files are sent in the order in which readers need them: the index last.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vlp.caches import cache_folder
from vlp.data import stores
from vlp.data.index_file import NAME
from vlp.data.stored import StoredPath, destination, source
from vlp.data_tools.pack.target import check_target
from vlp.privacy import without_secrets

Pack = Callable[[argparse.Namespace, Path, Path], int]  # options, folder, its name in messages
_AT_ONCE = 4  # files that are sent


def packed(args: argparse.Namespace, pack: Pack) -> int:
    """Fetch the input, let `pack` make the shards here, and send them; returns its status."""
    target = destination(args.to)
    room = cache_folder() / "packs" / _digest(args)
    args.source = _here(args.source, room / "in")
    args.captions = args.captions and _here(args.captions, room / "in")
    if not isinstance(target, StoredPath):
        status = pack(args, target, target)
    else:
        from vlp.data_tools._run.writers import writing

        advice = "Wait until it is done, or name another folder with --to"
        with writing(target, advice=advice, part=(1, 1)):
            status = _made_and_sent(args, target, room / "whole", pack)

    # After a failure the next call goes on with it.
    if status == 0:
        shutil.rmtree(room, ignore_errors=True)
    return status


def _digest(args: argparse.Namespace) -> str:
    """What tells a command from another."""
    options = {name: value for name, value in vars(args).items() if isinstance(value, _PLAIN)}
    options.pop("storage", None)  # which may change from call to call
    text = json.dumps(without_secrets(options), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


_PLAIN = (str, int, float, list, bool, type(None))


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


def _made_and_sent(args: argparse.Namespace, target: StoredPath, whole: Path, pack: Pack) -> int:
    if whole.exists():
        print(f"goes on sending the pack that an earlier call made in {whole}")
    else:
        check_target(target, args.overwrite)
        status = pack(args, whole, target)
        if status != 0:
            return status
        # What an earlier pack left over would count among the shards.
        for path in target.rglob("*"):
            path.unlink()

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
