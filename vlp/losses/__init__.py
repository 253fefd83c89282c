"""Objectives: one family a file, pure functions over `vlp.pairwise`. The folder is the registry.

    objective = build({"infonce": {}, "uniformity": {"weight": 0.5}})
    total, terms = objective(image=x, text=t, scale=scale)
    total.backward()

works in any trainer. On several ranks each returns its share, and averaging gradients over ranks
(as DDP, FSDP and ZeRO do) gives exactly the gradient of one process with the whole batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlp import dist, plugin
from vlp.fields import supplier
from vlp.losses._common import Common, Schedule
from vlp.losses._inputs import Inputs
from vlp.losses._objective import Objective
from vlp.losses._table import Table
from vlp.losses._terms import (
    check_modalities,
    check_width,
    for_run,
    leaves,
    min_views,
    needs,
    own_scale,
    reads,
)
from vlp.pairwise import Backend, Topology

__all__ = [
    "Common", "Inputs", "Objective", "Schedule", "Table", "build", "check_modalities",
    "check_width", "leaves", "min_views", "needs", "own_scale", "reads", "supplier",
]  # fmt: skip


def build(
    objective: Mapping[str, Any] | plugin.KeyedPlugins,
    *,
    group: Any = None,
    topology: Any = "auto",
    impl: str = "auto",
    memory_budget: int | None = None,
    seed: int = 0,
    samples: int | None = None,
    steps: int | None = None,
    normalize: bool = False,
    texts_apart: bool = False,
) -> Objective:
    """The callable objective of a configuration's `objective:` section, {name: options, …}.

    group: a torch ProcessGroup; None: all ranks of an initialised process group, else this process
    alone. topology: auto | local | global | ring | {group: g, layout: contiguous | strided |
    alternating, exchange: gather | ring} (see `vlp.pairwise.topology`). impl: auto | dense | tiled
    | triton. memory_budget: bytes for score tiles kept from forward (None: twice the candidates'
    embeddings). seed: of alternating groups and of what terms draw. samples, steps: of the run, for
    terms that keep numbers of each sample, or follow a schedule, and whose options leave them open.
    normalize: divide the rows of all embeddings by their norm; without it, rows that are not unit
    are refused. texts_apart: see `vlp.pairwise.Backend`.

    Raises ConfigError (a ValueError) naming every problem of the mapping, ValueError for a topology
    that does not fit the ranks or an impl that this machine cannot run.
    """
    chosen = plugin.keyed(__name__, objective)
    if not chosen:
        raise ValueError(
            f"objective: no term; name at least one of {', '.join(plugin.names(__name__))}"
        )
    terms = [for_run(term, samples, steps) for term in chosen]

    # A topology that does not fit the ranks raises here, not at the first step.
    backend = Backend(
        ranks=dist.group_of(group),
        topology=Topology.read(topology),
        impl=impl,
        memory_budget=memory_budget,
        seed=seed,
        texts_apart=texts_apart,
    )
    return Objective(terms, backend, normalize)
