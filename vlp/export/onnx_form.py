"""Both towers as ONNX: normalised pixels or token ids in, unit rows out, any number of rows, and of
tokens where the tower takes texts of any length.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from open_clip.hf_model import HFTextEncoder
from torch import Tensor, nn

from vlp.models.dual_encoder import DualEncoder

OPSET = 18  # the lowest that PyTorch's exporter writes without converting
_NEEDED = ("onnx", "onnxscript", "onnxruntime")
INPUTS = {"image": "pixel_values", "text": "input_ids"}  # as transformers calls them


class OnnxError(ValueError):
    """A model that could not be written as ONNX, or came out different."""


def write_onnx(model: DualEncoder, folder: Path, tolerance: float) -> list[str]:
    """Write image.onnx (`pixel_values` [b, 3, H, W] float32, normalised → `image_embeds` [b, D])
    and text.onnx (`input_ids` [rows, L] int64 → `text_embeds` [rows, D]), and compare both with
    PyTorch at other sizes than the traced ones; a line a file says how close they are.

    Texts may be shorter than the context where padding changes no embedding, as it does SigLIP's.
    OnnxError beyond `tolerance`; `check_installed` comes before.
    """
    folder.mkdir(parents=True)
    return [_write(_Tower(model, side), folder / f"{side}.onnx", tolerance) for side in INPUTS]


def check_installed() -> None:
    """Raise OnnxError where a package is absent."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise OnnxError(
            f"ONNX needs {', '.join(missing)}, not installed; install it with "
            "pip install 'vlp[hub]', or leave out --onnx"
        )


class _Tower(nn.Module):
    """One side of a model as a module of one input and one output, as torch.onnx takes it."""

    def __init__(self, model: DualEncoder, side: str) -> None:
        super().__init__()
        self.model, self.side = model, side

    @property
    def takes_any_length(self) -> bool:
        """Whether its inputs are texts that need not fill the context."""
        tower = self.model.text
        return self.side == "text" and (
            self.model.padding is not None or isinstance(tower, HFTextEncoder)
        )

    def forward(self, x: Tensor) -> Tensor:
        # The tower itself: the model's check of the length would fix it.
        tower = self.model.visual if self.side == "image" else self.model.text
        output = tower(x)
        # Beside a text decoder towers give their tokens too.
        features = output[0] if isinstance(output, tuple) else output
        return nn.functional.normalize(features, dim=-1)

    def example(self, rows: int) -> Tensor:
        pixels, ids = self.model.example(rows, seed=rows)
        if self.side == "image":
            return pixels
        # The largest id, which ends a text, stands in the middle: what follows may go.
        length = ids.shape[1] - (rows - 1 if self.takes_any_length else 0)
        return ids[:, : max(length, ids.shape[1] // 2 + 1)]

    def dynamic_axes(self) -> dict[int, Any]:
        """What may vary between calls, as torch.export names it."""
        axes: dict[int, Any] = {0: torch.export.Dim("rows")}
        if self.takes_any_length:
            axes[1] = torch.export.Dim("length", max=self.model.text_spec.context_length)
        return axes


@torch.no_grad()
def _write(tower: _Tower, path: Path, tolerance: float) -> str:
    import onnxruntime

    input_name, output_name = INPUTS[tower.side], f"{tower.side}_embeds"
    # One ONNX file ends at 2 GiB; larger towers keep their weights beside it.
    n_bytes = sum(weight.numel() * weight.element_size() for weight in tower.parameters())
    difference = 0.0
    try:
        with _quiet():
            program = torch.onnx.export(
                tower.eval(),
                (tower.example(2),),
                dynamo=True,
                dynamic_shapes=(tower.dynamic_axes(),),
                opset_version=OPSET,
                input_names=[input_name],
                output_names=[output_name],
                verbose=False,
            )
            assert program is not None
            _forget_sources(program.model)
            program.save(str(path), external_data=n_bytes > 2**30)
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

        # Other numbers of rows and tokens than the traced ones: a frozen axis shows here.
        for rows in (1, 3, 5):
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
    varying = "rows and tokens" if tower.takes_any_length else "rows"
    return (
        f"ONNX: {path.parent.name}/{path.name}, opset {OPSET}, any number of {varying}, embeddings "
        f"within {difference:.1e} of PyTorch's"
    )


def _forget_sources(model: Any) -> None:
    """Take out what the exporter notes of each node: the lines of code that it came from, by their
    paths on this machine.
    """
    graphs = [model.graph, *model.functions.values()]
    for graph in graphs:
        for node in graph.all_nodes():
            node.metadata_props.clear()
            node.doc_string = None


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
