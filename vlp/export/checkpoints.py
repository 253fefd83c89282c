"""A checkpoint of several ranks in one piece: `vlp export RUN --form checkpoint --to DIR`.

The folder is a checkpoint like any other: `resume=DIR` goes on from it in a new run, and whatever
reads a run's weights reads it.
"""

from __future__ import annotations

from pathlib import Path

from vlp import checkpoint
from vlp.export.place import ExportError, appearing, check_free
from vlp.files import naming
from vlp.locks import held
from vlp.pretrained import references
from vlp.pretrained.parts import whole_tables

_BUSY = "Wait until it is done, or name another folder"


def write_checkpoint(run: Path | str, to: Path | str, *, overwrite: bool = False) -> list[str]:
    """Write a run's newest checkpoint, or one checkpoint, whole into the folder `to`, which appears
    complete or not at all; returns a line on what was written. ExportError for another model.
    """
    to = Path(to)
    check_free(to, overwrite)  # a checkpoint may take minutes to read
    reference = references.resolve(run)
    if reference.kind != "run" or reference.averaged:
        raise ExportError(
            f"{run} is no run, and has no state to go on from; name a run or a checkpoint, or "
            "export the model: leave out --form checkpoint"
        )

    path = checkpoint.resolve(reference.path)
    contents = checkpoint.load(path)
    contents.state.pop("tables", None)  # in one piece they are as they are
    contents.objective = whole_tables(contents.objective)

    with held(to, beside=True, advice=_BUSY), naming(to), appearing(to, overwrite) as folder:
        checkpoint.write_whole(folder, contents)
    step = contents.state["step"]
    return [f"checkpoint of step {step} in one piece; a new run goes on from it with resume={to}"]
