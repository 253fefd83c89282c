"""Time and memory of the contrastive loss, forward and backward, beside open_clip's and (where
installed) Inf-CL's.

    python tests/benchmarks/loss.py --batch 1024 8192 --dim 512

One process a measurement, so that peaks do not mix. The matmul rate is measured on the device right
before, with the shapes of the loss; the floor is 8B²D FLOPs at that rate. Extra memory is the peak
above what stood before the call (embeddings), measured by the allocator on CUDA and as resident
memory on a CPU. `share` is floor / time, of any method: what it makes of the device if 8B²D were
the work.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from tests.benchmarks import report

METHODS = (
    "tiled",
    "triton",
    "dense",
    "open_clip",
    "infcl",
    "tiled siglip",
    "triton siglip",
    "open_clip siglip",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1024, 4096, 8192])
    parser.add_argument("--dim", type=int, nargs="+", default=[512])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--dtype", default=None, help="default: float32 on a CPU, bfloat16 on CUDA")
    parser.add_argument("--device", default=None)
    parser.add_argument("--scale", type=float, default=14.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--timeout-s", type=float, default=600)
    parser.add_argument("--section", default="loss", help="of docs/results.md, with --publish")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    report.add_arguments(parser)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(**json.loads(args.worker))))
        return

    rows = []
    for dim, batch, method in product(args.dim, args.batch, args.methods):
        row = in_own_process(args, method, batch, dim)
        if row is not None:
            rows.append(row)

    compare(rows)

    notes = (
        "Median of the repeats. floor: 8B²D FLOPs at the matmul rate measured in the same process; "
        "extra memory: peak above the embeddings; against open_clip: the ratio of times and of "
        "extra memory at the same B and D."
    )
    report.publish(args.section, "Contrastive loss, forward and backward", rows, args, notes)


def in_own_process(
    args: argparse.Namespace, method: str, batch: int, dim: int
) -> dict[str, Any] | None:
    work = {"method": method, "B": batch, "D": dim, "scale": args.scale, "repeats": args.repeats}
    work |= {"dtype": args.dtype, "device": args.device}
    command = [sys.executable, __file__, "--worker", json.dumps(work)]
    row: dict[str, Any] = {"method": method, "B": batch, "D": dim}
    empty = dict.fromkeys(("ms", "floor ms", "share", "TFLOP/s", "extra MiB"))

    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=args.timeout_s)
    except subprocess.TimeoutExpired:
        return row | empty | {"note": f"over {args.timeout_s:.0f} s"}

    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
        if "unavailable" in last:
            print(f"{method}: {last}", file=sys.stderr)
            return None
        killed = (
            done.returncode in (-9, 137)
            or "out of memory" in done.stderr
            or "allocate" in done.stderr
        )
        return row | empty | {"note": "out of memory" if killed else last[:80]}

    row |= json.loads(done.stdout.strip().splitlines()[-1]) | {"note": None}
    print(report.table([row]).splitlines()[-1], file=sys.stderr)
    return row


def compare(rows: list[dict[str, Any]]) -> None:
    """Time and extra memory relative to open_clip at the same size, in place."""
    for row in rows:
        peer = "open_clip siglip" if "siglip" in row["method"] else "open_clip"
        match = [r for r in rows if (r["method"], r["B"], r["D"]) == (peer, row["B"], row["D"])]
        both = bool(match and match[0]["ms"] and row["ms"])
        row["time / open_clip"] = row["ms"] / match[0]["ms"] if both else None
        row["memory / open_clip"] = row["extra MiB"] / match[0]["extra MiB"] if both else None


def measure(
    method: str, B: int, D: int, scale: float, repeats: int, dtype: str | None, device: str | None
) -> dict[str, Any]:
    """In the worker: build the pairs, warm up, measure the matmul rate, the times and the peak."""
    import torch

    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    kind = getattr(torch, dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    loss = loss_of(method, device)
    torch.manual_seed(0)
    x, t = (
        torch.nn.functional.normalize(torch.randn(B, D, device=device), dim=1).to(kind)
        for _ in range(2)
    )
    x, t = x.requires_grad_(), t.requires_grad_()
    scale = torch.tensor(scale, device=device, requires_grad=True)

    def run() -> None:
        x.grad = t.grad = scale.grad = None
        loss(x, t, scale).backward()

    small = slice(0, min(B, 512))
    loss(x[small], t[small], scale).backward()  # imports, kernels, thread pools
    x.grad = t.grad = scale.grad = None
    extra = peak_memory(run, device)
    rate = matmul_rate(device, kind, D)
    times = [seconds(run, device) for _ in range(repeats)]
    took = statistics.median(times)
    flops = 8 * B * B * D
    return {
        "ms": took * 1e3,
        "floor ms": flops / rate * 1e3,
        "share": flops / rate / took,
        "TFLOP/s": flops / took / 1e12,
        "extra MiB": extra / 2**20,
    }


def loss_of(method: str, device: Any) -> Callable[..., Any]:
    """(image, text, scale) -> loss.

    Exits with 'unavailable' where a package or device is missing.
    """
    import torch

    name = method.split()[0]
    if name == "open_clip":
        from open_clip.loss import ClipLoss, SigLipLoss

        if method.endswith("siglip"):
            module, bias = SigLipLoss(), torch.tensor(-10.0, device=device, requires_grad=True)
            return lambda x, t, scale: module(x, t, scale, bias)
        return ClipLoss()

    if name == "infcl":
        try:
            from inf_cl import cal_inf_loss
        except ImportError:
            sys.exit("unavailable: the package inf_cl is not installed")
        return lambda x, t, scale: (
            (cal_inf_loss(x, t, scale=scale) + cal_inf_loss(t, x, scale=scale)) / 2
        )

    from vlp.losses import build

    term = "siglip" if method.endswith("siglip") else "infonce"

    try:
        objective = build({term: {}}, impl=name)
    except ValueError as error:
        sys.exit(f"unavailable: {error}")

    bias = torch.tensor(-10.0, device=device, requires_grad=True)
    return lambda x, t, scale: objective(image=x, text=t, scale=scale, bias=bias)[0]


def matmul_rate(device: Any, dtype: Any, D: int) -> float:
    """FLOP/s of the device on products of the loss's own kind: [n, D] · [D, n] and [n, n] · [n, D],
    the better of 5.
    """
    import torch

    n = 16384 if device.type == "cuda" else 4096
    a, z = torch.randn(n, D, device=device).to(dtype), torch.randn(n, n, device=device).to(dtype)
    out, gradient = torch.empty_like(z), torch.empty_like(a)

    def products() -> None:
        torch.mm(a, a.T, out=out)
        for _ in range(3):
            torch.mm(z, a, out=gradient)

    products()
    return 8 * n * n * D / min(seconds(products, device) for _ in range(5))


def seconds(function: Callable[[], None], device: Any) -> float:
    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_memory(function: Callable[[], None], device: Any) -> float:
    """Bytes above what is allocated before the call."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    # A thread that samples resident memory: the kernel's own high-water mark (VmHWM) cannot be
    # reset here.
    gc.collect()
    before, peak, over = resident(), [0], threading.Event()

    def watch() -> None:
        while not over.is_set():
            peak[0] = max(peak[0], resident())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    function()
    over.set()
    watcher.join()
    return max(peak[0] - before, math.ulp(1.0))


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
