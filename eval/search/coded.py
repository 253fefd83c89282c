"""The rows of a library in a byte or a bit a number: less to hold and to read, and the best of them
compared by their float rows (vlp.eval.quantised).

FOLDER/DIGEST.KIND.safetensors   "stored" [n, bytes a row] uint8, "numbers" [n] of the pictures; of
                                 int8 "low" and "step" [D]

Written once for what a library holds; one that has grown gets another.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from vlp import locks, log
from vlp.eval import quantised
from vlp.eval.quantised import Binary, Code, Int8, Kind
from vlp.eval.search.library import Library
from vlp.files import write_atomically

_BLOCK = 65536  # stored rows that are compared at a time
_ADVICE = "The next call finds what it makes."


@dataclass(frozen=True)
class Coded:
    """Stored rows [n, bytes a row], and the numbers [n] of their pictures."""

    code: Code
    stored: Tensor
    numbers: Tensor

    @property
    def n_bytes(self) -> int:
        """What a search holds of them."""
        return self.stored.nbytes

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(numbers, stored rows) block by block."""
        return zip(self.numbers.split(_BLOCK), self.stored.split(_BLOCK))


def of_library(opened: Library, kind: Kind) -> Coded:
    """The library's rows, read once, and made if need be."""
    of_kinds = _made.setdefault(opened, {})
    if kind not in of_kinds:
        of_kinds[kind] = _read(opened, kind) or _write(opened, kind)
    return of_kinds[kind]


_made: WeakKeyDictionary[Library, dict[str, Coded]] = WeakKeyDictionary()


def nearest(
    opened: Library,
    coded: Coded,
    query: Tensor,  # [1, D]
    top: int,
    rescore: int,
) -> list[tuple[float, int]]:
    """(cosine of the float rows, number) of the `top` nearest by falling cosine, among the
    top·`rescore` nearest by stored rows.
    """
    query = query.cpu().float()
    listed = list(quantised.nearest(query, coded.code, coded.blocks(), top * rescore))
    cosines = opened.rows_of(listed).float() @ query[0]

    # A stable sort: of equal ones that which the stored rows place first.
    order = cosines.argsort(descending=True, stable=True)[:top].tolist()
    return [(float(cosines[place]), listed[place]) for place in order]


# --- on disk --------------------------------------------------------------------------------------


def _path(opened: Library, kind: Kind) -> Path:
    return opened.folder / f"{opened.digest()}.{kind}.safetensors"


def _read(opened: Library, kind: Kind) -> Coded | None:
    """The rows of a file; None where there is none, or one that is damaged, which is said."""
    path = _path(opened, kind)
    if not path.exists():
        return None
    try:
        tensors = load_file(path)
        stored, numbers = tensors["stored"], tensors["numbers"]
        code: Code = Binary(opened.width)
        if kind == "int8":
            code = Int8(tensors["low"], tensors["step"])
    except Exception as error:  # safetensors' and the system's own kinds
        log.warn(f"{path} is damaged ({str(error)[:200]}); it is made again")
        return None
    return Coded(code, stored, numbers)


def _write(opened: Library, kind: Kind) -> Coded:
    """Make the rows, and keep them where no other call is about to."""
    coded = _encoded(opened, kind)
    tensors = {"stored": coded.stored, "numbers": coded.numbers}
    if isinstance(coded.code, Int8):
        tensors |= {"low": coded.code.low, "step": coded.code.step}

    path = _path(opened, kind)
    try:
        with locks.held(opened.folder, advice=_ADVICE):
            write_atomically(path, save(tensors))
            for stale in opened.folder.glob(f"*.{kind}.safetensors"):
                if stale != path:
                    stale.unlink(missing_ok=True)
    except locks.InUse as error:
        log.say(f"searching without keeping {path.name}: {error}")
    return coded


def _encoded(opened: Library, kind: Kind) -> Coded:
    """The rows, in two passes over the parts: ranges, then bytes."""
    code = quantised.fitted(kind, (rows for _, rows in _blocks(opened)))
    numbers, stored = [], []
    for of_block, rows in _blocks(opened):
        numbers.append(of_block)
        stored.append(code.encode(rows))
    return Coded(code, torch.cat(stored), torch.cat(numbers))


def _blocks(opened: Library) -> Iterator[tuple[Tensor, Tensor]]:
    """(numbers, float32 rows) of the pictures that count, part by part."""
    for first, rows in opened.blocks():
        of_part = torch.from_numpy(rows).float()
        counts = of_part.any(1)
        yield first + counts.nonzero()[:, 0], of_part[counts]
