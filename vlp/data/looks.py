"""One look at local shards for all ranks of a machine.

Which shards a path names, and whether the index still fits them, costs one question to the disk for
each shard. Asked by every rank, a thousand ranks would ask a shared disk a thousand times as often
as there are shards. So the first rank of each machine looks, and its others take over what it saw
from a file; they open nothing but the index.
"""

from __future__ import annotations

import pickle
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from vlp import dist
from vlp.data.index import located
from vlp.data.index_file import opened
from vlp.data.paths import expand
from vlp.data.rows import Shard
from vlp.plugin import Plugin

Seen = tuple[list[Path], list[Shard]]

_seen: dict[str, Seen] = {}  # by what a path option says, while `once_a_machine` holds


def at(path: str) -> Seen:
    """The shards that a `path` option names, in order, and what their index says of each: as the
    first rank of this machine saw them, or by a look of this process; ValueError.
    """
    if path in _seen:
        return _seen[path]
    paths = expand(path)
    return paths, located(paths)


@contextmanager
def once_a_machine(sources: Sequence[Plugin]) -> Iterator[None]:
    """While the block runs, `at` answers for those of a configuration's sources that are local
    shards from one look of each machine. Collective up to its first statement.
    """
    paths = [source.options.path for source in sources if source.name == "shards"]
    hosts = dist.gather_objects(socket.gethostname())
    try:
        # Of one process on each machine every one looks, and needs nobody.
        if paths and len(set(hosts)) < len(hosts):
            _exchange(paths, first=hosts.index(hosts[dist.rank()]))
        yield
    finally:
        _seen.clear()


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
