"""Heads that score a stored picture embedding: aesthetic, NSFW and the like, from a file that the
user names.

    --head NAME=FILE            .safetensors or .pth of one linear layer, such as LAION's first
                                aesthetic predictor; .onnx of anything else
    --head NAME=FILE,linear     several linear layers with nothing between them that counts, such as
                                LAION's improved aesthetic predictor
    --head NAME=FILE,relu       ReLU where a module without weights stands between two layers, such
                                as LAION's CLIP-based NSFW detector for ViT-H-14
    --head NAME=cosine          no file: the cosine of the stored picture and first caption

A file of weights does not tell what stands between its layers, only that something does: the
numbers that nn.Sequential gives them leave gaps, and dropout leaves the same gap as ReLU. Layers
that have names of their own leave no gap, whatever their `forward` puts between them: they are
refused. A file may lie in a store.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlp.data_tools.filter.conditions import check_new_field

if TYPE_CHECKING:
    from torch import Tensor

COSINE = "cosine"
BETWEEN = ("linear", "relu")
_GRAMMAR = (
    "--head NAME=FILE, NAME=FILE,relu or NAME=FILE,linear (FILE: .safetensors, .pth or .onnx), or "
    f"NAME={COSINE}"
)
_WEIGHTS = (".safetensors", ".pth", ".pt")
_NUMBER = re.compile(r"(?<![^.])\d+(?=\.weight$)")  # of a module in nn.Sequential
_DECIMALS = 4  # below them lies what threads and processors change

Rows = np.ndarray  # [n, D] float16 or float32, unit rows


@dataclass(frozen=True)
class Head:
    """A head by name and file; each process reads it when it first needs it."""

    name: str
    file: Path | None  # None: the cosine
    between: str = ""  # one of BETWEEN, or not said

    @classmethod
    def of(cls, text: str) -> Head:
        """The head that an option names; raises ValueError."""
        from vlp.data.stored import source

        name, equals, rest = text.partition("=")
        file, _, between = rest.rpartition(",")
        if between not in BETWEEN:
            file, between = rest, ""
        if not (equals and name.strip() and file):
            raise ValueError(f"--head {text!r}: expected {_GRAMMAR}")

        # As a path, by which the nodes of a cluster are asked for the file.
        head = cls(name.strip(), None if file == COSINE else source(file), between)
        check_new_field(head.name, f"--head {text}")
        if head.file is None:
            return head
        if head.file.suffix not in (*_WEIGHTS, ".onnx"):
            raise ValueError(f"--head {text!r}: {file} is no file of a head; expected {_GRAMMAR}")
        if not head.file.is_file():
            raise ValueError(f"--head {text!r}: there is no file {file}")
        return head

    def check(self, width: int) -> None:
        """Raise ValueError where the head does not read rows of this width, or gives no number."""
        if self.file is None:
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
        if not np.isfinite(scores).all():
            raise ValueError(f"{self.file} scores {scores[0]}: its weights are not all finite")

    def settings(self) -> list[str]:
        """What its scores depend on: the file's content, not its place."""
        if self.file is None:
            return [self.name, COSINE, ""]
        with open(self.file, "rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        return [self.name, content, self.between]

    def function(self) -> Callable[[Rows], np.ndarray]:
        """The head itself: rows [n, D] → scores [n] float64."""
        return _load(self)

    def scores(self, image: Rows, text: Rows) -> np.ndarray:
        """The scores [n] of stored pictures, NaN for one that has none: it did not open, the cosine
        is asked for and there is no caption, or the row or the score is not finite.
        """
        known = is_known(image)
        if self.file is None:
            known &= is_known(text)

        scores = np.full(len(image), np.nan)
        if known.any():
            if self.file is None:
                pairs = image[known].astype(np.float64) * text[known].astype(np.float64)
                scores[known] = pairs.sum(axis=1)
            else:
                scores[known] = self.function()(image[known])

        # JSON has no infinity.
        scores[~np.isfinite(scores)] = np.nan
        return np.round(scores, _DECIMALS)


def is_known(rows: Rows) -> np.ndarray:
    """Which rows are embeddings, bool [n]: those of pictures that did not open are zeros, and a
    model that overflows gives rows that are not finite.
    """
    return rows.any(axis=1) & np.isfinite(rows).all(axis=1)


@cache
def _load(head: Head) -> Callable[[Rows], np.ndarray]:
    assert head.file is not None  # the cosine has no network
    if head.file.suffix == ".onnx":
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

    assert head.file is not None  # as above
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

    # The functions between layers of other names stand in code that is not here.
    if len(names) > 1 and len({_NUMBER.sub("", name) for name in names}) > 1:
        raise ValueError(
            f"{head.file} has layers {', '.join(names)}; what stands between layers is read from "
            "the numbers of one nn.Sequential (layers.0.weight, layers.2.weight): export another "
            "network as .onnx"
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
        # One of another length could be spread over all outputs.
        if bias.shape != (len(weight),):
            raise ValueError(
                f"{head.file}: {_bias(name)} has the shape {tuple(bias.shape)}, expected "
                f"({len(weight)},) as the outputs of {name}"
            )
        layers.append((weight, bias, gap and head.between == "relu"))
    return layers


def _tensors(path: Path) -> dict[str, Tensor]:
    """The named tensors of a file; raises ValueError. A pickle is read without running its code."""
    import torch
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    # torch, zipfile, pickle and safetensors each have kinds of their own for a damaged file.
    except Exception as error:
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


def _unreadable(path: Path, error: Exception) -> ValueError:
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


def _of_onnx(path: Path) -> Callable[[Rows], np.ndarray]:
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


def _session(path: Path) -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise ValueError(
            f"{path} needs onnxruntime, which is not installed; install it with "
            "pip install 'vlp[hub]'"
        ) from None

    try:
        session = onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors share no class
        raise _unreadable(path, error) from None
    if len(session.get_inputs()) != 1:
        names = ", ".join(tensor.name for tensor in session.get_inputs())
        raise ValueError(f"{path} reads {names}; expected one input, [n, D] float32")
    return session
