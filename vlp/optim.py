"""AdamW with decay only where it belongs, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
import re

import torch
from torch import nn

from vlp.config import Optimizer, Plan

# Tables of vectors that are looked up or added, not multiplied: pulling them towards zero has no
# reason.
EMBEDDING = re.compile(
    r"(^|\.)(token_embedding|positional_embedding|class_embedding|cls_token|pos_embed|reg_token"
    r"|\w*embeddings)(\.|$)"
)


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies to a parameter.

    To matrices and kernels, never to gains, biases, embeddings, scale and bias.
    """
    return parameter.ndim >= 2 and not EMBEDDING.search(name)


def groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two parameter groups, with and without decay, of every trainable parameter exactly once.

    ValueError if there is none.
    """
    # By name and shape, so that a new parameter always falls into one of the two.
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (decayed if decays(name, parameter) else plain).append(parameter)
    if not (decayed or plain):
        raise ValueError("the model has no trainable parameter; unlock a tower or learn the scale")

    both = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return [group for group in both if group["params"]]


def build(model: nn.Module, options: Optimizer) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) over `groups`."""
    return torch.optim.AdamW(
        groups(model, options.weight_decay),
        lr=options.lr,
        betas=options.betas,
        eps=options.eps,
        fused=True,
    )


def warmup_steps(options: Optimizer, plan: Plan) -> int:
    """Updates of the warm-up. ValueError if the run ends before it: the rate never reached lr."""
    steps = plan.steps(options.warmup)
    if steps > plan.total:
        raise ValueError(
            f"train.optimizer.warmup is {steps:,} steps, but the run has {plan.total:,}: its rate "
            f"would end at {plan.total / steps:.2g} of lr; give train.optimizer.warmup=5%, or a "
            "longer train.duration"
        )
    return steps


def learning_rate(options: Optimizer, step: int, warmup: int, total: int) -> float:
    """Learning rate of update number `step` (from 0) out of `total`.

    Linear warm-up, then a cosine to f·lr with f = final_lr:

        lr·(step + 1)/warmup                      for step < warmup,
        lr·(f + (1 − f)·(1 + cos π·p)/2)          after it, p = (step − warmup)/(total − warmup).
    """
    # The first update learns already: 1/warmup, not 0.
    if step < warmup:
        return options.lr * (step + 1) / warmup

    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return options.lr * (options.final_lr + (1 - options.final_lr) * cosine)
