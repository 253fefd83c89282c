"""How much of the all-gather of texts a step hides behind the image tower, on a slow network.

    python tests/benchmarks/overlap.py [--mbit 100 … 0] [--publish]

Two gloo ranks of one thread each train by DDP in a network namespace of their own, whose loopback a
token bucket limits (`unshare`, `tc`; root of Linux). The bucket is one for both ranks: a rank has
half the rate. Steps with the gather under way beside the tower alternate with steps that wait for
it where it begins, which is the order without overlap.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from tests import ranks
from tests.benchmarks import comm_model, comm_time, report
from vlp import dist
from vlp.pairwise.topology import Topology
from vlp.step import train_step
from vlp.types import Batch

N_RANKS = 2
INSIDE = "VLP_BENCHMARK_NAMESPACE"  # set for the call of this file inside the namespace
LINK = "ip link set lo mtu 1500 up"  # frames larger than the bucket never pass it
BUCKET = "tc qdisc replace dev lo root tbf rate {}mbit burst 64k latency 400ms"
IMAGE_SIZE, LENGTH = 64, 16
IMAGE = {"width": 64, "layers": 4, "patch_size": 8, "image_size": IMAGE_SIZE}
TEXT = {"name": "transformer", "width": 8, "layers": 1, "heads": 1, "context_length": LENGTH}
MODES = ("overlapped", "at once")


class AtOnce(dist.Gathering):
    """A gather that is over when its call returns."""

    def __init__(self, value: torch.Tensor, group: dist.Group) -> None:
        super().__init__(value, group)
        self.wait()


def main() -> None:
    args = parse()
    if INSIDE not in os.environ:
        check_namespace()
        command = ["unshare", "-n", sys.executable, *sys.argv]
        sys.exit(subprocess.run(command, env=os.environ | {INSIDE: "1"}).returncode)

    subprocess.run(LINK.split(), check=True)
    settings = args.mbit, args.rows, args.dim, args.repeats
    by_rank = ranks.run(N_RANKS, measure, *settings, timeout_s=170)
    rows = [row(args, by_rank[0], mbit) for mbit in args.mbit]

    notes = (
        f"InfoNCE, W = {N_RANKS}, b = {args.rows}, D = {args.dim}, float32, DDP; medians over "
        f"{args.repeats} steps of each kind, alternating, ± the median absolute deviation. "
        "gather ms: how long a step blocks that waits where the gather begins. hidden: the share "
        "of it that no step blocks for which overlaps. gloo CPU ms: of all threads but the main "
        "one while the image tower passes, overlapped. Model: a step without limit is its "
        "computation, so that row is no test of it; a message takes "
        f"{by_rank[0]['latency_us']:.0f} µs, measured there. Load of the machine at the end: "
        f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores."
    )
    title = "The gather of texts beside the image tower, on a network of limited rate"
    report.publish("overlap", title, rows, args, notes)
    # Without limit the model is given what was measured.
    for line in rows[:-1]:
        measured, modelled = line["step ms"], line["model: step ms"]
        print(
            f"measured against model: {line['Mbit/s']} Mbit/s, "
            f"step {measured:.0f} ms against {modelled:.0f} ms"
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--mbit", type=int, nargs="+", default=[100, 200, 400, 0], help="rates; 0: no limit, last"
    )
    parser.add_argument("--rows", type=int, default=256, help="b, rows of a rank")
    parser.add_argument("--dim", type=int, default=2048, help="D")
    parser.add_argument("--repeats", type=int, default=5, help="steps of each kind at each rate")
    report.add_arguments(parser)
    args = parser.parse_args()

    for name in ("rows", "dim", "repeats"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: found {getattr(args, name)}, expected at least 1")
    if min(args.mbit) < 0 or args.mbit[-1] != 0 or args.mbit.count(0) != 1:
        parser.error(
            f"--mbit: found {args.mbit}, expected rates and 0 (no limit) once, as the last"
        )
    return args


def check_namespace() -> None:
    """Refuse a machine on which no slow network can be made, before anything runs."""
    script = f"{LINK} && {BUCKET.format(100)}"
    try:
        done = subprocess.run(["unshare", "-n", "sh", "-c", script], capture_output=True, text=True)
        fault = done.stderr.strip() if done.returncode else ""
    except FileNotFoundError as error:
        fault = str(error)
    if fault:
        sys.exit(
            f"overlap: no network namespace with a token bucket could be made: {fault}; expected "
            "`unshare -n` and `tc qdisc … tbf` to work: run as root of a Linux machine with "
            "util-linux and iproute2"
        )


# On a rank


def measure(rates: list[int], n_rows: int, dim: int, repeats: int) -> dict[str, Any]:
    """Milliseconds of every step by rate and mode, and the constants of the model."""
    training = make(dim)
    batch = make_batch(n_rows)
    clock = Clock(training.engine.module)
    gathering = dist.Gathering

    # The first shows what the objective gathers, and DDP lays its buckets out anew after it.
    for _ in range(2):
        train_step(training, batch)

    steps: dict[int, dict[str, list[dict[str, float]]]] = {}
    for mbit in rates:
        limit(mbit)
        train_step(training, batch)  # one for the connections to find their pace
        steps[mbit] = {mode: [] for mode in MODES}
        for _ in range(repeats):
            for mode in MODES:
                dist.Gathering = AtOnce if mode == "at once" else gathering
                torch.distributed.barrier()
                steps[mbit][mode].append(clock.times(lambda: train_step(training, batch)))
        dist.Gathering = gathering

    # The last rate is no limit.
    n_parameters = sum(p.numel() for p in training.engine.module.parameters())
    return {"steps": steps, "latency_us": latency_us(), "n_parameters": n_parameters}


def make(dim: int) -> Any:
    """A real training by DDP: a small pair of towers, of which the image tower takes the time."""
    from tests.test_step import make_training
    from vlp import config, plugin

    image = {"name": "vit", "head_width": 32} | IMAGE
    towers = [plugin.Named("vlp.towers").parse(tower, (), []) for tower in (image, TEXT)]
    model = config.Model(image_tower=towers[0], text_tower=towers[1], embed_dim=dim)
    return make_training(objective={"infonce": {}}, double=False, whole=model)


def make_batch(n_rows: int) -> Batch:
    generator = torch.Generator().manual_seed(dist.rank())
    shape = n_rows, 3, IMAGE_SIZE, IMAGE_SIZE
    image = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    text = torch.randint(1, 400, (n_rows, LENGTH), generator=generator)
    text[:, -1] = 49407  # end of text: the token that is pooled
    return Batch(image, text, torch.arange(n_rows), [f"key{i}" for i in range(n_rows)])


def limit(mbit: int) -> None:
    """Give the loopback a rate, by rank 0, while nobody sends."""
    torch.distributed.barrier()
    if dist.rank() == 0:
        command = BUCKET.format(mbit) if mbit else "tc qdisc del dev lo root"
        subprocess.run(command.split(), check=mbit > 0, stderr=None if mbit else subprocess.DEVNULL)
    torch.distributed.barrier()


def latency_us(n: int = 30) -> float:
    """Of one message: half an all-reduce of one number, which takes two."""
    value, times = torch.zeros(1), []
    for _ in range(n):
        start = time.perf_counter()
        torch.distributed.all_reduce(value)
        times.append((time.perf_counter() - start) * 1e6 / 2)
    return statistics.median(times)


class Clock:
    """Milliseconds of a step: whole, in the image tower's forward, blocked for gathers, and CPU
    time of other threads beside that forward.
    """

    def __init__(self, encoder: Any) -> None:
        self.now: dict[str, float] = {"blocked": 0.0}
        encoder.visual.register_forward_pre_hook(self._enter)
        encoder.visual.register_forward_hook(self._leave)
        wait = dist.Gathering.wait

        def timed(gathering: dist.Gathering) -> torch.Tensor:
            start = time.perf_counter()
            received = wait(gathering)
            self.now["blocked"] += (time.perf_counter() - start) * 1000
            return received

        dist.Gathering.wait = timed

    def times(self, step: Any) -> dict[str, float]:
        self.now = {"blocked": 0.0}
        start = time.perf_counter()
        step()
        return self.now | {"step": (time.perf_counter() - start) * 1000}

    def _enter(self, *_: Any) -> None:
        self._start = time.perf_counter(), time.process_time() - time.thread_time()

    def _leave(self, *_: Any) -> None:
        others = time.process_time() - time.thread_time()
        self.now["tower"] = (time.perf_counter() - self._start[0]) * 1000
        self.now["others"] = (others - self._start[1]) * 1000


# The table


def row(args: argparse.Namespace, found: dict[str, Any], mbit: int) -> dict[str, Any]:
    """A rate's line, with the model's prediction beside it."""
    overlapped, at_once = (found["steps"][mbit][mode] for mode in MODES)
    gather_ms = median(at_once, "blocked")
    step_ms, before_ms = median(overlapped, "step"), median(at_once, "step")
    predicted = model(args, found, mbit)
    return {
        "Mbit/s": mbit or None,
        "tower ms": median(at_once, "tower"),
        "gather ms": gather_ms,
        "blocked ms, overlapped": median(overlapped, "blocked"),
        "hidden, of the gather": 1 - median(overlapped, "blocked") / gather_ms,
        "step ms": step_ms,
        "± ms": deviation(overlapped),
        "step ms, at once": before_ms,
        "at once ± ms": deviation(at_once),
        "step ratio": step_ms / before_ms,
        "tower ms, overlapped": median(overlapped, "tower"),
        "gloo CPU ms": median(overlapped, "others"),
        "model: hidden ms": predicted["hidden ms"],
        "model: step ms": predicted["step ms"],
    }


def model(args: argparse.Namespace, found: dict[str, Any], mbit: int) -> dict[str, Any]:
    """`comm_time`'s step of two nodes of one rank each, which share the rate."""
    gbs = mbit / 8000 / N_RANKS if mbit else 1e9
    latency = found["latency_us"]
    machine = comm_time.Machine(1, latency, gbs, latency, gbs, 1)
    work = comm_model.Work(args.rows, args.dim, itemsize=4)

    computed_ms = median(found["steps"][0]["overlapped"], "step")
    tower_ms = median(found["steps"][mbit]["at once"], "tower")
    # The loss is part of the step without limit.
    step = comm_time.Step(work, found["n_parameters"], 1, computed_ms, tower_ms, 1e9)
    exchanges = comm_model.loss(Topology.read("global"), N_RANKS, work)
    return comm_time.simulate(machine, step, exchanges, N_RANKS, N_RANKS)


def median(steps: list[dict[str, float]], name: str) -> float:
    return statistics.median(step[name] for step in steps)


def deviation(steps: list[dict[str, float]]) -> float:
    """The median absolute deviation of the steps' times."""
    middle = median(steps, "step")
    return statistics.median(abs(step["step"] - middle) for step in steps)


if __name__ == "__main__":
    main()
