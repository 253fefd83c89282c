"""Time and memory of every objective over pairs, forward and backward, at growing batches.

    python tests/benchmarks/terms.py --batch 2048 8192 --dim 256

One process a measurement, as in loss.py. Extra memory is the peak above what stood before the call:
embeddings, queues and whatever else the term reads. `growth` is its ratio to the row above: at a
fourfold batch 4 is O(B·D), less where tiles of a fixed size weigh, and 16 would be a stored matrix.
`time / infonce` is against the row of infonce at the same batch, where this call measures it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from tests.benchmarks import report
from tests.benchmarks.loss import peak_memory, seconds

# Objectives whose rows meet the rows of others, with options where the defaults would not show the
# point.
TERMS: dict[str, dict[str, Any]] = {
    "infonce": {"label_smoothing": 0.1},
    "infonce.positives": {"positives": "label"},
    "infonce.decoupled": {"positives": "label", "form": "decoupled"},
    "infonce.masks": {"ignore": {"margin": 0.1, "teacher": {"above": 0.9}}, "hardest": 8},
    "infonce.within": {"within": "both"},
    "siglip": {},
    "siglip.positives": {"positives": "label"},
    "decoupled": {"weighted": True},
    "hn_nce": {},
    "cwcl": {},
    "macl": {},
    "cyclip": {},
    "uniformity": {},
    "cross_uniformity": {},
    "decoupled_uniformity": {},
    "koleo": {},
    "cacr": {},
    "kernel_mixture": {},
    "mixup": {},
    "distill": {},
    "ranked": {},
    "sogclr": {},
    "isogclr": {},
    "fastclip": {},
    "mann_whitney": {},
    "momentum_queue": {},
    "mixing": {"hardest": 64, "mixed_pairs": 64, "mixed_queries": 16},
    "multi_view": {},
    "slip": {},
    "mv_infonce": {},
    "mv_dhel": {},
    "poly_view": {},
    "barlow": {"views": True},
    "swap": {},
    "gram": {"label_smoothing": 0.1},
    "symile": {},
    "modality_pairs": {},
    "translation": {},
    "mc_infonce": {},
    "hard_negatives.negclip": {"form": "negclip"},
    "hard_negatives.negclip_images": {"form": "negclip", "negatives": "images"},
    "hard_negatives.triplet": {"form": "triplet"},
    "hard_negatives.intra": {"form": "intra"},
    "captions.mean": {"label_smoothing": 0.1, "short": {"components": 32}},
    "captions.decoupled": {"form": "decoupled"},
    "fsc": {},
    "filip": {},
    "filip.keep": {"keep": 0.25},
    "mil": {},
    "prior": {},
    "matryoshka": {},
}
# Terms of which each row stands alone: they hold what they are given, and nothing of B².
ALONE = ("alignment", "captioning", "counting", "self_distillation", "siam")
PLACES = 8  # patches of a picture, and tokens of a text
# What the term has a gradient for, beside the pair.
LEAVES = (
    "image_views", "text_views", "negatives", "negative_images", "captions", "image_tokens",
    "text_tokens", "negative_tokens", "attended_captions", "patch_distances", "others",
    "image_concentration", "text_concentration", "translated", "cycled",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--terms", nargs="+", default=list(TERMS), choices=TERMS)
    parser.add_argument("--device", default=None)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--timeout-s", type=float, default=600)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    report.add_arguments(parser)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(**json.loads(args.worker))))
        return

    rows: list[dict[str, Any]] = []
    times: dict[int, float | None] = {}  # of infonce, by batch
    for term in args.terms:
        smaller = None
        for batch in args.batch:
            row = in_own_process(args, term, batch)
            if term == "infonce":
                times[batch] = row["ms"]
            row["time / infonce"] = ratio(row["ms"], times.get(batch))
            row["growth"] = ratio(row["extra MiB"], smaller)
            smaller = row["extra MiB"]
            rows.append(row)

    notes = (
        "Extra memory: peak above the inputs; one matrix: B² float32 scores, which no term stores. "
        "growth: extra memory against the batch above. Queues hold B keys, views are 2, hard "
        "captions, true ones and further modalities 2 a sample, patches and tokens 8; filip and "
        "mil hold n² scores, which is the B of a group or of a rank; mixing mixes 80 a row, "
        "mc_infonce draws 16; mann_whitney makes all n³ comparisons up to 1,024 candidates and "
        "interpolates above."
    )
    report.publish("terms", "Objectives over pairs, forward and backward", rows, args, notes)


def ratio(value: float | None, of: float | None) -> float | None:
    """None where one of them was not measured, or the other is 0."""
    return value / of if value is not None and of else None


def in_own_process(args: argparse.Namespace, term: str, batch: int) -> dict[str, Any]:
    work = {"term": term, "B": batch, "D": args.dim, "device": args.device, "repeats": args.repeats}
    command = [sys.executable, __file__, "--worker", json.dumps(work)]
    row: dict[str, Any] = {"term": term, "B": batch, "D": args.dim}
    empty = dict.fromkeys(("ms", "extra MiB"))

    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=args.timeout_s)
    except subprocess.TimeoutExpired:
        row, note = row | empty, f"over {args.timeout_s:.0f} s"
    else:
        if done.returncode == 0:
            row, note = row | json.loads(done.stdout.strip().splitlines()[-1]), None
        else:
            errors = done.stderr.strip().splitlines() or [f"exit {done.returncode}"]
            row, note = row | empty, errors[-1][:80]

    row |= {
        "embeddings MiB": 2 * batch * args.dim * 4 / 2**20,
        "one matrix MiB": batch**2 * 4 / 2**20,
        "note": note,
    }
    print(report.table([row]).splitlines()[-1], file=sys.stderr)
    return row


def measure(term: str, B: int, D: int, device: str | None, repeats: int) -> dict[str, Any]:
    """In the worker: build the inputs, warm up on a part of them, measure peak and times."""
    import torch

    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    run_on(term, 256, D, device)()  # imports, kernels, thread pools
    run = run_on(term, B, D, device)
    extra = peak_memory(run, device)
    return {
        "ms": statistics.median(seconds(run, device) for _ in range(repeats)) * 1e3,
        "extra MiB": extra / 2**20,
    }


def run_on(term: str, B: int, D: int, device: Any) -> Callable[[], None]:
    """One forward and backward of the term on B random pairs."""
    import torch

    from vlp.losses import build

    def rows(*shape: int) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.randn(*shape, D, device=device), dim=-1)

    torch.manual_seed(0)
    leaves = {
        "image": rows(B),
        "text": rows(B),
        "scale": torch.tensor(14.0),
        "bias": torch.tensor(-10.0),
    }
    objective = build({term.partition(".")[0]: TERMS[term]}, samples=B)
    others = {
        "teacher_image": lambda: rows(B),
        "teacher_text": lambda: rows(B),
        "ema_image": lambda: rows(B),
        "ema_text": lambda: rows(B),
        "queue_image": lambda: rows(B),
        "queue_text": lambda: rows(B),
        "image_views": lambda: rows(2, B),
        "text_views": lambda: rows(2, B),
        "others": lambda: rows(2, B),
        "translated": lambda: rows(6, B),
        "cycled": lambda: rows(6, B),
        "negatives": lambda: rows(B, 2),
        "negative_images": lambda: rows(B, 1),
        "negative_images_valid": lambda: torch.ones(B, 1, dtype=torch.bool, device=device),
        "negatives_valid": lambda: torch.ones(B, 2, dtype=torch.bool, device=device),
        "captions": lambda: rows(B, 2),
        "captions_valid": lambda: torch.ones(B, 2, dtype=torch.bool, device=device),
        "image_tokens": lambda: rows(B, PLACES),
        "text_tokens": lambda: rows(B, PLACES),
        "text_tokens_valid": lambda: torch.ones(B, PLACES, dtype=torch.bool, device=device),
        "negative_tokens": lambda: rows(B, 2, PLACES),
        "negative_tokens_valid": lambda: torch.ones(B, 2, PLACES, dtype=torch.bool, device=device),
        "attended_captions": lambda: rows(B, 2),
        "patch_distances": lambda: torch.rand(B, device=device),
        "image_concentration": lambda: 20 + torch.rand(B, device=device),
        "text_concentration": lambda: 20 + torch.rand(B, device=device),
        "teacher_scale": lambda: 20.0,
        "score": lambda: torch.rand(B, device=device),
        "sample_id": lambda: torch.arange(B, device=device),
        "label": lambda: torch.arange(B, device=device) // 4,
    }
    given = {name: make() for name, make in others.items() if name in objective.reads}
    leaves = {name: value.to(device).requires_grad_() for name, value in leaves.items()}
    leaves |= {n: given.pop(n).requires_grad_() for n in LEAVES if n in given}

    def run() -> None:
        for leaf in leaves.values():
            leaf.grad = None
        objective(**leaves, **given, step=0)[0].backward()

    return run


if __name__ == "__main__":
    main()
