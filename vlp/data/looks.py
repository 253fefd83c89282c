"""One look at local shards for all ranks of a machine, and one list of remote ones for all ranks.

Which shards a path names, and whether the index still fits them, costs one question to the disk for
each shard. Asked by every rank, a thousand ranks would ask a shared disk a thousand times as often
as there are shards. So the first rank of each machine looks, and its others take over what it saw
from a file; they open nothing but the index. A store is asked by the first rank of all: by http for
each shard, too, and ranks that listed a folder at different times might see different shards.
"""

from __future__ import annotations

import pickle
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

from vlp import dist
from vlp.data.index import located
from vlp.data.index_file import opened
from vlp.data.paths import expand
from vlp.data.rows import Shard
from vlp.plugin import Plugin

Seen = tuple[list[Path], list[Shard]]


class Listed(NamedTuple):
    """What a store says of a shard."""

    url: str
    size: int
    version: str  # tells contents of equal size apart; may be empty


# While `once_a_machine` holds: by what a path option says, and by all options of a remote source.
_seen: dict[str, Seen] = {}
_listed: dict[str, list[Listed]] = {}

_Options = TypeVar("_Options")


def at(path: str) -> Seen:
    """The shards that a `path` option names, in order, and what their index says of each: as the
    first rank of this machine saw them, or by a look of this process; ValueError.
    """
    if path in _seen:
        return _seen[path]
    paths = expand(path)
    return paths, located(paths)


def listed(options: _Options, ask: Callable[[_Options], list[Listed]]) -> list[Listed]:
    """The shards of a remote source, in order: as the first rank had them from their store, or
    asked for by this process.
    """
    shards = _listed.get(repr(options))
    return ask(options) if shards is None else shards


@contextmanager
def once_a_machine(sources: Sequence[Plugin]) -> Iterator[None]:
    """While the block runs, `at` answers for those of a configuration's sources that are local
    shards from one look of each machine, and `listed` for remote ones from one list of the first
    rank. Collective up to its first statement.
    """
    paths = [source.options.path for source in sources if source.name == "shards"]
    remote = [source for source in sources if source.name == "remote"]
    hosts = dist.gather_objects(socket.gethostname())
    try:
        if remote and len(hosts) > 1:
            _share_lists(remote)
        # Of one process on each machine every one looks, and needs nobody.
        if paths and len(set(hosts)) < len(hosts):
            _exchange(paths, first=hosts.index(hosts[dist.rank()]))
        yield
    finally:
        _seen.clear()
        _listed.clear()


def _share_lists(sources: Sequence[Plugin]) -> None:
    """Let the first rank ask the stores of remote sources for all ranks. Collective."""
    lists: dict[str, list[Listed]] | None = None
    if dist.is_main():
        try:
            lists = {
                repr(source.options): source.module.listing(source.options) for source in sources
            }
        # Each rank asks for itself then, and raises it where it belongs. File systems have errors
        # of their own.
        except Exception:
            lists = None
    dist.await_all("the first rank, which lists the remote shards")
    _listed.update(dist.broadcast_object(lists) or {})


def _exchange(paths: Sequence[str], first: int) -> None:
    """Look, or take over what the rank `first` of this machine saw. Collective."""
    with ExitStack() as stack:
        file = _look(paths, stack) if dist.rank() == first else None
        # Where there is no index yet, the look reads all shards.
        dist.await_all("the first rank of each machine, which looks at the shards")
        of_first = dist.gather_objects(file)[first]
        if of_first is not None and file is None:
            _take_over(of_first)
        dist.barrier()  # nobody needs the file any more


def _look(paths: Sequence[str], stack: ExitStack) -> Path | None:
    """Look at shards, and leave what is seen in a file until the stack ends; None where something
    is wrong: each rank looks for itself then, and raises it where it belongs.
    """
    try:
        for path in paths:
            shards_at = expand(path)
            _seen[path] = shards_at, located(shards_at)
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="vlp-look-"))
        file = Path(folder) / "seen"
        file.write_bytes(pickle.dumps(_seen))
    except (OSError, ValueError):
        return None
    return file


def _take_over(file: Path) -> None:
    try:
        seen: dict[str, Seen] = pickle.loads(file.read_bytes())
        # As whoever looks does: another process may replace an index that is not open.
        stored = [shard.stored for _, shards in seen.values() for shard in shards]
        for path, head in {(place.path, place.head) for place in stored if place is not None}:
            opened(path, head, again=True)
    # Containers may bear one name and share no memory.
    except (OSError, ValueError):
        return
    _seen.update(seen)
