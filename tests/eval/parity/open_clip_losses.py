"""open_clip's losses, with the gradients of all that they learn from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from open_clip import loss as peer
from torch import Tensor

from tests.eval.parity.compare import Figures
from vlp import losses

PEER = "open_clip_torch"
ROWS, WIDTH, TOKENS, WORDS = 13, 7, 9, 11

# name -> the spread of the rows around one direction, and the scale
CASES = {
    "rows spread out, scale 14": (1.0, 14.3),
    "rows close together, scale 100": (0.1, 100.0),
}
Leaves = dict[str, Tensor]
Loss = Callable[[Leaves], Tensor]


def _rows(seed: int, spread: float) -> Tensor:
    """[n, D] float64 unit rows around a direction."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(99))
    noise = torch.randn(ROWS, WIDTH, generator=generator)
    return torch.nn.functional.normalize((centre + spread * noise).double(), dim=1)


def _leaves(case: str) -> Leaves:
    """Embeddings of student and teacher, scale, bias, and a decoder's logits of captions."""
    spread, scale = CASES[case]
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(1, WORDS, (ROWS, TOKENS), generator=generator)
    # Captions of every length, down to a single word before the padding.
    for row in range(ROWS):
        ids[row, 1 + row % TOKENS :] = 0
    leaves = {
        "image": _rows(1, spread),
        "text": _rows(2, spread),
        "scale": torch.tensor(scale, dtype=torch.float64),
        "bias": torch.tensor(-10.0, dtype=torch.float64),
        "logits": torch.randn(ROWS, TOKENS, WORDS, generator=generator, dtype=torch.float64),
    }
    constant = {
        "teacher_image": _rows(3, spread),
        "teacher_text": _rows(4, spread),
        "ids": ids,
    }
    return {name: leaf.requires_grad_() for name, leaf in leaves.items()} | constant


# loss -> the leaves whose gradients are compared
LEARNED = {
    "ClipLoss": ("image", "text", "scale"),
    "SigLipLoss": ("image", "text", "scale", "bias"),
    "CoCaLoss": ("image", "logits"),
    "DistillClipLoss": ("image", "text", "scale"),
}


def _of(named: Mapping[str, Loss]) -> Figures:
    """Values and gradients of every loss in every case."""
    figures: Figures = {}
    for name, loss in named.items():
        for case in CASES:
            leaves = _leaves(case)
            value = loss(leaves)
            figures[f"{name}, {case}"] = value
            learned = [leaves[leaf] for leaf in LEARNED[name]]
            gradients = torch.autograd.grad(value, learned)
            for leaf, gradient in zip(LEARNED[name], gradients):
                figures[f"{name}, {case}, gradient of {leaf}"] = gradient
    return figures


# --- theirs ---------------------------------------------------------------------------------------


def theirs(root: Path) -> Figures:
    """By open_clip's modules."""
    clip, siglip = peer.ClipLoss(), peer.SigLipLoss()
    coca = peer.CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0)
    distill = peer.DistillClipLoss()

    def both(x: Leaves) -> Tensor:
        return sum(coca(x["image"], x["text"], x["logits"], x["ids"], x["scale"]))

    def distillation(x: Leaves) -> Tensor:
        teacher = (x["teacher_image"], x["teacher_text"], torch.tensor(20.0).double())
        return distill(x["image"], x["text"], x["scale"], *teacher)[1]

    return _of(
        {
            "ClipLoss": lambda x: clip(x["image"], x["text"], x["scale"]),
            "SigLipLoss": lambda x: siglip(x["image"], x["text"], x["scale"], x["bias"]),
            "CoCaLoss": both,
            "DistillClipLoss": distillation,
        }
    )


# --- ours -----------------------------------------------------------------------------------------


def ours(root: Path) -> Figures:
    """By our objectives."""
    coca = {"infonce": {}, "captioning": {"weight": 2.0}}
    return _of(
        {
            "ClipLoss": partial(_total, {"infonce": {}}),
            "SigLipLoss": partial(_total, {"siglip": {}}),
            "CoCaLoss": partial(_total, coca),
            "DistillClipLoss": partial(_total, {"distill": {"form": "similarity"}}),
        }
    )


def _total(objective: dict[str, Any], x: Leaves) -> Tensor:
    """The objective's value on all that the leaves hold."""
    total, _ = losses.build(objective)(
        image=x["image"],
        text=x["text"],
        scale=x["scale"],
        bias=x["bias"],
        caption_logits=x["logits"],
        caption_ids=x["ids"],
        teacher_image=x["teacher_image"],
        teacher_text=x["teacher_text"],
        teacher_scale=20.0,
    )
    return total
