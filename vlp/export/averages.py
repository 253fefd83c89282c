"""The options by which `vlp export` writes an average of weights, and what they ask for."""

from __future__ import annotations

import math
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # help answers without waiting for torch
    from vlp import averaging

_TOLERANCE = 1e-6  # of weights that are to add up to 1, as people round them


def arguments(parser: ArgumentParser) -> None:
    """Describe the options."""
    add = parser.add_argument
    average_help = "in place of RUN: the mean of these models' weights (a soup)"
    add("--average", nargs="+", metavar="A,B", help=average_help)
    weights_help = "of --average: one a model, adding up to 1 (default: equal)"
    add("--weights", metavar="W,W", help=weights_help)

    blend_help = "in place of RUN: (1 - alpha) A + alpha B (WiSE-FT)"
    add("--blend", nargs=2, metavar=("A", "B"), help=blend_help)
    add("--alpha", type=float, help="of --blend: the share of B (default 0.5)")

    ema_help = "the moving average of each run's weights (teacher.ema)"
    add("--ema", action="store_true", help=ema_help)


def asked_for(options: Namespace) -> averaging.Members | None:
    """The average that the options of `vlp export` ask for, or None for its plain RUNs; ValueError
    for options that do not go together.
    """
    from vlp import averaging

    ways = {"RUN": options.runs, "--average": options.average, "--blend": options.blend}
    taken = [way for way, names in ways.items() if names]
    if len(taken) != 1:
        raise ValueError(
            f"found {' and '.join(taken) or 'no model'}; expected one of {', '.join(ways)}"
        )
    if options.weights is not None and not options.average:
        raise ValueError("--weights belongs to --average; leave it out, or name models there")
    if options.alpha is not None and not options.blend:
        raise ValueError("--alpha belongs to --blend; leave it out, or give --blend A B")

    if options.runs:
        return None
    if options.average:
        members = soup(options.average, options.weights)
    else:
        members = averaging.blend(options.blend, 0.5 if options.alpha is None else options.alpha)
    return replace(members, references=runs(members.references, options.ema))


def runs(names: Sequence[str], ema: bool) -> list[str]:
    """The references, or with `ema` those of the moving averages of the runs that they name."""
    from vlp.pretrained.references import of_average

    return [of_average(name) for name in names] if ema else list(names)


def soup(names: Sequence[str], weights: str | None) -> averaging.Members:
    """The members of `--average A,B,… [--weights .5,.5]`; ValueError for weights that do not fit
    them.
    """
    from vlp import averaging

    references: list[str] = []
    for name in names:
        # A path may hold a comma.
        references += [name] if Path(name).exists() else [part for part in name.split(",") if part]
    if len(references) < 2:
        raise ValueError(f"--average names {references}; expected two models or more: A,B,…")

    if weights is None:
        return averaging.Members(references, [1 / len(references)] * len(references))

    numbers = averaging.fractions("--weights", weights)
    total = math.fsum(numbers)
    if len(numbers) != len(references) or abs(total - 1) > _TOLERANCE:
        raise ValueError(
            f"--weights is {weights}: {len(numbers)} numbers with the sum {total:.6g}; "
            f"expected {len(references)}, one a model, that add up to 1"
        )
    return averaging.Members(references, [number / total for number in numbers])
