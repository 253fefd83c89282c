"""What the ranks of a step exchange, call by call, as the code of `vlp.dist` and `vlp.pairwise` has
it. `comm_count` counts the calls of real runs, and the two must be equal; `comm_time` says how long
they take.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from vlp import dist
from vlp.pairwise.topology import Topology

STATISTIC = 8  # bytes of a column's float64 statistic
SCALAR = 4  # bytes of a float32 number of the verdict
FLAGS = 3  # not finite, asked to stop, without rows: beside the gradients of scale and bias


@dataclass(frozen=True)
class Call:
    """One call of a collective, or one message, of one rank."""

    kind: str  # all_gather, reduce_scatter, all_to_all, all_reduce, message
    size: int  # bytes of the whole: of an all-gather's output, of the others' input
    ranks: int  # that take part; 2 in a message

    @property
    def sent(self) -> Fraction:
        """Bytes that the rank sends, by a bandwidth-optimal algorithm."""
        if self.kind == "message":
            return Fraction(self.size)
        share = Fraction(self.ranks - 1, self.ranks) * self.size
        return 2 * share if self.kind == "all_reduce" else share

    @property
    def messages(self) -> int:
        """How many messages the rank sends by the same algorithm."""
        if self.kind == "message":
            return 1
        once = self.ranks - 1
        return 2 * once if self.kind == "all_reduce" else once


@dataclass(frozen=True)
class Exchange:
    """A call that a phase of the step makes, and how often."""

    phase: str
    call: Call
    times: int = 1
    stride: int = 1  # between neighbours of the group: 1 inside a node, its ranks between nodes


@dataclass(frozen=True)
class Work:
    """The rows of one rank."""

    rows: int  # b
    dim: int  # D
    itemsize: int = 2  # bytes of an embedding's number
    columns: int = 1  # log-sum-exps of columns: 1 in InfoNCE, 0 in SigLIP

    @property
    def block(self) -> int:
        """Bytes of this rank's columns."""
        return self.rows * self.dim * self.itemsize

    def summed_block(self, n_ranks: int) -> int:
        """Bytes of them in a reduce-scatter, which widens half precision above so many ranks."""
        widens = self.itemsize == 2 and n_ranks > dist.ROUNDED_UP_TO
        return 2 * self.block if widens else self.block


def calls(exchanges: Iterable[Exchange]) -> Counter[Call]:
    """How often each call is made."""
    counted: Counter[Call] = Counter()
    for exchange in exchanges:
        counted[exchange.call] += exchange.times
    return counted


def sent(counted: Counter[Call]) -> Fraction:
    """Bytes a rank sends."""
    return sum((times * call.sent for call, times in counted.items()), Fraction(0))


def messages(counted: Counter[Call]) -> int:
    """Messages a rank sends."""
    return sum(times * call.messages for call, times in counted.items())


# What the loss exchanges


def loss(topology: Topology, n_ranks: int, work: Work) -> list[Exchange]:
    """Forward and backward of a loss over all pairs, by `vlp.pairwise`."""
    g = topology.group_size(n_ranks)
    if g == 1:
        return []

    # Groups that alternate have no communicator: their members send to one another.
    is_part = g < n_ranks
    direct = is_part and topology.layout == "alternating"
    stride = n_ranks // g if topology.layout == "strided" else 1
    if topology.exchange == "ring":
        exchanges = _ring(work, g, stride)
    else:
        # By messages the receiver sums, so that nothing has to be wide on its way.
        summed = work.block if direct else work.summed_block(g)
        exchanges = [
            _of_blocks("texts", "all_gather", work.block, g, stride, direct),
            _of_blocks("texts' gradient", "reduce_scatter", summed, g, stride, direct),
        ]

    # Partial statistics go to their owners, and the owners' weights come back.
    of_columns = _of_blocks("columns", "all_to_all", work.rows * STATISTIC, g, stride, direct)
    return exchanges + 2 * work.columns * [of_columns]


def hierarchical(n_ranks: int, per_node: int, work: Work) -> list[Exchange]:
    """The candidates of `global` in two hops: inside a node, and between the ranks that have one
    place in every node.

    `vlp` has no such topology; `comm_count.hierarchical_loss` makes it of its collectives.
    """
    n_nodes = n_ranks // per_node
    column = work.rows * STATISTIC

    # Gathered between nodes first, summed and merged inside first: each number crosses once.
    exchanges = [
        _of_blocks("texts", "all_gather", work.block, n_nodes, per_node),
        _of_blocks("texts", "all_gather", n_nodes * work.block, per_node),
        _of_blocks(
            "texts' gradient", "reduce_scatter", n_nodes * work.summed_block(per_node), per_node
        ),
        _of_blocks(
            "texts' gradient", "reduce_scatter", work.summed_block(n_nodes), n_nodes, per_node
        ),
    ]
    exchanges += (
        2 * work.columns * [_of_blocks("columns", "all_to_all", n_nodes * column, per_node)]
    )
    exchanges += 2 * work.columns * [_of_blocks("columns", "all_to_all", column, n_nodes, per_node)]
    return [exchange for exchange in exchanges if exchange.call.ranks > 1]


def _of_blocks(
    phase: str, kind: str, block: int, g: int, stride: int = 1, direct: bool = False
) -> Exchange:
    """A collective over g blocks, or the messages in its place."""
    if direct:
        return Exchange(phase, Call("message", block, 2), g - 1, stride)
    return Exchange(phase, Call(kind, g * block, g), 1, stride)


def _ring(work: Work, g: int, stride: int) -> list[Exchange]:
    """Blocks go round in forward and again in backward, where each one's gradient goes home."""
    block = Call("message", work.block, 2)
    gradient = Call("message", work.rows * work.dim * max(4, work.itemsize), 2)
    return [
        Exchange("ring forward", block, g - 1, stride),
        Exchange("ring backward", block, g - 1, stride),
        Exchange("ring gradient", gradient, g, stride),
    ]


# What the step adds


def verdict(n_ranks: int, n_numbers: int) -> Exchange:
    """The one all-reduce of scalars: the gradients of scale (and bias), and the flags."""
    return Exchange("verdict", Call("all_reduce", SCALAR * (n_numbers + FLAGS), n_ranks))


def weights(n_ranks: int, n_parameters: int) -> Exchange:
    """DDP's float32 gradients."""
    return Exchange("weights", Call("all_reduce", 4 * n_parameters, n_ranks))
