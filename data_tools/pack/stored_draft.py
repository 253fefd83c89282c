"""A pack that grows in a store, where all nodes of a cluster write it.

Folders of a store cannot be renamed. So what an earlier pack left goes once every picture is known
to be usable, shards appear one by one, and the index comes last; before it is there, the folder
`_made` tells that the pack is not whole.
"""

from __future__ import annotations

from pathlib import Path

from vlp.data.stored import StoredPath
from vlp.files import write_atomically

_MADE = "_made"
_PLAN = "plan.txt"  # in it, a digest of settings and input


class StoredDraft:
    """A folder of a store that becomes a pack, as `vlp.data_tools.pack.target.Draft` does on this
    machine.

    Raises FileExistsError for unfinished work of another plan, which `overwrite` removes.
    """

    def __init__(self, target: StoredPath, plan: str, overwrite: bool) -> None:
        self.folder: Path = target
        self.made: Path = target / _MADE
        self._cleared = self.made / "cleared.txt"

        self._note = self.made / _PLAN
        if self._note.is_file():
            if self._note.read_text() == plan:
                return
            if not overwrite:
                raise FileExistsError(
                    f"{target} holds unfinished work of other input or settings; give the command "
                    "that it is of to go on with it, or --overwrite to begin anew"
                )
            self._remove_made()
        write_atomically(self._note, plan.encode())

    def finished(self) -> list[Path]:
        """The shards in it, once those of an earlier pack are gone."""
        return list(self.folder.rglob("*.tar")) if self._cleared.is_file() else []

    def n_marks(self) -> int:
        """How many pieces of the work are done."""
        return len(list(self.made.rglob("*.json")))

    def make_room(self) -> None:
        """Remove what an earlier pack left: its shards would count among the new ones."""
        # A call may be killed before all of it is gone.
        if not self._cleared.is_file():
            self._remove_shards()
            write_atomically(self._cleared, b"")

    def publish(self, overwrite: bool) -> None:
        """Let it be whole."""
        self._remove_made()

    def discard(self) -> None:
        """Leave nothing of this call's behind."""
        if self._cleared.is_file():
            self._remove_shards()
        self._remove_made()

    def _remove_made(self) -> None:
        """Remove what shards are made from, and nothing that a mark which stays vouches for: a call
        may be killed before all of it is gone.
        """
        for kind in ("shards", "encoded", "checked"):
            for path in sorted((self.made / kind).glob("*")):
                path.unlink()
        self._cleared.unlink(missing_ok=True)
        self._note.unlink()

    def _remove_shards(self) -> None:
        for path in self.folder.rglob("*"):
            if self.made not in path.parents:
                path.unlink()


def is_unfinished(target: StoredPath) -> bool:
    """Whether a call has left work there that is not whole."""
    return (target / _MADE / _PLAN).is_file()
