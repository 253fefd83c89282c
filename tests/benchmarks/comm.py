"""Bytes that a rank sends for one loss, forward and backward, by topology: counted, not estimated.

    python tests/benchmarks/comm.py --rows 256 --dim 512

Real gloo ranks run the loss; every collective's tensors are counted as they enter
`torch.distributed`, by what a bandwidth-optimal algorithm sends of them: (g−1)·size for an
all-gather of `size` bytes a rank, (g−1)/g·size for a reduce-scatter or all-to-all of `size` bytes,
twice that for an all-reduce, size for a message. open_clip's default exchange with gradients
(all-gather of both towers, reduce-scatter of both gradients) is run and counted alike.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from tests import ranks
from tests.benchmarks import report

TOPOLOGIES: dict[str, Any] = {
    "local": "local",
    "group of 2": {"group": 2},
    "group of 2, ring": {"group": 2, "exchange": "ring"},
    "global": "global",
    "ring": "ring",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=256, help="b, rows of a rank")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--dtype", default="bfloat16")
    report.add_arguments(parser)
    args = parser.parse_args()

    rows = [row for n_ranks in args.ranks for row in measure(args, n_ranks)]
    for row in rows:
        peer = next(r for r in rows if (r["topology"], r["W"]) == ("open_clip", row["W"]))
        row["of open_clip"] = row["KiB a rank"] / peer["KiB a rank"]

    notes = (
        f"InfoNCE, b = {args.rows}, D = {args.dim}, {args.dtype}; the first call's check of shapes "
        "is not counted."
    )
    report.publish(
        "comm", "Bytes a rank sends for one loss, forward and backward", rows, args, notes
    )


def measure(args: argparse.Namespace, n_ranks: int) -> list[dict[str, Any]]:
    """A row for every topology that fits the number of ranks, and one for open_clip."""
    names = [*(name for name in TOPOLOGIES if fits(TOPOLOGIES[name], n_ranks)), "open_clip"]
    by_rank = ranks.run(n_ranks, count, names, args.rows, args.dim, args.dtype, timeout_s=300)

    assert all(counts == by_rank[0] for counts in by_rank), "ranks send alike"

    rows = []
    for name, counts in zip(names, by_rank[0]):
        kib = {kind: n_bytes / 1024 for kind, n_bytes in counts.items()}
        row = {"topology": name, "W": n_ranks, "KiB a rank": sum(kib.values())}
        rows.append(row | {kind: kib.get(kind, 0.0) for kind in KINDS})
    return rows


def fits(topology: Any, n_ranks: int) -> bool:
    return not isinstance(topology, dict) or n_ranks % topology["group"] == 0


KINDS = ("all_gather", "reduce_scatter", "all_to_all", "all_reduce", "message")


def count(names: list[str], rows: int, dim: int, dtype: str) -> list[dict[str, float]]:
    """On a rank: bytes by kind of collective, for each topology."""
    return [dict(count_one(name, rows, dim, dtype)) for name in names]


def count_one(name: str, n_rows: int, dim: int, dtype: str) -> Counter:
    import torch

    from vlp import dist

    torch.manual_seed(dist.rank())
    x, t = (
        torch.nn.functional.normalize(torch.randn(n_rows, dim), dim=1).to(getattr(torch, dtype))
        for _ in range(2)
    )
    x, t, scale = x.requires_grad_(), t.requires_grad_(), torch.tensor(14.0, requires_grad=True)
    if name == "open_clip":
        from open_clip.loss import ClipLoss

        module = ClipLoss(
            local_loss=True, gather_with_grad=True, rank=dist.rank(), world_size=dist.world_size()
        )

        def loss() -> torch.Tensor:
            return module(x, t, scale)

    else:
        from vlp.losses import build

        objective = build({"infonce": {}}, topology=TOPOLOGIES[name])

        def loss() -> torch.Tensor:
            return objective(image=x, text=t, scale=scale)[0]

    loss().backward()  # groups are made and shapes are checked once

    counts: Counter = Counter()
    restore = listen(counts)
    loss().backward()
    restore()
    return counts


def listen(counts: Counter) -> Any:
    """Count at the functions of torch.distributed that programs call; returns what undoes it."""
    import torch.distributed as torch_dist

    def ring_share(group: Any) -> float:
        n = torch_dist.get_world_size(group)
        return (n - 1) / n

    def size(tensors: Any) -> int:
        return (
            sum(t.nbytes for t in tensors) if isinstance(tensors, (list, tuple)) else tensors.nbytes
        )

    def everything(output: Any, *_: Any, group: Any = None, **__: Any) -> float:
        return size(output) * ring_share(group)

    def scattered(output: Any, given: Any, *_: Any, group: Any = None, **__: Any) -> float:
        return size(given) * ring_share(group)

    def reduced(tensor: Any, *_: Any, group: Any = None, **__: Any) -> float:
        return 2 * size(tensor) * ring_share(group)

    def spread(output: Any, given: Any = None, *_: Any, group: Any = None, **__: Any) -> float:
        # Torch builds a reduce-scatter of these under gloo.
        return size(given) * ring_share(group) if given else 0.0

    def sent(operations: list[Any]) -> float:
        return sum(o.tensor.nbytes for o in operations if o.op is torch_dist.isend)

    costs = {
        "all_gather": ("all_gather", everything),
        "all_gather_into_tensor": ("all_gather", everything),
        "reduce_scatter": ("reduce_scatter", scattered),
        "reduce_scatter_tensor": ("reduce_scatter", scattered),
        "all_to_all": ("all_to_all", scattered),
        "all_to_all_single": ("all_to_all", scattered),
        "all_reduce": ("all_reduce", reduced),
        "batch_isend_irecv": ("message", sent),
        "scatter": ("reduce_scatter", spread),
    }
    originals = {name: getattr(torch_dist, name) for name in costs}

    def counted(name: str) -> Any:
        kind, cost = costs[name]

        def call(*args: Any, **kwargs: Any) -> Any:
            counts[kind] += cost(*args, **kwargs)
            return originals[name](*args, **kwargs)

        return call

    def put(functions: dict[str, Any]) -> None:
        for name, function in functions.items():
            setattr(torch_dist, name, function)

    put({name: counted(name) for name in costs})
    return lambda: put(originals)


if __name__ == "__main__":
    main()
