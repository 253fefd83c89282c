"""The whole training step beside open_clip's own `train_one_epoch`: same architecture, batch,
precision and AdamW.

    python tests/benchmarks/step.py --architecture ViT-B-32 --batch 64 --micro 1 4
    python tests/benchmarks/step.py --captions ../shared/data/coco_open.jsonl \\
        --methods "vlp" "vlp padded" open_clip --micro 1

With --captions texts are as long as those of a file, and padded; without, they fill the context.
"tokens" is the share of b·L that passes the text tower, "text s" a forward and backward of it
alone.

One process a measurement. MFU is the share of the device's measured matmul rate that the step's
useful FLOPs make: one forward and backward of both towers and the loss, counted by torch's FLOP
counter, so that a second forward lowers it.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
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
    "open_clip checkpointing",
)
MEASURED = ("samples/s", "MFU", "peak MiB", "text s", "tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", default="ViT-B-32", help="any of open_clip's")
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
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--captions", help="JSON lines with `captions`, as long as real texts are")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    report.add_arguments(parser)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(SimpleNamespace(**json.loads(args.worker)))))
        return

    rows = []
    for micro in args.micro:
        rows += [in_own_process(args, method, micro) for method in args.methods]

    # Beside open_clip with as many micro-batches, where both ran.
    peers = {row["micro-batches"]: row for row in rows if row["method"] == "open_clip"}
    for row in rows:
        peer = peers.get(row["micro-batches"])
        both = peer is not None and row["samples/s"] and peer["samples/s"]
        row["speed / open_clip"] = row["samples/s"] / peer["samples/s"] if both else None
        row["memory / open_clip"] = row["peak MiB"] / peer["peak MiB"] if both else None

    notes = (
        f"{args.architecture}, batch {args.batch}, {args.precision}, mean of {args.steps} steps "
        "after a warm-up. Peak memory: allocated on CUDA, resident on a CPU, of the whole process."
    )
    report.publish("step", "Training step", rows, args, notes)


def in_own_process(args: argparse.Namespace, method: str, micro: int) -> dict[str, Any]:
    work = {"method": method, "micro": micro} | {
        k: getattr(args, k) for k in ("architecture", "batch", "precision", "steps", "captions")
    }
    done = subprocess.run(
        [sys.executable, __file__, "--worker", json.dumps(work)], capture_output=True, text=True
    )
    row: dict[str, Any] = {"method": method, "micro-batches": micro}
    if done.returncode:
        note = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1][:80]
        return row | dict.fromkeys(MEASURED) | {"note": note}
    row |= json.loads(done.stdout.strip().splitlines()[-1]) | {"note": None}
    print(report.table([row]).splitlines()[-1], file=sys.stderr)
    return row


def measure(work: SimpleNamespace) -> dict[str, Any]:
    """In the worker: build, warm up, measure."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = (open_clip_step if work.method.startswith("open_clip") else our_step)(work, device)
    run()
    start = time.perf_counter()
    for _ in range(work.steps):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    took = (time.perf_counter() - start) / work.steps
    peak = (
        torch.cuda.max_memory_allocated()
        if device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    rate = matmul_rate(device, torch.bfloat16 if work.precision == "bf16" else torch.float32, 768)
    flops = count_flops(work, device)
    row = {"samples/s": work.batch / took, "MFU": flops / took / rate, "peak MiB": peak / 2**20}
    return row | text_tower(work, device)


def text_tower(work: SimpleNamespace, device: Any) -> dict[str, Any]:
    """Seconds of a float32 forward and backward of our text tower alone, cut or padded, and the
    share of the tokens that passes it.
    """
    import torch

    from vlp.models.build import build

    if not work.method.startswith("vlp") or "compile" in work.method:
        return {"text s": None, "tokens": None}

    model = build(settings_of(work)).to(device)
    _, text = samples(work.batch, model, work.captions)
    took = []
    for _ in range(work.steps + 1):
        start = time.perf_counter()
        cut = model.cut(text.numpy(), device, len(text))
        model(text=text.to(device), cut=cut).text.sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        took.append(time.perf_counter() - start)

    n_tokens = text.numel() if cut is None else sum(n * length for n, length in cut.parts)
    return {"text s": sum(took[1:]) / work.steps, "tokens": n_tokens / text.numel()}


def settings_of(work: SimpleNamespace) -> Any:
    from vlp import config, schema

    tower = {"name": "open_clip", "architecture": work.architecture}
    section = {"image_tower": tower, "cut_captions": work.method != "vlp padded"}
    return schema.parse(config.Model, section)


def samples(rows: int, model: Any, captions: str | None) -> tuple[Any, Any]:
    """Random uint8 pixels of the model's size and token ids: random ones with one end-of-text, or
    of texts drawn from a file.
    """
    import random

    import torch

    size = model.visual.image_size
    size = (size, size) if isinstance(size, int) else tuple(size)
    text = torch.randint(1, 40000, (rows, 77))
    text[:, 20] = 49407
    if captions is not None:
        from vlp.data.text import build
        from vlp.types import TextSpec

        texts: list[str] = []
        for line in Path(captions).read_text(encoding="utf-8").splitlines():
            texts += json.loads(line)["captions"]
        text = build(TextSpec("clip", 77))(random.Random(0).choices(texts, k=rows))
    return torch.randint(0, 256, (rows, 3, *size), dtype=torch.uint8), text


def our_step(work: SimpleNamespace, device: Any) -> Any:
    import torch

    from vlp import config, engines, losses, plugin, schema
    from vlp.models.build import build
    from vlp.step import Training, train_step
    from vlp.types import Batch

    train = {
        "duration": 100,
        "batch": work.batch,
        "micro_batches": work.micro,
        "precision": work.precision,
    }
    train |= {
        "compile": "compile" in work.method,
        "activation_checkpointing": "checkpointing" in work.method,
    }
    options = schema.parse(config.Train, train)
    engine = engines.start(options)
    model = build(settings_of(work))
    image, text = samples(work.batch, model, work.captions)
    engine.prepare(model, options)
    training = Training(
        engine,
        losses.build(plugin.keyed("vlp.losses", {"infonce": {}})),
        lambda step: 1e-4,
        micro_batches=work.micro,
        dtype=engines.compute_dtype(options, device),
    )
    batch = Batch(image, text, torch.arange(work.batch), [str(i) for i in range(work.batch)])
    return lambda: train_step(training, batch)


def open_clip_step(work: SimpleNamespace, device: Any) -> Any:
    """One call of open_clip's train_one_epoch on a loader of `accum_freq` batches: one update."""
    import open_clip
    import torch
    from open_clip.loss import ClipLoss
    from open_clip_train.train import train_one_epoch

    model = open_clip.create_model(work.architecture, device=device, output_dict=True)
    if "checkpointing" in work.method:
        model.set_grad_checkpointing(True)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2
    )
    image, text = samples(work.batch, model, work.captions)
    pixels = image.float() / 255  # its transform normalises in the loader's workers
    size = work.batch // work.micro

    class Loader(list):
        num_batches, num_samples = work.micro, work.batch

    batches = Loader((pixels[i : i + size], text[i : i + size]) for i in range(0, work.batch, size))
    data = {"train": SimpleNamespace(dataloader=batches, set_epoch=lambda epoch: None)}
    args = SimpleNamespace(
        device=str(device),
        precision="amp_bf16" if work.precision == "bf16" else "fp32",
        distill=False,
        accum_freq=work.micro,
        skip_scheduler=True,
        horovod=False,
        grad_clip_norm=1.0,
        log_every_n_steps=10**9,
        batch_size=size,
        world_size=1,
        rank=0,
        local_rank=0,
        wandb=False,
        save_logs=False,
    )
    return lambda: train_one_epoch(model, data, ClipLoss(), 0, optimizer, None, None, None, args)


def count_flops(work: SimpleNamespace, device: Any) -> int:
    """One forward and backward of towers and loss over the batch, from a run of 2 rows scaled to
    it, plus the loss.
    """
    import open_clip
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    model = open_clip.create_model(work.architecture).to(device)
    image, text = samples(2, model, None)
    with FlopCounterMode(display=False) as counter:
        x, t, _ = model(image.float().to(device), text.to(device))[:3]
        (x.sum() + t.sum()).backward()
    width = x.shape[1]
    del model
    torch.cuda.empty_cache()
    return counter.get_total_flops() * work.batch // 2 + 6 * work.batch**2 * width


if __name__ == "__main__":
    main()
