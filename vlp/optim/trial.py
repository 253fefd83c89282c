"""What an optimiser is, found by trying it on a few numbers: which engines it can run under follows
from that, whatever timm's version and the options are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlp.config import Optimizer
from vlp.optim.build import create

# Large enough that second moments are factored (Adafactor: from 32 and 128).
ROWS, COLUMNS = 136, 132
STEPS = 3
TOLERANCE = 1e-9


@dataclass(frozen=True)
class Kind:
    """What decides under which engines an optimiser runs."""

    # the update of a number depends on the gradients of that number alone, so that tensors may be
    # cut anywhere
    elementwise: bool
    counters: frozenset[str]  # keys of its groups that change with its steps


def trial(options: Optimizer) -> Kind:
    """Try an optimiser on a few small tensors, whole and cut; ValueError for options that it does
    not run with.
    """
    try:
        whole, counters = _run(options, cut=False)
        cut, _ = _run(options, cut=True)
    except Exception as error:  # whatever the optimiser makes of its options
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"train.optimizer: {options.name} does not run with options {options.options}: {reason}"
        ) from None

    distance = (whole - cut).norm() / (whole - _start()).norm()
    return Kind(bool(distance < TOLERANCE), counters)


def _start() -> Tensor:
    """The values of a large matrix, a small one and a vector, one behind the other."""
    generator = torch.Generator().manual_seed(0)
    n_values = 2 * ROWS * COLUMNS + COLUMNS
    values = torch.randn(n_values, generator=generator, dtype=torch.float64)

    # Ratios of norms are clipped for large weights, not for small ones.
    values[ROWS * COLUMNS : 2 * ROWS * COLUMNS] *= 1e-3
    return values


def _run(options: Optimizer, cut: bool) -> tuple[Tensor, frozenset[str]]:
    """The values after a few steps on whole tensors, or on two flat halves, and the keys of groups
    that changed.
    """
    start = _start()
    whole = list(start.split([ROWS * COLUMNS, ROWS * COLUMNS, COLUMNS]))
    shapes = [(ROWS, COLUMNS), (ROWS, COLUMNS), (COLUMNS,)]
    tensors = [values.reshape(shape) for values, shape in zip(whole, shapes)]
    if cut:
        # As ranks hold them: not at the borders of rows or tensors.
        tensors = list(start.split(len(start) // 2 - 7))

    parameters = [tensor.clone().requires_grad_() for tensor in tensors]
    group = {"params": parameters, "weight_decay": 0.1, "lr_factor": 1.0}
    optimizer = create([group], options)
    before = _numbers(optimizer)

    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        current = torch.cat([parameter.detach().flatten() for parameter in parameters])
        gradient = _gradient(current, generator)
        for parameter, values in zip(parameters, gradient.split([p.numel() for p in parameters])):
            parameter.grad = values.reshape(parameter.shape).clone()
        optimizer.step()

    after = _numbers(optimizer)
    changed = {key for key, value in after.items() if before.get(key) != value}
    values = torch.cat([parameter.detach().flatten() for parameter in parameters])
    return values, frozenset(changed)


def _gradient(values: Tensor, generator: torch.Generator) -> Tensor:
    """A gradient that is orthogonal to every row of the matrices: projections (AdamP) then act."""
    gradient = torch.randn(values.shape, generator=generator, dtype=values.dtype)
    n_in_matrices = 2 * ROWS * COLUMNS
    rows = values[:n_in_matrices].reshape(-1, COLUMNS)
    of_rows = gradient[:n_in_matrices].reshape(-1, COLUMNS)
    along = (of_rows * rows).sum(1, keepdim=True) / rows.square().sum(1, keepdim=True)
    return torch.cat([(of_rows - along * rows).flatten(), gradient[n_in_matrices:]])


def _numbers(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The numbers of the first group, tensors of one among them."""
    numbers = {}
    for key, value in optimizer.param_groups[0].items():
        if isinstance(value, Tensor) and value.numel() == 1:
            numbers[key] = value.item()
        elif isinstance(value, (int, float)):
            numbers[key] = value
    return numbers
