"""Both towers as ONNX: normalised pixels or token ids in, unit rows out, any number of rows."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from vlp.models.dual_encoder import DualEncoder

_NEEDED = ("onnx", "onnxscript", "onnxruntime")
_INPUTS = {"image": "pixel_values", "text": "input_ids"}  # as transformers calls them


class OnnxError(ValueError):
    """A model that could not be written as ONNX, or came out different."""


def write_onnx(model: DualEncoder, folder: Path, tolerance: float) -> list[str]:
    """Write image.onnx (`pixel_values` [b, 3, H, W] float32, normalised → `image_embeds` [b, D])
    and text.onnx (`input_ids` [rows, L] int64 → `text_embeds` [rows, D]), and compare both with
    PyTorch at other batch sizes than the traced one; a line a file says how close they are.
    OnnxError for missing packages, or beyond `tolerance`.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise OnnxError(
            f"ONNX needs packages that are not installed; run: pip install {' '.join(missing)}"
        )
    folder.mkdir(parents=True)
    return [_write(_Tower(model, side), folder / f"{side}.onnx", tolerance) for side in _INPUTS]


class _Tower(nn.Module):
    """One side of a model as a module of one input and one output, as torch.onnx takes it."""

    def __init__(self, model: DualEncoder, side: str) -> None:
        super().__init__()
        self.model, self.side = model, side

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self.model(**{self.side: x}), self.side)

    def example(self, rows: int) -> Tensor:
        pixels, ids = self.model.example(rows, seed=rows)
        return pixels if self.side == "image" else ids


@torch.no_grad()
def _write(tower: _Tower, path: Path, tolerance: float) -> str:
    import onnxruntime

    input_name, output_name = _INPUTS[tower.side], f"{tower.side}_embeds"
    # One ONNX file ends at 2 GiB; larger towers keep their weights beside it.
    n_bytes = sum(weight.numel() * weight.element_size() for weight in tower.parameters())
    difference = 0.0
    try:
        with _quiet():
            torch.onnx.export(
                tower.eval(),
                (tower.example(2),),
                str(path),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("rows")},),
                input_names=[input_name],
                output_names=[output_name],
                external_data=n_bytes > 2**30,
                verbose=False,
            )
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

        # Other numbers of rows than the traced one: a frozen axis shows here.
        for rows in (1, 3):
            x = tower.example(rows)
            (embedded,) = session.run([output_name], {input_name: x.numpy()})
            apart = (torch.from_numpy(embedded) - tower(x)).abs().max().item()
            difference = max(difference, apart)
    # The exporter and onnxruntime raise kinds of their own.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0][:300]
        raise OnnxError(
            f"the {tower.side} tower cannot be written as ONNX ({type(error).__name__}: {reason}); "
            "leave out --onnx, or report it with the model's configuration"
        ) from error

    if difference > tolerance:
        raise OnnxError(
            f"{path.name} differs from PyTorch by {difference:.1e}, more than {tolerance:g}"
        )
    return f"ONNX: {path.parent.name}/{path.name}, embeddings within {difference:.1e} of PyTorch's"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's notices about itself; its errors are exceptions."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels):
                logger.setLevel(level)
