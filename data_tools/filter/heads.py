"""Heads that score a stored picture embedding: aesthetic, NSFW and the like, from a file that the
user names.

    --head NAME=FILE            .safetensors or .pth of one linear layer, such as LAION's first
                                aesthetic predictor; .onnx of anything else
    --head NAME=FILE,linear     several linear layers with nothing between them that counts, such as
                                LAION's improved aesthetic predictor
    --head NAME=FILE,relu       ReLU where a module without weights stands between two layers, such
                                as LAION's CLIP-based NSFW detector for ViT-H-14
    --head NAME=cosine          no file: the cosine of the stored picture and first caption

A file of weights does not tell what stands between its layers, only that something does: their
numbers leave gaps, and dropout leaves the same gap as ReLU.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

COSINE = "cosine"
BETWEEN = ("linear", "relu")
_GRAMMAR = (
    "--head NAME=FILE, NAME=FILE,relu or NAME=FILE,linear (FILE: .safetensors, .pth or .onnx), or "
    f"NAME={COSINE}"
)
_WEIGHTS = (".safetensors", ".pth", ".pt")
_DECIMALS = 4  # below them lies what threads and processors change

Rows = np.ndarray  # [n, D] float16 or float32, unit rows


@dataclass(frozen=True)
class Head:
    """A head by name and file; each process reads it when it first needs it."""

    name: str
    file: str  # COSINE: none
    between: str = ""  # one of BETWEEN, or not said

    @classmethod
    def of(cls, text: str) -> Head:
        """The head that an option names; raises ValueError."""
        name, equals, rest = text.partition("=")
        file, _, between = rest.rpartition(",")
        if between not in BETWEEN:
            file, between = rest, ""
        if not (equals and name.strip() and file):
            raise ValueError(f"--head {text!r}: expected {_GRAMMAR}")

        head = cls(name.strip(), file, between)
        if file != COSINE and Path(file).suffix not in (*_WEIGHTS, ".onnx"):
            raise ValueError(f"--head {text!r}: {file} is no file of a head; expected {_GRAMMAR}")
        if file != COSINE and not Path(file).is_file():
            raise ValueError(f"--head {text!r}: there is no file {file}")
        return head

    def check(self, width: int) -> None:
        """Raise ValueError where the head does not read rows of this width, or gives no number."""
        if self.file == COSINE:
            return
        function = self.function()
        try:
            scores = function(np.zeros((2, width), np.float32))
        # Torch's, numpy's and onnxruntime's errors share no class.
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"{self.file} does not score embeddings of width {width}: {reason}; name the head "
                "of the model that made the embeddings"
            ) from None
        if scores.shape != (2,):
            raise ValueError(
                f"{self.file} gives {scores.size // 2} numbers a picture; expected one score"
            )

    def settings(self) -> list[str]:
        """What its scores depend on: the file's content, not its place."""
        if self.file == COSINE:
            return [self.name, COSINE, ""]
        with open(self.file, "rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        return [self.name, content, self.between]

    def function(self) -> Callable[[Rows], np.ndarray]:
        """The head itself: rows [n, D] → scores [n] float64."""
        return _load(self)

    def scores(self, image: Rows, text: Rows) -> np.ndarray:
        """The scores [n] of stored pictures, NaN for one that has none: it did not open, or the
        cosine is asked for and there is no caption.
        """
        known = image.any(axis=1)
        if self.file == COSINE:
            known &= text.any(axis=1)
            cosines = (image.astype(np.float64) * text.astype(np.float64)).sum(axis=1)
            return np.where(known, np.round(cosines, _DECIMALS), np.nan)

        scores = np.full(len(image), np.nan)
        if known.any():
            scores[known] = np.round(self.function()(image[known]), _DECIMALS)
        return scores


@cache
def _load(head: Head) -> Callable[[Rows], np.ndarray]:
    if head.file.endswith(".onnx"):
        return _of_onnx(head.file)
    layers = _layers(head)

    def score(rows: Rows) -> np.ndarray:
        import torch

        values = torch.from_numpy(rows).double()
        for weight, bias, with_relu in layers:
            values = values @ weight.T + bias
            values = values.relu() if with_relu else values
        return _one_each(values.numpy())

    return score


def _layers(head: Head) -> list[tuple[Tensor, Tensor, bool]]:
    """(weight, bias, whether ReLU follows) of each linear layer, in order; raises ValueError."""
    import torch

    tensors = _tensors(head.file)
    weights = {name: value for name, value in tensors.items() if name.endswith("weight")}
    names = sorted(weights, key=_place)
    expected = {*names, *(_bias(name) for name in names)}
    strange = [name for name in tensors if name not in expected]
    if strange or not names or any(weights[name].ndim != 2 for name in names):
        listed = ", ".join(f"{name} {tuple(tensors[name].shape)}" for name in list(tensors)[:8])
        raise ValueError(
            f"{head.file} holds {listed or 'no tensor'}; expected weights [out, in] and biases of "
            "linear layers alone: export another network as .onnx"
        )

    # A gap in the numbers of modules: something without weights stands there.
    places = [_place(name) for name in names]
    has_gap = [after[-1] - before[-1] > 1 for before, after in pairwise(places)]
    if any(has_gap) and not head.between:
        raise ValueError(
            f"{head.file} has layers {', '.join(names)}: between them stands ReLU or only dropout, "
            f"which the file does not tell; say --head {head.name}={head.file},relu or ,linear "
            "(LAION's improved aesthetic predictor is linear, its NSFW detector relu)"
        )

    layers = []
    for name, gap in zip(names, [*has_gap, False]):
        weight = weights[name].double()
        bias = tensors.get(_bias(name), torch.zeros(len(weight))).double()
        layers.append((weight, bias, gap and head.between == "relu"))
    return layers


def _tensors(path: str) -> dict[str, Tensor]:
    """The named tensors of a file; raises ValueError. A pickle is read without running its code."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.endswith(".safetensors"):
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, EOFError, RuntimeError, ValueError) as error:
        raise _unreadable(path, error) from None

    # As Lightning wraps it.
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    are_tensors = isinstance(content, dict) and all(
        isinstance(value, torch.Tensor) for value in content.values()
    )
    if not are_tensors:
        raise ValueError(
            f"{path} holds {type(content).__name__}, expected a state dict of tensors: save "
            "model.state_dict()"
        )
    return dict(content)


def _unreadable(path: str, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())[:200]
    return ValueError(
        f"{path} cannot be read as weights ({type(error).__name__}: {reason}); expected "
        "a .safetensors file, or a state dict that torch.save wrote"
    )


def _bias(weight: str) -> str:
    return weight.removesuffix("weight") + "bias"


def _place(name: str) -> tuple[int, ...]:
    """Where a module stands, by the numbers in its name: layers.10.weight after layers.2.weight."""
    return tuple(int(number) for number in re.findall(r"\d+", name)) or (0,)


def _of_onnx(path: str) -> Callable[[Rows], np.ndarray]:
    """A network of one input [n, D] and one output, [n] or [n, 1]."""
    session = _session(path)
    [source] = session.get_inputs()

    def score(rows: Rows) -> np.ndarray:
        [values, *_] = session.run(None, {source.name: rows.astype(np.float32)})
        return _one_each(np.asarray(values, np.float64).reshape(len(rows), -1))

    return score


def _one_each(values: np.ndarray) -> np.ndarray:
    """[n, 1] → [n]; more columns stay, and are refused."""
    return values[:, 0] if values.shape[1] == 1 else values


def _session(path: str) -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise ValueError(
            f"{path} needs onnxruntime, which is not installed; install it with "
            "pip install 'vlp[hub]'"
        ) from None

    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors share no class
        raise _unreadable(path, error) from None
    if len(session.get_inputs()) != 1:
        names = ", ".join(tensor.name for tensor in session.get_inputs())
        raise ValueError(f"{path} reads {names}; expected one input, [n, D] float32")
    return session
