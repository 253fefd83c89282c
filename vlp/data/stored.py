"""Paths whose files lie in a store: `s3://bucket/train/00000.tar`, any address that fsspec knows.

A `StoredPath` is a `pathlib.Path`, so that whoever reads and writes files need not know where they
lie. Where the system asks for its name (`open`, `np.load`, `mmap`), it gets that of a local copy:

    of a source          in the bounded cache of remote files, fetched whole when first opened
    below a destination  in a scratch folder of this call, fetched when first opened. A file that
                         `vlp.files.replacing` has written is in the store once it has its name

So a file of a destination appears whole or not at all (`stores.put`), and a mark after what it
vouches for. What is there is asked by a list of each folder, read once (`bring` reads it anew).
universal_pathlib's UPath was the alternative: it has no name for the system, so that every `open`,
`mmap` and `os.replace` of the tools would have to become another call.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import errno
import fnmatch
import hashlib
import os
import shutil
import stat
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PosixPath
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from vlp import caches
from vlp.data import stores
from vlp.files import write_atomically
from vlp.privacy import address

if TYPE_CHECKING:
    from vlp.data.fetch import Cache

CACHE_BYTES = 50 * 10**9  # of copies of sources
SENT_EVERY_S = 60.0  # what a kill can cost of a file that grows in place
_AT_THE_SAME_TIME = 32  # files that are fetched
_DROPPED = (".tar", ".safetensors", ".made")  # local copies that go once the store has the file
_END_OF_TIME_NS = 1 << 62
_STARTED = time.time()  # a copy's content is compared with its digest once a process

_scratch: dict[str, Path] = {}  # the scratch folder of each destination, by address
_growing: dict[StoredPath, float] = {}  # files that grow, and when each was last put
_compared: set[str] = set()  # addresses whose copies in the cache are known to be current


class StoredPath(PosixPath):
    """A file or a folder in a store."""

    def __str__(self) -> str:
        scheme, *rest = self.parts or (".",)
        # What `relative_to` returns is no address.
        separator = "//" if scheme.endswith(":") else "/"
        return separator.join([scheme, "/".join(rest)]) if rest else scheme

    def __repr__(self) -> str:
        return f"StoredPath({str(self)!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        place, root = str(self), _root_of(self)
        scratch = None if root is None else (root, _scratch[root])
        opened_by = {
            key: stores.signed[key]
            for key in (place, stores.folder_of(place))
            if key in stores.signed
        }
        return _rebuilt, (place, opened_by, scratch, stores.options)

    def __fspath__(self) -> str:
        """The name of a local copy; raises OSError where a source cannot be fetched."""
        if _root_of(self) is None:
            return _copy_of(self)

        local = self.local()
        local.parent.mkdir(parents=True, exist_ok=True)
        if not local.exists() and not _is_temporary(self):
            # What is not in the store yet is about to be written.
            with contextlib.suppress(FileNotFoundError, IsADirectoryError):
                stores.fetch(str(self), local)
        return str(local)

    def local(self) -> Path:
        """Where the copy of a destination's file lies, if there is one; OSError for a source."""
        root = _root_of(self)
        if root is None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))
        # A store's names may have any parts; here this one would lead out of the folder.
        return _scratch[root].joinpath(*("%2E%2E" if part == ".." else part for part in self.parts))

    # ---- what is there

    def exists(self, *, follow_symlinks: bool = True) -> bool:
        return self.is_file() or self.is_dir()

    def is_file(self, **_: Any) -> bool:
        if _root_of(self) is not None and self.local().is_file():
            return True
        return stores.info(str(self)) is not None

    def is_dir(self, **_: Any) -> bool:
        if _root_of(self) is not None and self.local().is_dir():
            return True
        if stores.scheme_of(str(self)) in stores.HTTP:
            return False

        # By the list of the folder above, which answers for all that is in it.
        if not stores.is_top(str(self)):
            with contextlib.suppress(PermissionError):
                return stores.is_folder(stores.entries(str(self.parent)).get(str(self)))
        return bool(stores.entries(str(self)))

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        """Size, and as time of change a number of the file's version; raises OSError."""
        if _root_of(self) is not None and self.local().exists():
            return os.stat(self.local())

        from vlp.data.fetch import version_of

        known = _known(self)
        digest = hashlib.sha256(version_of(known).encode()).digest()
        version_ns = int.from_bytes(digest[:8], "big") % _END_OF_TIME_NS
        fields = [stat.S_IFREG | 0o644, 0, 0, 1, 0, 0, int(known["size"]), 0, 0, 0]
        times = {"st_mtime_ns": version_ns, "st_ctime_ns": 0, "st_atime_ns": 0}
        return os.stat_result(fields, times)

    def glob(self, pattern: str, **_: Any) -> Iterator[StoredPath]:  # type: ignore[override]
        """The files of this folder alone whose names fit; the folder is listed anew."""
        stores.look_again(str(self))
        entries = stores.entries(str(self))
        files = [url for url, known in entries.items() if not stores.is_folder(known)]
        return _fitting(files, pattern)

    def rglob(self, pattern: str, **_: Any) -> Iterator[StoredPath]:  # type: ignore[override]
        """The files below this folder whose names fit; all is listed anew."""
        return _fitting(stores.below(str(self)), pattern)

    def iterdir(self) -> Iterator[StoredPath]:  # type: ignore[override]
        """Files and folders of this folder."""
        return map(StoredPath, sorted(stores.entries(str(self))))

    # ---- what changes

    def mkdir(self, *_: Any, **__: Any) -> None:
        """Nothing: stores have names only, no folders."""

    def rmdir(self) -> None:
        """Nothing, as `mkdir`."""

    def unlink(self, missing_ok: bool = False) -> None:
        self.local().unlink(missing_ok=True)
        if not _is_temporary(self):
            stores.remove(str(self))

    def replace(self, target: Any) -> StoredPath:
        """Give a file of the scratch folder its name: in the store first, and then here."""
        assert isinstance(target, StoredPath)
        # A mark must not be there before what it vouches for. A hidden note vouches for nothing,
        # and may be written by another thread while such a file grows.
        if not target.name.startswith("."):
            _put_growing(_root_of(target))
        stores.put(self.local(), str(target))

        # Large ones are not read again by the call that writes them.
        if target.suffix in _DROPPED:
            self.local().unlink()
        else:
            os.replace(self.local(), target.local())
        return target

    # ---- its name

    def absolute(self) -> StoredPath:
        return self

    def resolve(self, strict: bool = False) -> StoredPath:
        return self

    def expanduser(self) -> StoredPath:
        return self

    def is_absolute(self) -> bool:
        return True


def _rebuilt(
    place: str,
    opened_by: dict[str, str],
    scratch: tuple[str, Path] | None,
    options: dict[str, dict[str, Any]],
) -> StoredPath:
    """A path that another process of the same call has sent."""
    stores.signed.update(opened_by)
    if scratch is not None and scratch[0] not in _scratch:
        _scratch[scratch[0]] = scratch[1]
        caches.hold(scratch[1])
    stores.use({scheme: its for scheme, its in options.items() if scheme not in stores.options})
    return StoredPath(place)


def _known(path: StoredPath) -> stores.Info:
    """What the store says of a file; raises OSError where there is none."""
    known = stores.info(str(path))
    if known is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    return known


def _copy_of(path: StoredPath) -> str:
    """The copy of a source's file in the cache."""
    from vlp.data.fetch import version_of

    if _is_temporary(path):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    known, url = _known(path), stores.whole(str(path))
    version = version_of(known)
    cache = _cache(url, version)
    # Once a process: a shard that changes in mid-call is met when it is read.
    if url not in _compared:
        cache.drop_if_changed(url, int(known["size"]), version)
        _compared.add(url)
    return cache.get(url)


def has_copy(path: Path) -> bool:
    """Whether a file is here, so that opening it fetches nothing, or belongs to a destination."""
    if not isinstance(path, StoredPath) or _root_of(path) is not None:
        return True
    url = stores.whole(str(path))
    return _cache(url, "").place(url).exists()


def _cache(url: str, version: str) -> Cache:
    """Where copies of sources lie, for one address of this version."""
    from vlp.data.fetch import Cache

    return Cache(CACHE_BYTES, stores.options_for(url), {address(url): version}, since=_STARTED)


def _fitting(places: Iterable[str], pattern: str) -> Iterator[StoredPath]:
    for place in sorted(places):
        name = place.rpartition("/")[2]
        is_hidden = name.startswith(".") and not pattern.startswith(".")
        if not is_hidden and fnmatch.fnmatchcase(name, pattern):
            yield StoredPath(place)


def _root_of(path: StoredPath) -> str | None:
    """The destination that a path lies in; None for a source's."""
    if not _scratch:
        return None
    place = str(path)
    for root in _scratch:
        if place == root or place.startswith(f"{root}/"):
            return root
    return None


def _is_temporary(path: Path) -> bool:
    """Whether a name is one that `vlp.files` and the writer of shards give to unfinished files."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


# ---- what users write


def source(text: str | Path) -> Path:
    """A file or folder to read from; raises ValueError for an address of a kind that cannot be."""
    if isinstance(text, Path):
        return text
    if not stores.is_address(text):
        return Path(text).expanduser()
    if stores.checked_scheme(text) == "file":
        return Path(text.removeprefix("file://"))

    place = stores.bare(text)
    if ".." in place.split("/"):
        raise ValueError(f"{place}: stores have no folder above another (..); write the whole name")
    return StoredPath(place)


def destination(text: str | Path, *, is_file: bool = False) -> Path:
    """A folder to write into, or a file; raises ValueError for an address that cannot be written
    to.
    """
    if isinstance(text, str) and not stores.is_address(text):
        return Path(text)
    path = source(text)
    if not isinstance(path, StoredPath):
        return path

    if stores.scheme_of(str(path)) in stores.HTTP:
        raise ValueError(
            f"{path}: http can be read from, but not written to; name a folder of this machine, or "
            "an address of s3://, gs://, abfs:// or hf://"
        )
    if stores.is_top(str(path)) and stores.scheme_of(str(path)) != "hf":
        raise ValueError(f"{path} is a whole bucket; name what is to be in it: {path}/NAME")

    root = str(path.parent if is_file else path)
    if root not in _scratch:
        _scratch[root] = new_scratch()
    return path


def destination_file(text: str) -> Path:
    """A file to write, for the options that name one."""
    try:
        return destination(text, is_file=True)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def check_writable(path: StoredPath) -> None:
    """Raise OSError where nothing could be written beside `path`; leaves nothing behind."""
    probe = path.with_name(f".{path.name}.{uuid4().hex[:12]}.probe")
    write_atomically(probe, b"probe")
    probe.unlink()


# ---- the scratch folder


def new_scratch() -> Path:
    """A folder of this call, which goes with it; those that killed calls left go now."""
    folder = caches.cache_folder() / "stores"
    for path in folder.glob("*"):
        with contextlib.suppress(OSError):
            caches.remove(caches.Entry("scratch", path, 0, path.stat().st_mtime))

    scratch = folder / uuid4().hex[:16]
    caches.hold(scratch)
    atexit.register(_forget, scratch, os.getpid())
    return scratch


def _forget(scratch: Path, process: int) -> None:
    # A forked process inherits the end of its parent, not the folder.
    if os.getpid() == process:
        shutil.rmtree(scratch, ignore_errors=True)


def publish_soon(path: Path) -> None:
    """Bring to its store a file that grows in place: once in SENT_EVERY_S, and before the next file
    of its destination gets its name. Nothing for a file of this machine.
    """
    if not isinstance(path, StoredPath):
        return
    now = time.monotonic()
    if now - _growing.setdefault(path, now) > SENT_EVERY_S:
        stores.put(path.local(), str(path))
        _growing[path] = now


def _put_growing(root: str | None) -> None:
    for path in [path for path in _growing if _root_of(path) == root]:
        stores.put(path.local(), str(path))
        del _growing[path]


def remove_folder(folder: Path) -> None:
    """Remove a folder with all in it, if it is there."""
    if not isinstance(folder, StoredPath):
        shutil.rmtree(folder, ignore_errors=True)
        return

    shutil.rmtree(folder.local(), ignore_errors=True)
    for place in stores.below(str(folder)):
        stores.remove(place)


def forget_copy(path: StoredPath) -> None:
    """Let a file of a destination be fetched anew when it is next read: another call writes it."""
    path.local().unlink(missing_ok=True)
    stores.look_again(str(path.parent))


def look_again() -> None:
    """Ask the stores anew for all that this process knows of them: others have written since."""
    stores.look_again_everywhere()
    _compared.clear()


def bring(paths: Iterable[Path]) -> None:
    """Look anew which of these files there are, and fetch them many at a time; nothing for files of
    this machine.
    """
    stored = [path for path in paths if isinstance(path, StoredPath)]
    stores.look_again(*{str(path.parent) for path in stored})
    present = [path for path in stored if path.is_file()]
    with ThreadPoolExecutor(_AT_THE_SAME_TIME, "fetch") as pool:
        for _ in pool.map(os.fspath, present):
            pass
