"""The inputs of an objective: every field of the table, checked and prepared for the terms.

Shape, dtype and mask of every keyword stand in `vlp.fields`. In one call each letter of the shapes
stands for one number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlp.fields import FIELDS, Field, Readable
from vlp.pairwise import is_narrow

HALF = (torch.bfloat16, torch.float16)
DTYPES = {
    "floats": (torch.float64, torch.float32, *HALF),
    "bool": (torch.bool,),
    "int64": (torch.int64,),
    "uint8": (torch.uint8,),
}
CONVERSION = {"floats": ".float()", "bool": ".bool()", "int64": ".long()", "uint8": ".byte()"}
# Of a unit row's norm: rows that were normalised in bfloat16 are off by up to .004.
TOLERANCE = 0.01


@dataclass(frozen=True)
class _Binding:
    """The number that a letter stands for in this call, and the keyword that said so first."""

    size: int
    keyword: str


@dataclass(frozen=True)
class Inputs(Readable):
    """The inputs of every term: this rank's rows of one step.

    Terms find embeddings as unit rows, and rows that take no part as zeros.
    """

    step: int | None = None  # optimiser step: groups that alternate, schedules, states
    other_names: tuple[str, ...] | None = None  # of the modalities of `others`, in their order
    # from which modality to which those of `translated` lead, in their order
    translations: tuple[tuple[str, str], ...] | None = None

    def wide(self) -> Inputs:
        """The same with half-precision tensors as float32: for scores that a term computes itself.

        At a scale of 100 a product rounded to bfloat16 is off by a quarter. (The reductions of
        `vlp.pairwise` accumulate in float32.) Not caption_logits, by far the largest: their term
        widens them itself.
        """

        def widen(name: str, value: Tensor) -> Tensor:
            narrow = value.dtype in HALF and name != "caption_logits"
            return value.float() if narrow else value

        return self._changed(widen)

    def operands(self) -> Inputs:
        """The same as products of pairs take them: as they are where those are fast, else wide.

        A half-precision gradient that several reductions add to is then rounded once.
        """
        return self if is_narrow(self.image) else self.wide()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor that is no number."""
        return {name: tuple(value.shape) for name, value in self.tensors().items() if value.dim()}

    def tensors(self) -> dict[str, Tensor]:
        """The keywords that hold tensors."""
        values = {name: getattr(self, name) for name in FIELDS}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def prepared(self, normalize: bool) -> Inputs:
        """As terms read them: numbers 0-d, rows that take no part zeros, unit if `normalize`."""

        def prepare(name: str, value: Tensor) -> Tensor:
            if FIELDS[name].is_number:
                return value.reshape(()) if value.numel() == 1 else value

            # Selected, not multiplied: an infinite value times a weight of 0 would be NaN.
            taking_part = self._taking_part(name, value)
            if taking_part is not None:
                value = torch.where(taking_part.unsqueeze(-1), value, 0)

            if normalize and FIELDS[name].unit:
                wide = value.float() if value.dtype in HALF else value
                value = F.normalize(wide, dim=-1).to(value.dtype)
            return value

        return self._changed(prepare)

    def problems(self) -> list[str]:
        """A line for every keyword whose shape, dtype or device is wrong. No host sync."""
        bound: dict[str, _Binding] = {}  # by letter
        lines = []

        if not isinstance(self.step, Integral | None):
            lines.append(f"step: found {type(self.step).__name__}, expected a whole number")

        names = self.other_names
        if names is not None and self.others is not None and len(names) != len(self.others):
            lines.append(
                f"other_names: found {', '.join(names)}, expected one for each of the "
                f"{len(self.others)} modalities of others"
            )

        # Rows are found by name: of two with one name the first would be lost.
        if names is not None and len({"image", "text", *names}) < 2 + len(names):
            lines.append(
                f"other_names: found {', '.join(names)}, expected different names, none of them "
                "image or text"
            )

        directions, translated = self.translations, self.translated
        n_directions = None if directions is None else len(directions)
        if translated is not None and n_directions not in (None, len(translated)):
            lines.append(
                f"translations: found {n_directions}, expected one for each of the "
                f"{len(translated)} of translated"
            )

        for name, field in FIELDS.items():
            value = getattr(self, name)
            if value is None or (field.is_number and isinstance(value, Real)):
                continue

            if not isinstance(value, Tensor):
                lines.append(f"{name}: found {type(value).__name__}, expected {_written(field)}")
                continue

            lines += _shape_problem(name, value, bound) or _dtype_problem(name, value)
            lines += self._device_problem(name, value)
        return lines

    def unit_problems(self, normalize: bool) -> list[str]:
        """A line for every keyword with finite rows that are not unit (`normalize`: that are
        zeros).

        Reads the norms: a host sync on a GPU.
        """
        lines = []
        for name, value in self.tensors().items():
            if not FIELDS[name].unit:
                continue

            norms = _norms(value.detach())
            wrong = self._not_unit(name, value, norms, normalize)
            if wrong.any():
                first = tuple(wrong.nonzero()[0].tolist())
                lines.append(
                    f"{name}: row {', '.join(map(str, first))} has norm {norms[first].item():.4g}, "
                    "expected unit rows; divide rows by their norm "
                    "(torch.nn.functional.normalize), or build(…, normalize=True)"
                )
        return lines

    def _not_unit(self, name: str, value: Tensor, norms: Tensor, normalize: bool) -> Tensor:
        """Which rows are wrong, bool, of the shape of their norms."""
        wrong = norms == 0 if normalize else (norms - 1).abs() > TOLERANCE
        wrong &= norms.isfinite()  # NaN and infinity show in the value
        if FIELDS[name].zeros:
            wrong &= norms != 0

        taking_part = self._taking_part(name, value)
        if taking_part is not None:
            wrong &= taking_part
        return wrong

    def _taking_part(self, name: str, value: Tensor) -> Tensor | None:
        """Which rows take part, bool, of the keyword's shape but the last dimension; None: all.

        A mask [b, K] serves one row a sample by its first column, a mask [b] all rows of a sample.
        """
        mask_name = FIELDS[name].valid
        valid = getattr(self, mask_name) if mask_name else None
        if valid is None:
            return None

        if valid.dim() == value.dim():
            valid = valid[:, 0]
        if valid.dim() == value.dim() - 1:
            return valid
        return valid.unsqueeze(1).expand(value.shape[:-1])

    def _device_problem(self, name: str, value: Tensor) -> list[str]:
        device = getattr(self.image, "device", None)
        if not value.dim() or device in (value.device, None):
            return []
        return [f"{name}: found on {value.device}, expected {device}, where image is"]

    def _changed(self, change: Callable[[str, Tensor], Tensor]) -> Inputs:
        # Absent keywords and plain numbers stay as they are.
        changed: dict[str, Any] = {
            name: change(name, value) for name, value in self.tensors().items()
        }
        return replace(self, **changed)


KEYWORDS = tuple(field.name for field in fields(Inputs))


def _shape_problem(name: str, value: Tensor, bound: dict[str, _Binding]) -> list[str]:
    """A line, or nothing; then the letters of `name` are bound."""
    field = FIELDS[name]
    line = f"{name}: found {list(value.shape)}, expected {_written(field)}"
    if field.is_number:
        # [1]: models keep scale and bias as parameters of one element.
        one_for_each = [(bound[letter].size,) for letter in field.shapes if letter in bound]
        return [] if value.shape in ((), (1,), *one_for_each) else [line]

    # Alternatives differ in their number of dimensions.
    shape = next((shape for shape in field.shapes if len(shape.split()) == value.dim()), None)
    if shape is None:
        return [line]
    if 0 in value.shape:
        return [f"{line}, each at least 1: pad with a row that its mask leaves out"]

    # A number stands for itself; a letter may have got another size from another keyword.
    sizes = dict(zip(shape.split(), value.shape))
    if any(letter.isdigit() and int(letter) != size for letter, size in sizes.items()):
        return [line]
    clashes = {
        letter: bound[letter]
        for letter, size in sizes.items()
        if letter in bound and bound[letter].size != size
    }
    if clashes:
        reasons = ", ".join(
            f"{letter} is {binding.size} in {binding.keyword}"
            for letter, binding in clashes.items()
        )
        return [f"{name}: found {list(value.shape)}, expected {_bracketed(shape)}, and {reasons}"]

    for letter, size in sizes.items():
        bound.setdefault(letter, _Binding(size, name))
    return []


def dtype_kind(field: Field) -> str:
    """The key of DTYPES of what terms read: all that is neither a mask nor numbers of tokens or
    samples is floats, and so is what a tower made of pixels and tokens.
    """
    passes_as_it_is = not field.embedded and field.dtype in DTYPES
    return field.dtype if passes_as_it_is else "floats"


def _dtype_problem(name: str, value: Tensor) -> list[str]:
    kind = dtype_kind(FIELDS[name])
    if value.dtype in DTYPES[kind]:
        return []

    dtype = str(value.dtype).removeprefix("torch.")
    return [f"{name}: found {dtype}, expected {kind}; convert with {name}{CONVERSION[kind]}"]


def _written(field: Field) -> str:
    if field.is_number:
        return "a number, or a tensor of one"
    return f"a tensor {' or '.join(_bracketed(shape) for shape in field.shapes)}"


def _bracketed(shape: str) -> str:
    return f"[{', '.join(shape.split())}]"


def _norms(rows: Tensor) -> Tensor:
    # Half precision would overflow in the squares, or lose them.
    dtype = torch.float32 if rows.dtype in HALF else rows.dtype
    return torch.linalg.vector_norm(rows, dim=-1, dtype=dtype)
