"""What an objective may read, in one table: shape, dtype and kind of rows of every keyword.

The letters of the shapes are those of `vlp.types`; in one call each of them stands for one number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Annotated, Any, Literal, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)
DTYPES = {
    "floats": (torch.float64, torch.float32, *HALF),
    "bool": (torch.bool,),
    "int64": (torch.int64,),
}
CONVERSION = {"floats": ".float()", "bool": ".bool()", "int64": ".long()"}
TOLERANCE = (
    0.01  # of a unit row's norm: rows that were normalised in bfloat16 are off by up to .004
)


@dataclass(frozen=True)
class Form:
    """What a keyword looks like. `shapes` are alternatives of different length; "" is a number."""

    shapes: tuple[str, ...]
    dtype: Literal["floats", "bool", "int64"] = "floats"
    unit: bool = False  # the last dimension holds unit rows
    valid: str = (
        ""  # the mask that says which rows take part; the others have no influence, be they NaN
    )
    zeros: bool = False  # rows of zeros are allowed among unit rows


def unit(*shapes: str, valid: str = "", zeros: bool = False) -> Form:
    return Form(shapes, unit=True, valid=valid, zeros=zeros)


def floats(shape: str) -> Form:
    return Form((shape,))


def mask(shape: str) -> Form:
    return Form((shape,), "bool")


def ids(shape: str) -> Form:
    return Form((shape,), "int64")


NUMBER = floats("")


# What a term does not need may be None. Terms read a keyword as a tensor all the same: a call
# without what `NEEDS` names is refused before the first of them runs, and numbers become tensors.
ABSENT: Any = None


@dataclass(frozen=True)
class Inputs:
    """What terms may read: this rank's rows of one step.

    Terms find embeddings as unit rows, and rows that take no part as zeros.
    """

    image: Annotated[Tensor, unit("b D")]
    text: Annotated[Tensor, unit("b D")]
    scale: Annotated[Tensor, NUMBER]  # 1/temperature, already exponentiated
    bias: Annotated[Tensor, NUMBER] = ABSENT  # added to every score (sigmoid loss)
    step: int | None = None  # optimiser step: groups that alternate, schedules, states
    # hard captions, and an image that belongs to negatives[:, 0]
    negatives: Annotated[Tensor, unit("b K D", valid="negatives_valid")] = ABSENT
    negatives_valid: Annotated[Tensor, mask("b K")] = ABSENT
    negative_image: Annotated[Tensor, unit("b D", valid="negatives_valid")] = ABSENT
    # the caption with another number, of the samples that count
    counterfactual: Annotated[Tensor, unit("b D", "b C D", valid="counterfactual_valid")] = ABSENT
    counterfactual_valid: Annotated[Tensor, mask("b")] = ABSENT
    # this model's moving average
    ema_image: Annotated[Tensor, unit("b D")] = ABSENT
    ema_text: Annotated[Tensor, unit("b D")] = ABSENT
    ema_negatives: Annotated[Tensor, unit("b K D", valid="negatives_valid")] = ABSENT
    # another model
    teacher_image: Annotated[Tensor, unit("b D'")] = ABSENT
    teacher_text: Annotated[Tensor, unit("b D'")] = ABSENT
    teacher_scale: Annotated[Tensor, NUMBER] = ABSENT
    sample_id: Annotated[Tensor, ids("b")] = ABSENT
    score: Annotated[Tensor, floats("b")] = ABSENT  # relevance of a pair, >= 0
    # further augmentations, from a projection of their own; view_scale: 1/temperature between
    # them, None: scale
    image_views: Annotated[Tensor, unit("V b D")] = ABSENT
    text_views: Annotated[Tensor, unit("V b D")] = ABSENT
    view_scale: Annotated[Tensor, NUMBER] = ABSENT
    # keys of earlier steps, equal on all ranks; rows of zeros, or with NaN or infinity, hold no key
    queue_image: Annotated[Tensor, unit("Q D", zeros=True)] = ABSENT
    queue_text: Annotated[Tensor, unit("Q D", zeros=True)] = ABSENT
    # a teacher's score of each hard caption: higher fits the image better
    teacher_scores: Annotated[Tensor, floats("b K")] = ABSENT
    # logits at position l are for the token caption_ids[:, l]; caption_nll is −log p of each
    # token, instead of caption_logits, which are Z times larger
    caption_logits: Annotated[Tensor, floats("b L Z")] = ABSENT
    caption_ids: Annotated[Tensor, ids("b L")] = ABSENT
    caption_nll: Annotated[Tensor, floats("b L")] = ABSENT
    # an auxiliary head on the image tower; a teacher's weights of the concepts, >= 0, a row of
    # zeros having none
    concept_logits: Annotated[Tensor, floats("b M")] = ABSENT
    concept_targets: Annotated[Tensor, floats("b M")] = ABSENT

    def wide(self) -> Inputs:
        """The same with half-precision tensors as float32: for scores that a term computes itself.

        At a scale of 100 a product rounded to bfloat16 is off by a quarter. (The reductions of
        `vlp.pairwise` accumulate in float32.) Not caption_logits, by far the largest: their term
        widens them itself.
        """
        half = {name for name, value in self.tensors().items() if value.dtype in HALF} - {
            "caption_logits"
        }
        return self._changed(lambda name, value: value.float() if name in half else value)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor that is no number."""
        return {name: tuple(value.shape) for name, value in self.tensors().items() if value.dim()}

    def tensors(self) -> dict[str, Tensor]:
        values = {name: getattr(self, name) for name in FORMS}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def prepared(self, normalize: bool) -> Inputs:
        """As terms read them: numbers 0-d, rows that take no part zeros, rows unit if `normalize`."""

        def prepare(name: str, value: Tensor) -> Tensor:
            form = FORMS[name]
            if form == NUMBER:
                return value.reshape(())
            taking_part = self._taking_part(name, value)
            if taking_part is not None:  # an infinite value times a weight of 0 would be NaN
                value = torch.where(taking_part.unsqueeze(-1), value, 0)
            if normalize and form.unit:
                value = F.normalize(value.float() if value.dtype in HALF else value, dim=-1).to(
                    value.dtype
                )
            return value

        return self._changed(prepare)

    def problems(self) -> list[str]:
        """A line for every keyword whose shape, dtype or device is not the table's. No host sync."""
        bound: dict[
            str, tuple[int, str]
        ] = {}  # letter -> its number, and the keyword that it comes from
        device = getattr(self.image, "device", None)
        found = []
        if not isinstance(self.step, Integral | None):
            found.append(f"step: found {type(self.step).__name__}, expected a whole number")
        for name, form in FORMS.items():
            value = getattr(self, name)
            if value is None or (form == NUMBER and isinstance(value, Real)):
                continue
            if not isinstance(value, Tensor):
                found.append(f"{name}: found {type(value).__name__}, expected {_written(form)}")
                continue
            found += _shape_problem(name, form, value, bound) or _dtype_problem(name, form, value)
            if value.dim() and device not in (value.device, None):
                found.append(f"{name}: found on {value.device}, expected {device}, where image is")
        return found

    def unit_problems(self, normalize: bool) -> list[str]:
        """A line for every keyword with finite rows that are not unit (`normalize`: that are
        zeros).

        Reads the norms: a host sync on a GPU.
        """
        found = []
        for name, value in self.tensors().items():
            form = FORMS[name]
            if not form.unit:
                continue
            norms = _norms(value.detach())
            wrong = (norms == 0) if normalize else (norms - 1).abs() > TOLERANCE
            wrong &= norms.isfinite()  # NaN and infinity show in the value
            if form.zeros:
                wrong &= norms != 0
            taking_part = self._taking_part(name, value)
            if taking_part is not None:
                wrong &= taking_part
            if wrong.any():
                row = wrong.nonzero()[0].tolist()
                found.append(
                    f"{name}: row {', '.join(map(str, row))} has norm "
                    f"{norms[tuple(row)].item():.4g}, expected unit rows; divide rows by their norm "
                    "(torch.nn.functional.normalize), or build(…, normalize=True)"
                )
        return found

    def _taking_part(self, name: str, value: Tensor) -> Tensor | None:
        """Which rows of a keyword take part, bool, of its shape but the last dimension; None: all.

        A mask [b, K] serves one row a sample by its first column, a mask [b] all rows of a sample.
        """
        valid = getattr(self, FORMS[name].valid) if FORMS[name].valid else None
        if valid is None:
            return None
        if valid.dim() == value.dim():
            valid = valid[:, 0]
        return (
            valid if valid.dim() == value.dim() - 1 else valid.unsqueeze(1).expand(value.shape[:-1])
        )

    def _changed(self, change: Callable[[str, Tensor], Tensor]) -> Inputs:
        changed: dict[str, Any] = {
            name: change(name, value) for name, value in self.tensors().items()
        }
        return replace(self, **changed)


_HINTS = get_type_hints(Inputs, include_extras=True)
FORMS: dict[str, Form] = {
    name: hint.__metadata__[0] for name, hint in _HINTS.items() if hasattr(hint, "__metadata__")
}
KEYWORDS = tuple(f.name for f in fields(Inputs))


def _shape_problem(
    name: str, form: Form, value: Tensor, bound: dict[str, tuple[int, str]]
) -> list[str]:
    """A line, or nothing; then the letters of `name` are bound."""
    found = f"{name}: found {list(value.shape)}, expected {_written(form)}"
    if form == NUMBER:
        return [] if value.shape in ((), (1,)) else [found]

    shape = next((shape for shape in form.shapes if len(shape.split()) == value.dim()), None)
    if shape is None:
        return [found]
    if 0 in value.shape:
        return [f"{found}, each at least 1: pad with a row that its mask leaves out"]
    sizes = dict(zip(shape.split(), value.shape))
    others = {
        letter: bound[letter]
        for letter in sizes
        if letter in bound and bound[letter][0] != sizes[letter]
    }
    if others:
        reasons = ", ".join(
            f"{letter} is {size} in {source}" for letter, (size, source) in others.items()
        )
        return [f"{name}: found {list(value.shape)}, expected {_bracketed(shape)}, and {reasons}"]

    for letter, size in sizes.items():
        bound.setdefault(letter, (size, name))
    return []


def _dtype_problem(name: str, form: Form, value: Tensor) -> list[str]:
    if value.dtype in DTYPES[form.dtype]:
        return []
    given = str(value.dtype).removeprefix("torch.")
    return [
        f"{name}: found {given}, expected {form.dtype}; convert with {name}{CONVERSION[form.dtype]}"
    ]


def _written(form: Form) -> str:
    if form == NUMBER:
        return "a number, or a tensor of one"
    return f"a tensor {' or '.join(_bracketed(shape) for shape in form.shapes)}"


def _bracketed(shape: str) -> str:
    return f"[{', '.join(shape.split())}]"


def _norms(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(
        rows, dim=-1, dtype=torch.float32 if rows.dtype in HALF else rows.dtype
    )
