"""One call at a time writes into a folder of a store, and the others are told who does.

Stores know no locks. So whoever writes leaves a note beside the output, `.writer-K-of-N.json`, and
writes it anew every BEAT_S. Whoever finds the note of another waits WATCHED_BEATS of them for it to
change: of a call that lives it does; that of a killed one does not, and goes. Nobody's clock is
compared with anybody else's. The first note also shows whether there is such a bucket, and the
right to write into it. Two calls that begin within the same moment are told apart by what the store
keeps: the later note, looked at SETTLED_S after one's own is written. Both go on only where one of
them took longer than that from its look to its note; of one command they write the same bytes.

On the Hub each note would be a commit: there it is written once and not watched.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

from vlp import log
from vlp.data.stored import StoredPath, forget_copy
from vlp.files import write_atomically
from vlp.locks import InUse, is_alive
from vlp.privacy import scrubbed

BEAT_S = 20.0
WATCHED_BEATS = 3
SETTLED_S = 1.0  # how much later than another's note one's own may be written, unseen
_NAME = re.compile(r"\.writer-(\d+)-of-(\d+)\.json")
_UNWATCHED = "hf"

_held: set[str] = set()  # folders of this process, which may enter again


@contextmanager
def writing(folder: StoredPath, *, advice: str, part: tuple[int, int]) -> Iterator[None]:
    """Hold `folder` while the block runs; raises InUse, which names the owner and ends in `advice`,
    and OSError where it cannot be written to. part: (K, N), a share of the work.
    """
    if str(folder) in _held:
        yield
        return

    note = folder / f".writer-{part[0]}-of-{part[1]}.json"
    _wait_for_others(folder, part, advice)
    owner = _owner()
    write_atomically(note, json.dumps(owner).encode())
    # Who looked before this note was there writes its own within this time.
    time.sleep(SETTLED_S)
    kept = _read(note)
    if kept is not None and kept["id"] != owner["id"]:
        raise InUse(_told(folder, kept, advice))

    done = threading.Event()
    beats = threading.Thread(target=_beat, args=(note, owner, done), daemon=True)
    if not str(folder).startswith(_UNWATCHED):
        beats.start()
    _held.add(str(folder))
    try:
        yield
    finally:
        _held.discard(str(folder))
        done.set()
        # What it is about to write would stay.
        if beats.ident is not None:
            beats.join()
        try:
            note.unlink(missing_ok=True)
        except OSError as error:
            log.warn(
                f"{note} could not be removed ({error}); the next call takes it for a dead one"
            )


def _owner() -> dict[str, Any]:
    # Without secrets, which a command line may hold; others read this file.
    command = shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]])
    return {
        "id": uuid4().hex,
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "command": scrubbed(command)[:200],
        "beats": 0,
    }


def _beat(note: StoredPath, owner: dict[str, Any], done: threading.Event) -> None:
    """Write the note anew until `done`."""
    while not done.wait(BEAT_S):
        owner["beats"] += 1
        # The work itself will say what is wrong with the store.
        with contextlib.suppress(OSError):
            write_atomically(note, json.dumps(owner).encode())


def _wait_for_others(folder: StoredPath, part: tuple[int, int], advice: str) -> None:
    """Raise InUse where another call of the whole, of the same share or of other shares lives."""
    seen: dict[StoredPath, dict[str, Any]] = {}
    for path in folder.glob(".writer-*.json"):
        match = _NAME.fullmatch(path.name)
        if match is None:
            continue
        k, n = int(match[1]), int(match[2])
        is_other_share = n == part[1] and k != part[0]
        owner = None if is_other_share else _read(path)
        if owner is not None and not _is_dead(owner):
            seen[path] = owner
    if not seen:
        return

    first = next(iter(seen.values()))
    if str(folder).startswith(_UNWATCHED):
        [*_, last] = seen
        raise InUse(
            _told(folder, first, advice) + f"; if it was killed, remove {last} from the repository"
        )
    log.warn(
        f"{folder} bears the note of another call ({first['command']!r} on {first['host']}); "
        f"watching for {WATCHED_BEATS * BEAT_S:.0f} s whether that lives"
    )
    for _ in range(WATCHED_BEATS * 4):
        time.sleep(BEAT_S / 4)
        for path, owner in list(seen.items()):
            now = _read(path)
            # Its call has ended meanwhile.
            if now is None:
                del seen[path]
            elif now != owner:
                raise InUse(_told(folder, now, advice))
        if not seen:
            return
    for path in seen:
        path.unlink(missing_ok=True)


def _read(path: StoredPath) -> dict[str, Any] | None:
    """What a note says now; None where it is gone or none."""
    forget_copy(path)
    try:
        owner = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    is_note = isinstance(owner, dict) and {"id", "pid", "host", "command"} <= owner.keys()
    return owner if is_note else None


def _is_dead(owner: dict[str, Any]) -> bool:
    """Whether a call was of this machine, and is none of its processes any more."""
    return owner["host"] == socket.gethostname() and not is_alive(owner["pid"])


def _told(folder: StoredPath, owner: dict[str, Any], advice: str) -> str:
    name = f"{owner['command']!r} (process {owner['pid']} on {owner['host']})"
    return f"{folder} is in use by {name}. {advice}"
