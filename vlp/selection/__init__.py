"""Selections: which samples a step trains on, where that is not left to chance. The folder is the
registry.

    jest    the most learnable part of a larger batch, for the model of the moment
    mcl     every global batch from one cell of what earlier models see alike

A file holds `Options` and `open(options, config, model, engine) -> Selection`, called once at the
start, before the engine takes over the model; it raises ValueError for settings that do not fit the
model or the batch. `check(options, config, model)`, where a file has one, refuses as much of it as
costs nothing: it is called for every stage of a run before the first one starts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlp.data.mix import Mixture

if TYPE_CHECKING:
    from torch import Tensor

    from vlp.config import Config
    from vlp.engines import Engine
    from vlp.models.dual_encoder import DualEncoder
    from vlp.step import Training
    from vlp.types import Batch

    Choose = Callable[[Training, Batch], tuple[Batch, dict[str, Tensor]]]


def keep_all(training: Training, batch: Batch) -> tuple[Batch, dict[str, Tensor]]:
    """Train on every row that was loaded."""
    return batch, {}


@dataclass(frozen=True)
class Selection:
    """How the rows of a step are found."""

    loaded: int  # rows of all ranks that the loader delivers a step
    mixture: Callable[..., Mixture] = Mixture  # which samples those are (vlp.data.mix)
    needs: frozenset[str] = frozenset()  # optional fields of Batch that choosing reads
    # (training, this rank's loaded rows) -> (its rows of the step, scalars to log). Collective.
    choose: Choose = keep_all

    def check(self, carried: frozenset[str], n_teachers: int) -> None:
        """Refuse data whose batches do not carry what choosing reads, or that of several
        teachers.
        """
        missing_fields = sorted(self.needs - carried)
        if missing_fields:
            raise ValueError(
                f"the selection needs {missing_fields}, but the data carries {sorted(carried)}; "
                "store them with `vlp data embed` and name them in the source's `embeddings`"
            )
        if "teacher_image" in self.needs and n_teachers > 1:
            raise ValueError(
                f"the selection reads the stored embeddings of one model, and the sources' "
                f"`embeddings` are of {n_teachers}; name one of them"
            )


def check(config: Config, model: DualEncoder) -> None:
    """Refuse what the selection would refuse when it is built, as far as that is told without its
    models and files. ValueError.
    """
    for plugin in config.selection:
        check_options = getattr(plugin.module, "check", None)
        if check_options is not None:
            check_options(plugin.options, config, model)


def build(config: Config, model: DualEncoder, engine: Engine) -> Selection:
    """The selection that `config.selection` names.

    Without one every row that is loaded is trained on.
    """
    if not config.selection:
        return Selection(config.train.batch)

    # The configuration holds one at most.
    (plugin,) = config.selection
    return plugin.module.open(plugin.options, config, model, engine)
