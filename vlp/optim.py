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
    r"(^|\.)(token_embedding|positional_embedding|class_embedding|cls_token|pos_embed|reg_token|\w*embeddings)(\.|$)"
)


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices and kernels, never to gains, biases, embeddings,
    scale and bias.
    """
    return parameter.ndim >= 2 and not EMBEDDING.search(name)


def groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two parameter groups that cover every trainable parameter of `model` exactly once, with and
    without decay.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError("the model has no trainable parameter; unlock a tower or learn the scale")
    split = {True: [], False: []}
    for name, parameter in named:
        split[decays(name, parameter)].append(parameter)
    return [
        {"params": split[on], "weight_decay": weight_decay if on else 0.0}
        for on in (True, False)
        if split[on]
    ]


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
    """Updates of the warm-up. ValueError if the run ends before it: the rate would never reach lr."""
    steps = plan.steps(options.warmup)
    if steps > plan.total:
        raise ValueError(
            f"train.optimizer.warmup is {steps:,} steps, but the run has {plan.total:,}: its rate would end at "
            f"{plan.total / steps:.2g} of lr; give train.optimizer.warmup=5%, or a longer train.duration"
        )
    return steps


def learning_rate(options: Optimizer, step: int, warmup: int, total: int) -> float:
    """Learning rate of update number `step` (from 0) out of `total`: linear warm-up, then a cosine
    to final_lr·lr.

    lr·(step + 1)/warmup for step < warmup; else lr·(f + (1 − f)·(1 + cos π·p)/2), p = (step −
    warmup)/(total − warmup).
    """
    if step < warmup:
        return options.lr * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return options.lr * (
        options.final_lr + (1 - options.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))
    )
