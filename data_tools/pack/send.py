"""A pack whose input or output lies in a store: it is made on this machine, and then sent.

A tar and a table are fetched whole, and of a folder its texts; its pictures when they are first
read.

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
from typing import NamedTuple

from vlp.caches import cache_folder, hold
from vlp.data import stores
from vlp.data.index_file import NAME
from vlp.data.stored import StoredPath, destination, source
from vlp.data.stored_files import digest_of, files_below
from vlp.data_tools.pack.options import check_source
from vlp.data_tools.pack.target import check_target
from vlp.privacy import without_secrets

# Options, folder, its name in messages, and what of the input lies here.
Pack = Callable[[argparse.Namespace, Path, Path, "Copied"], int]
_AT_ONCE = 4  # files that are sent
_ADVICE = "Wait until it is done, or name another folder with --to"


class Copied(NamedTuple):
    """What of an input in a store lies on this machine."""

    address: str = ""  # of the tar that is packed, where nodes of a cluster read their own copies
    texts: Path | None = None  # where texts of a folder are brought
    pictures: Path | None = None  # where its pictures are; None: each process fetches its own


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
            options, copied = _with_input_here(args, room / "in")
            status = pack(options, target, target, copied)
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
    # made. Of a folder on this machine only its own entries are seen.
    states: list[object] = []
    for path in [source(text) for text in (args.source, args.captions) if text]:
        if isinstance(path, StoredPath) and not path.is_file():
            states.append(digest_of(files_below(path)))
        elif path.exists():
            status = path.stat()
            states.append([status.st_size, status.st_mtime_ns])
    text = json.dumps([without_secrets(options), states], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


_PLAIN = (str, int, float, list, bool, type(None))


def _with_input_here(args: argparse.Namespace, folder: Path) -> tuple[argparse.Namespace, Copied]:
    """The options with names of this machine where files are fetched, and what lies there."""
    captions = args.captions and _here(args.captions, folder)
    place = source(args.source)
    if not isinstance(place, StoredPath):
        return argparse.Namespace(**{**vars(args), "captions": captions}), Copied()

    _refuse_page(place)
    is_file = place.is_file()
    if is_file:
        check_source(place)
    # Without what opens it, because messages name it.
    options = {**vars(args), "source": _here(args.source, folder), "captions": captions}
    on_cluster = args.ray is not None
    if is_file:
        copied = Copied(address=str(place) if on_cluster else "")
    else:
        copied = Copied(texts=folder, pictures=None if on_cluster else folder)
    return argparse.Namespace(**options), copied


def _refuse_page(path: StoredPath) -> None:
    """Raise ValueError for a folder of a web server, which shows a page of it at most."""
    if stores.scheme_of(str(path)) not in stores.HTTP:
        return
    known = stores.info(str(path))
    if known is None or known.get("mimetype") == "text/html":
        raise ValueError(
            f"{path} is no file of the server, and http cannot list what is in a folder; name a "
            "tar, or a folder of s3://, gs://, abfs:// or hf://"
        )


def _here(text: str, folder: Path) -> str:
    """The path on this machine of a file that an option names; of a folder in a store its bare
    address. Raises ValueError where there is neither.
    """
    path = source(text)
    if not isinstance(path, StoredPath):
        return text
    if not path.is_file():
        if not path.is_dir():
            raise ValueError(f"{path} is neither a file nor a folder with files of the store")
        return str(path)
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
        options, copied = _with_input_here(args, room / "in")
        status = pack(options, whole, target, copied)
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
