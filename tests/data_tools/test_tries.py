"""Which item of a cluster is begun anew."""

from __future__ import annotations

import re

import pytest

from vlp.data_tools._run.tries import LOST_NODES, TRIES, Task


@pytest.mark.parametrize(
    "n_alone, n_with_node, reason",
    [
        (TRIES - 1, 0, ""),
        (TRIES, 0, f"{TRIES} processes ended without a word at one shard.*fewer --processes"),
        # Nodes that are lost take no try of a process that ends by itself, nor the other way round.
        (0, TRIES + 1, ""),
        (TRIES - 1, LOST_NODES - 1, ""),
        (TRIES, LOST_NODES - 1, f"{TRIES} processes ended"),
        (0, LOST_NODES, f"{LOST_NODES} nodes were lost at one shard.*larger ones"),
    ],
)
def test_a_lost_node_takes_no_try(n_alone: int, n_with_node: int, reason: str) -> None:
    task = Task(0, ["lives"] * n_alone + [f"gone {i}" for i in range(n_with_node)])
    told = task.why_hopeless({"lives", "another"})
    assert bool(told) == bool(reason)
    if reason:
        assert task.may_be_hopeless()
        assert re.match(reason, told)
