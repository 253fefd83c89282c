"""What the ranks of a step exchange, by topology: counted in real runs, and modelled at any size.

    python tests/benchmarks/comm.py --rows 256 --dim 512
    python tests/benchmarks/comm.py --simulate --ranks 8 64 512 2048 --towers-ms 90 --forward-ms 15

The first runs the loss on real gloo ranks. What enters `torch.distributed` is counted, and must be
what the model says, call by call. Bytes and messages are those of a bandwidth-optimal algorithm:
(g−1)/g of an all-gather's output, of the input of a reduce-scatter or all-to-all, twice that for an
all-reduce, in g−1 messages or 2·(g−1). open_clip's default exchange with gradients (all-gather of
both towers, reduce-scatter of both gradients) is run and counted alike.

The second computes a whole step of ranks that are not here, from the same calls and from constants
of a machine: see `comm_time`.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from tests import ranks
from tests.benchmarks import comm_count, comm_model, comm_time, report
from tests.benchmarks.comm_count import HIERARCHICAL, OPEN_CLIP
from tests.benchmarks.comm_model import Call, Exchange, Work
from vlp.pairwise.topology import Topology

TOPOLOGIES: dict[str, Any] = {
    "local": "local",
    "group of 2": {"group": 2},
    "group of 2, ring": {"group": 2, "exchange": "ring"},
    "global": "global",
    "ring": "ring",
    "hierarchical, nodes of 2": {HIERARCHICAL: 2},
}
KINDS = ("all_gather", "reduce_scatter", "all_to_all", "all_reduce", "message")


def main() -> None:
    args = parse()
    if args.simulate:
        simulate(args)
        return

    rows = [row for n_ranks in args.ranks for row in measure(args, n_ranks)]
    for row in rows:
        peer = next(r for r in rows if (r["topology"], r["W"]) == (OPEN_CLIP, row["W"]))
        row["of open_clip"] = row["KiB a rank"] / peer["KiB a rank"]

    notes = (
        f"InfoNCE, b = {args.rows}, D = {args.dim}, {args.dtype}; the first call's check of "
        "shapes is not counted. Calls, bytes and messages of every row of ours are exactly those "
        "of the model behind the simulated step."
    )
    report.publish(
        "comm", "What a rank sends for one loss, forward and backward", rows, args, notes
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, help="b, rows of a rank [256; simulated 512]")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--ranks", type=int, nargs="+", help="W [2 4; simulated 8 … 2048]")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--simulate", action="store_true", help="compute a step, run nothing")
    comm_time.add_arguments(parser)
    report.add_arguments(parser)

    args = parser.parse_args()
    check(args, parser)
    args.rows = args.rows or (512 if args.simulate else 256)
    args.ranks = args.ranks or ([8, 64, 256, 1024, 2048] if args.simulate else [2, 4])
    return args


def check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse what cannot be run or computed, before anything is."""
    if not isinstance(getattr(torch, args.dtype, None), torch.dtype):
        parser.error(f"--dtype: found {args.dtype}, expected one of torch's, like bfloat16")
    for name in ("rows", "dim", *comm_time.NAMES):
        value = getattr(args, name)
        if value is not None and value <= 0:
            option = name.replace("_", "-")
            parser.error(f"--{option}: found {value:g}, expected a positive number")

    least, node = (1, args.per_node) if args.simulate else (2, 1)
    for n_ranks in args.ranks or []:
        if n_ranks < least:
            parser.error(f"--ranks: found {n_ranks}, expected at least {least}")
        if n_ranks > node and n_ranks % node:
            parser.error(f"--ranks: {n_ranks} ranks are no whole nodes of {node} (--per-node)")


# Counted


def measure(args: argparse.Namespace, n_ranks: int) -> list[dict[str, Any]]:
    """A row for every topology that fits the number of ranks, and one for open_clip."""
    names = [*(name for name in TOPOLOGIES if fits(TOPOLOGIES[name], n_ranks)), OPEN_CLIP]
    values = [TOPOLOGIES.get(name, name) for name in names]
    settings = args.rows, args.dim, args.dtype, "infonce"
    by_rank = ranks.run(n_ranks, comm_count.count, values, *settings, timeout_s=300)
    assert all(counts == by_rank[0] for counts in by_rank), "ranks send alike"

    work = Work(args.rows, args.dim, getattr(torch, args.dtype).itemsize)
    rows = []
    for name, value, counts in zip(names, values, by_rank[0]):
        if value != OPEN_CLIP:
            modelled = comm_model.calls(exchanges_of(value, n_ranks, work))
            assert counts == modelled, f"{name}: counted {counts}, modelled {modelled}"
        rows.append({"topology": name, "W": n_ranks, **amounts(counts)})
    return rows


def amounts(counts: Counter[Call]) -> dict[str, Any]:
    """Bytes a rank sends in all and by kind, and messages."""
    row: dict[str, Any] = {
        "KiB a rank": float(comm_model.sent(counts)) / 1024,
        "messages": comm_model.messages(counts),
    }
    for kind in KINDS:
        of_kind = Counter({call: n for call, n in counts.items() if call.kind == kind})
        row[kind] = float(comm_model.sent(of_kind)) / 1024
    return row


def exchanges_of(topology: Any, n_ranks: int, work: Work) -> list[Exchange]:
    """The model's exchanges of a topology of `TOPOLOGIES`, or of any value that vlp reads."""
    if is_hierarchical(topology):
        return comm_model.hierarchical(n_ranks, topology[HIERARCHICAL], work)
    return comm_model.loss(Topology.read(topology), n_ranks, work)


def fits(topology: Any, n_ranks: int) -> bool:
    if not isinstance(topology, dict):
        return True
    return n_ranks % (topology.get("group") or topology[HIERARCHICAL]) == 0


def is_hierarchical(topology: Any) -> bool:
    return isinstance(topology, dict) and HIERARCHICAL in topology


# Simulated


def simulate(args: argparse.Namespace) -> None:
    machine, step = comm_time.read(args)
    node = args.per_node
    topologies: dict[str, Any] = {
        "local": "local",
        "group: a node": {"group": node},
        "the same, alternating": {"group": node, "layout": "alternating"},
        "group: 8 nodes": {"group": 8 * node},
        "global": "global",
        "hierarchical (not in vlp)": {HIERARCHICAL: node},
        "ring": "ring",
    }

    rows = []
    for n_ranks in args.ranks:
        for name, topology in topologies.items():
            if differs(topology, n_ranks, node):
                exchanges = exchanges_of(topology, n_ranks, step.work)
                g = candidates(topology, n_ranks)
                times = comm_time.simulate(machine, step, exchanges, n_ranks, g)
                rows.append({"topology": name, "W": n_ranks, **times})
    report.publish(
        "comm_step", "A step of many ranks, simulated", rows, args, comm_time.notes(machine, step)
    )


def differs(topology: Any, n_ranks: int, node: int) -> bool:
    """Whether the topology exists for so many ranks and is not `global` by another name."""
    if not isinstance(topology, dict):
        return True
    size = topology.get("group", node)
    return size < n_ranks and n_ranks % size == 0


def candidates(topology: Any, n_ranks: int) -> int:
    """g, the ranks that share candidates."""
    if is_hierarchical(topology):
        return n_ranks
    return Topology.read(topology).group_size(n_ranks)


if __name__ == "__main__":
    main()
