"""The whole training step beside open_clip's own `train_one_epoch`: same architecture, batch,
precision and AdamW.

    python tests/benchmarks/step.py --architecture ViT-B-32 --batch 64 --micro 1 4

One process a measurement. Both sides find their pixels where `--pixels` says: on the device, or in
pinned memory from which they copy them, ours as uint8 and open_clip's in the input dtype of its
loop; what one such copy takes stands in a column of its own. open_clip gets what its main sets:
TF32, cuDNN's search, AdamW (fused, as ours), a model compiled whole.

MFU is the share of the device's measured matmul rate that the step's useful FLOPs make: one forward
and backward of both towers and the loss, counted by torch's FLOP counter, so that a second forward
lowers it. Host waits are what CUDA's own debug mode counts in one step that is not logged.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from tests.benchmarks import report
from tests.benchmarks.loss import matmul_rate

METHODS = (
    "vlp",
    "vlp padded",
    "vlp compile",
    "vlp checkpointing",
    "open_clip",
    "open_clip compile",
    "open_clip checkpointing",
)
PEER = "open_clip"
MEASURES = ("samples/s", "MFU", "peak MiB", "copy ms", "host waits", "text s", "tokens")

# Runs so many steps, one after another.
Steps = Callable[[int], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--architecture", nargs="+", default=["ViT-B-32"], help="any of open_clip's"
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument(
        "--micro",
        type=int,
        nargs="+",
        default=[1, 4],
        help="micro-batches; open_clip calls it accum-freq",
    )
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--precision", choices=("float32", "bf16"), default="bf16")
    parser.add_argument(
        "--pixels",
        choices=("resident", "pinned"),
        default="resident",
        help="where both sides find their pixels",
    )
    parser.add_argument(
        "--tokens", type=int, default=14, help="mean length of the captions; COCO's have 13.7"
    )
    parser.add_argument("--captions", help="JSON lines with `captions`: texts as long as those")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=5, help="steps before the measured ones")
    parser.add_argument("--timeout-s", type=float, default=600, help="of one measurement")
    parser.add_argument("--section", default="step", help="of docs/results.md, with --publish")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    report.add_arguments(parser)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(SimpleNamespace(**json.loads(args.worker)))))
        return

    rows = [
        in_own_process(args, *work) for work in product(args.architecture, args.micro, args.methods)
    ]
    compare(rows)

    captions = args.captions or f"of {args.tokens} tokens in the mean"
    notes = (
        f"Batch {args.batch}, {args.precision}, pixels {args.pixels}, captions {captions}, "
        f"{args.steps} steps after {args.warmup}. Peak memory: allocated on CUDA, resident on a "
        "CPU, of the whole process. The ratios are to open_clip's eager step and to its fastest. "
        "text s: a float32 forward and backward of our text tower alone; tokens: the share of the "
        "padded ones that passes it."
    )
    report.publish(args.section, "Training step", rows, args, notes)


def in_own_process(
    args: argparse.Namespace, architecture: str, micro: int, method: str
) -> dict[str, Any]:
    """Measure one method in a process of its own, so that neither memory nor settings mix."""
    shared = ("batch", "precision", "pixels", "tokens", "captions", "steps", "warmup")
    work = {name: getattr(args, name) for name in shared}
    work |= {"architecture": architecture, "micro": micro, "method": method}

    row: dict[str, Any] = {"model": architecture, "method": method, "micro-batches": micro}
    row |= dict.fromkeys(MEASURES) | {"note": None}
    command = [sys.executable, __file__, "--worker", json.dumps(work)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=args.timeout_s)
    except subprocess.TimeoutExpired:
        return row | {"note": f"over {args.timeout_s:.0f} s"}

    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
        return row | {"note": last[:80]}
    row |= json.loads(done.stdout.strip().splitlines()[-1])
    print(report.table([row]).splitlines()[-1], file=sys.stderr)
    return row


def compare(rows: list[dict[str, Any]]) -> None:
    """Speed and memory relative to open_clip with as many micro-batches, in place."""
    for row in rows:
        same = [
            other
            for other in rows
            if other["method"].startswith(PEER)
            and other["samples/s"]
            and (other["model"], other["micro-batches"]) == (row["model"], row["micro-batches"])
        ]
        eager = [other for other in same if other["method"] == PEER]
        best = max((other["samples/s"] for other in same), default=None)

        row["speed / open_clip"] = ratio(row, eager[0]["samples/s"] if eager else None, "samples/s")
        row["speed / its best"] = ratio(row, best, "samples/s")
        row["memory / open_clip"] = ratio(row, eager[0]["peak MiB"] if eager else None, "peak MiB")


def ratio(row: dict[str, Any], peer: float | None, measure: str) -> float | None:
    return row[measure] / peer if row[measure] and peer else None


def measure(work: SimpleNamespace) -> dict[str, Any]:
    """In the worker: build, warm up, measure."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    build = open_clip_steps if work.method.startswith(PEER) else our_steps
    run, copy = build(work, device)

    # Compiled graphs, allocator and cuDNN's search settle in the first steps.
    run(work.warmup)
    seconds_a_step = timed(lambda: run(work.steps), device) / work.steps
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    on_device = device.type == "cuda"
    waits = host_waits(run) if on_device else None
    copy_ms = 1e3 * min(timed(copy, device) for _ in range(5)) if on_device else None

    dtype = torch.bfloat16 if work.precision == "bf16" else torch.float32
    useful = count_flops(work)
    return {
        "samples/s": work.batch / seconds_a_step,
        "MFU": useful / seconds_a_step / matmul_rate(device, dtype, 768),
        "peak MiB": peak / 2**20,
        "copy ms": copy_ms,
        "host waits": waits,
        **text_tower(work, device),
    }


def timed(function: Callable[[], Any], device: Any) -> float:
    """Seconds of a call, until the device has finished it."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def host_waits(run: Steps) -> int:
    """How often the host waits for the device in one step: the difference between runs of three
    steps and of two, so that what only a first or last step does is left out.
    """
    run(1)
    return waits_of(run, 3) - waits_of(run, 2)


def waits_of(run: Steps, n_steps: int) -> int:
    """The waits that CUDA's debug mode warns of."""
    import torch

    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        run(n_steps)
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def text_tower(work: SimpleNamespace, device: Any) -> dict[str, Any]:
    """Seconds of a float32 forward and backward of our text tower alone, cut or padded, and the
    share of the tokens that passes it.
    """
    from vlp.models.build import build

    if work.method not in ("vlp", "vlp padded"):
        return {"text s": None, "tokens": None}

    model = build(model_settings(work)).to(device)
    _, text = samples(work.batch, model, work)
    cut = model.cut(text.numpy(), device, len(text))

    def run() -> None:
        model(text=text.to(device), cut=cut).text.sum().backward()

    run()
    n_tokens = text.numel() if cut is None else sum(n * length for n, length in cut.parts)
    return {"text s": timed(run, device), "tokens": n_tokens / text.numel()}


def samples(rows: int, model: Any, work: SimpleNamespace) -> tuple[Any, Any]:
    """Random uint8 pixels of the model's size, and token ids [rows, 77]: of texts drawn from
    `work.captions`, or of as many random words as are spread evenly around `work.tokens`.
    """
    import torch

    size = model.visual.image_size
    size = (size, size) if isinstance(size, int) else tuple(size)
    image = torch.randint(0, 256, (rows, 3, *size), dtype=torch.uint8)
    if work.captions is not None:
        return image, captions_of(work.captions, rows)

    # Words, one end-of-text, padding.
    shortest, longest = max(work.tokens - 6, 3), min(work.tokens + 6, 77)
    lengths = torch.randint(shortest, longest + 1, (rows, 1))
    position = torch.arange(77)
    text = torch.randint(1, 40000, (rows, 77)).masked_fill(position >= lengths, 0)
    text[position == lengths - 1] = 49407
    return image, text


def captions_of(file: str, rows: int) -> Any:
    """CLIP's tokens of texts drawn from a file."""
    from vlp.data.text import build
    from vlp.types import TextSpec

    texts: list[str] = []
    for line in Path(file).read_text(encoding="utf-8").splitlines():
        texts += json.loads(line)["captions"]
    return build(TextSpec("clip", 77))(random.Random(0).choices(texts, k=rows))


def model_settings(work: SimpleNamespace) -> Any:
    from vlp import config, schema

    tower = {"name": "open_clip", "architecture": work.architecture}
    section = {"image_tower": tower, "cut_captions": work.method != "vlp padded"}
    return schema.parse(config.Model, section)


def our_steps(work: SimpleNamespace, device: Any) -> tuple[Steps, Callable[[], Any]]:
    """(steps of ours, one copy of their pixels to the device)."""
    import torch

    from vlp import config, engines, losses, plugin, schema
    from vlp.models.build import build
    from vlp.step import Training, train_step
    from vlp.types import Batch

    train = {
        "duration": 100_000,
        "batch": work.batch,
        "micro_batches": work.micro,
        "precision": work.precision,
        "compile": "compile" in work.method,
        "activation_checkpointing": "checkpointing" in work.method,
    }
    options = schema.parse(config.Train, train)
    engine = engines.start(options)
    model = build(model_settings(work))
    image, text = samples(work.batch, model, work)
    engine.prepare(model, options)

    training = Training(
        engine,
        losses.build(plugin.keyed("vlp.losses", {"infonce": {}})),
        lambda step: 1e-4,
        micro_batches=work.micro,
        dtype=engines.compute_dtype(options, device),
    )
    keys = [str(i) for i in range(work.batch)]
    batch = in_host_memory(Batch(image, text, torch.arange(work.batch), keys), device)
    given = batch.to(device) if work.pixels == "resident" else batch

    def run(n_steps: int) -> None:
        for _ in range(n_steps):
            train_step(training, given)

    return run, lambda: batch.to(device)


def open_clip_steps(work: SimpleNamespace, device: Any) -> tuple[Steps, Callable[[], Any]]:
    """(steps of open_clip's train_one_epoch, one copy of their pixels to the device).

    One call for all steps: it prints, and waits for, a loss at its first and its last one.
    """
    import open_clip
    import torch
    from open_clip.loss import ClipLoss
    from open_clip_train.train import train_one_epoch

    # As its main does.
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.benchmark = True

    model = open_clip.create_model(work.architecture, device=device, output_dict=True)
    image, text = samples(work.batch, model, work)
    if "checkpointing" in work.method:
        model.set_grad_checkpointing(True)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2, fused=True
    )
    if "compile" in work.method:
        model = torch.compile(model)

    # Its transform normalises in the loader's workers; its loop converts to the input's dtype.
    pixels = in_host_memory(image.float() / 255, device)
    text = in_host_memory(text, device)
    resident = work.pixels == "resident"
    given = (pixels.to(device), text.to(device)) if resident else (pixels, text)

    settings = SimpleNamespace(
        device=str(device),
        precision="amp_bf16" if work.precision == "bf16" else "fp32",
        distill=False,
        accum_freq=work.micro,
        skip_scheduler=True,
        horovod=False,
        grad_clip_norm=1.0,
        log_every_n_steps=10**9,
        batch_size=work.batch // work.micro,
        world_size=1,
        rank=0,
        local_rank=0,
        wandb=False,
        save_logs=False,
    )

    def run(n_steps: int) -> None:
        data = {"train": epoch_of(*given, work.micro, n_steps)}
        train_one_epoch(model, data, ClipLoss(), 0, optimizer, None, None, None, settings)

    return run, lambda: pixels.to(device, non_blocking=True)


def epoch_of(pixels: Any, text: Any, micro: int, n_steps: int) -> SimpleNamespace:
    """The same batch `n_steps` times, as open_clip's loop takes an epoch."""
    size = len(pixels) // micro
    parts = [(pixels[i : i + size], text[i : i + size]) for i in range(0, len(pixels), size)]

    class Loader(list):
        num_batches = micro * n_steps
        num_samples = len(pixels) * n_steps

    return SimpleNamespace(dataloader=Loader(parts * n_steps), set_epoch=lambda epoch: None)


def in_host_memory(value: Any, device: Any) -> Any:
    """Page-locked where a GPU copies from it."""
    return value.pin_memory() if device.type == "cuda" else value


def count_flops(work: SimpleNamespace) -> float:
    """One forward and backward of towers and loss over the batch, at the full context length."""
    from vlp.flops import of_towers
    from vlp.models.build import build

    model = build(model_settings(work))
    n_tokens = work.batch * model.text_spec.context_length
    return of_towers(model).of(work.batch, n_tokens) + 6 * work.batch**2 * model.embed_dim


if __name__ == "__main__":
    main()
