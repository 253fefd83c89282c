"""Both towers as ONNX: normalised pixels or token ids in, unit rows out, any number of rows."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from vlp.model import DualEncoder

_NEEDED = ("onnx", "onnxscript", "onnxruntime")


class OnnxError(ValueError):
    """A model that could not be written as ONNX, or came out different."""


def write_onnx(model: DualEncoder, folder: Path, tolerance: float) -> list[str]:
    """Write image.onnx (`pixel_values` [b, 3, H, W] float32, normalised → `image_embeds` [b, D]) and text.onnx (`input_ids`
    [rows, L] int64 → `text_embeds` [rows, D]) and compare both with PyTorch at other batch sizes; a line a file says how
    close they are. The names are transformers'."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise OnnxError(f"ONNX needs packages that are not installed; run: pip install {' '.join(missing)}")
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    length = model.text_spec.context_length

    def pixels(rows: int) -> Tensor:
        return torch.randn(rows, 3, *model.image_spec.size, generator=generator)

    def ids(rows: int) -> Tensor:
        drawn = torch.randint(3, 400, (rows, length), generator=generator)
        drawn[:, length // 2] = model.text.vocab_size - 1  # the end token of CLIP's vocabulary: where the tower pools
        return drawn

    return [
        _write(_Tower(model.encode_image), "pixel_values", "image_embeds", pixels, folder / "image.onnx", tolerance),
        _write(_Tower(model.encode_text), "input_ids", "text_embeds", ids, folder / "text.onnx", tolerance),
    ]


class _Tower(nn.Module):
    """One method of a model as a module, which is what torch.onnx takes."""

    def __init__(self, encode: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model = encode.__self__  # registers the parameters
        self.name = encode.__name__

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self.model, self.name)(x)


@torch.no_grad()
def _write(tower: nn.Module, given: str, made: str, draw: Callable[[int], Tensor], path: Path, tolerance: float) -> str:
    import onnxruntime

    large = sum(p.numel() * p.element_size() for p in tower.parameters()) > 2**30  # one ONNX file ends at 2 GiB

    with _quiet():
        torch.onnx.export(
            tower.eval(), (draw(2),), str(path), dynamo=True, dynamic_shapes=({0: torch.export.Dim("rows")},),
            input_names=[given], output_names=[made], external_data=large, verbose=False,
        )  # fmt: skip
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    difference = 0.0
    for rows in (1, 3):  # not the size that was traced: the batch must be free
        x = draw(rows)
        found = torch.from_numpy(session.run(None, {given: x.numpy()})[0])
        difference = max(difference, (found - tower(x)).abs().max().item())
    if difference > tolerance:
        raise OnnxError(f"{path.name} differs from PyTorch by {difference:.1e}, more than {tolerance:g}")
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
