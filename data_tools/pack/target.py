"""The folder that a pack becomes: written beside it, and renamed when it is whole.

What a killed call has finished stays under the name that the next call of the same settings and
input looks for, so that it goes on.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vlp.data.stored import StoredPath
from vlp.data_tools._run.nodes import ClusterError
from vlp.data_tools.pack.stored_draft import StoredDraft, is_unfinished

_PLAN = "_plan.txt"  # a digest of settings and input
_DIGEST = re.compile(rb"[0-9a-f]{64}")
_MADE = "_made"  # marks, and the pictures that go into shards
_EARLIER_MARKS = "_checked.jsonl"  # of a call that an earlier version began


class Draft:
    """A folder to write into that becomes `target`, in place of an earlier one, with `publish`.

    `plan`: a digest of all that the output depends on. Raises FileExistsError for unfinished work
    of another plan, which `overwrite` removes.
    """

    def __init__(self, target: Path, plan: str, overwrite: bool) -> None:
        from vlp.files import write_atomically

        self.target = target
        self.folder = target.with_name(f".{target.name}.partial")
        self._previous = target.with_name(f".{target.name}.previous")
        self._recover()

        note = self.folder / _PLAN
        if note.exists() and note.read_text() == plan:
            return
        # A mistyped option must not cost the work of hours.
        n_shards, n_encoded = len(self.finished()), len(list(self.made.rglob("*.made")))
        if (n_shards or n_encoded) and not overwrite:
            encoded = f" and {n_encoded} chunks of encoded images" if n_encoded else ""
            raise FileExistsError(
                f"{self.folder} holds {n_shards} finished shards{encoded} of other input or "
                "settings; give the command that they are of to go on with them, or --overwrite "
                "to begin anew"
            )
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        write_atomically(note, plan.encode())

    def finished(self) -> list[Path]:
        """The shards in it."""
        paths = sorted(self.folder.rglob("*.tar"))
        return [path for path in paths if not path.name.startswith(".")]

    @property
    def made(self) -> Path:
        """The folder of what its shards are made from, and of the marks of what is done."""
        return self.folder / _MADE

    def n_marks(self) -> int:
        """How many pieces of the work are done."""
        return len(list(self.made.rglob("*.json")))

    def make_room(self) -> None:
        """Nothing: an earlier pack keeps its name until this one is whole."""

    def publish(self, overwrite: bool) -> None:
        """Give the folder its name."""
        from vlp.files import sync

        check_target(self.target, overwrite)  # again: another call may have finished meanwhile
        (self.folder / _EARLIER_MARKS).unlink(missing_ok=True)
        sync(self.folder)

        # The earlier pack moves aside first, so that a kill between the renames loses neither.
        try:
            if self.target.exists():
                shutil.rmtree(self._previous, ignore_errors=True)
                self.target.rename(self._previous)
            self.folder.rename(self.target)
            # Not before: a call that is killed here finds its work by them.
            tidy(self.target)
            shutil.rmtree(self._previous, ignore_errors=True)
        finally:
            self._recover()

    def discard(self) -> None:
        """Leave nothing behind."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _recover(self) -> None:
        """Give an earlier pack its name back, where a call ended between its two renames."""
        if self._previous.exists() and not self.target.exists():
            self._previous.rename(self.target)


@contextmanager
def drafted(target: Path, overwrite: bool, plan: str) -> Iterator[Draft | StoredDraft]:
    """A draft that is published when the block ends well, removed where its input is unusable, and
    kept for the next call where it is interrupted.
    """
    draft: Draft | StoredDraft
    if isinstance(target, StoredPath):
        draft = StoredDraft(target, plan, overwrite)
    else:
        draft = Draft(target, plan, overwrite)
    try:
        yield draft
        draft.publish(overwrite)
    except BaseException as error:
        # A store that has just failed fails again; the first error is the one to tell.
        with suppress(OSError):
            _keep_or_discard(draft, error)
        raise


def _keep_or_discard(draft: Draft | StoredDraft, error: BaseException) -> None:
    """Keep what is done for the next call, unless that could not go on with it."""
    # What was found wrong with the input stays wrong; a cluster may be mended.
    is_of_input = isinstance(error, ValueError) and not isinstance(error, ClusterError)
    n_finished = len(draft.finished())
    if is_of_input or not (n_finished or draft.n_marks() > 1):
        draft.discard()
        return
    print(
        f"{n_finished} finished shards and what is done of the others wait in {draft.folder}; "
        "the same command goes on",
        file=sys.stderr,
    )


def tidy(target: Path) -> None:
    """Remove what a whole pack was made from, also where a call was killed before it did."""
    note = target / _PLAN
    # A folder of somebody else's may have a file of this name.
    if note.is_file() and _DIGEST.fullmatch(note.read_bytes()):
        shutil.rmtree(target / _MADE, ignore_errors=True)
        note.unlink()


def check_target(target: Path, overwrite: bool) -> None:
    """Raise FileExistsError where there is something that must not be replaced."""
    # By its plan it is told whether this call goes on with it.
    if isinstance(target, StoredPath) and is_unfinished(target):
        return
    if not target.exists():
        return
    if not target.is_dir():
        raise FileExistsError(f"{target} is a file; --to names a new folder")

    files = [path for path in target.rglob("*") if not path.is_dir()]
    if files and not overwrite:
        raise FileExistsError(
            f"{target} is not empty; choose another folder, or --overwrite to replace it"
        )

    # --overwrite deletes the folder, so it must look like one that a pack wrote.
    suffixes = {".tar", ".txt", ".json", ".bin"}
    is_pack = any(target.rglob("*_stats.json"))
    foreign = [path for path in files if not is_pack or path.suffix not in suffixes]
    if foreign:
        raise FileExistsError(
            f"{target} holds files that no pack wrote, such as {foreign[0].name}; "
            "choose another folder"
        )
