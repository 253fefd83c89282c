"""Both towers as ONNX in 8 bits, made of the float32 files by onnxruntime's quantisation, and how
far their embeddings are from those.

With calibration (static): weights per channel and activations per tensor, whose ranges are the
least and largest values over N samples; as many others, which fixed nothing, compare. Without
(dynamic): the weights of matrix products and tables, ranges of activations as they come;
convolutions stay float32.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vlp.export.onnx_form import INPUTS, OnnxError
from vlp.models.dual_encoder import DualEncoder

if TYPE_CHECKING:
    from vlp.data.sources.shards import Shards
    from vlp.types import ImageSpec, Sample

N_SAMPLES = 128  # that fix the ranges, and others that compare, where no number is given
_LEAST = 2  # that compare: of one pair there is nothing to retrieve
Both = tuple[Tensor, Tensor]  # [n, D] rows by float32 and by 8 bits
_BATCH = 16  # rows a run of a session
_WEIGHTS = ["MatMul", "Gemm", "Gather"]  # a text tower is mostly its table of tokens
_STATIC = [*_WEIGHTS, "Conv"]


@dataclass(frozen=True)
class Int8:
    """How the 8 bits are made; see the module."""

    calibrate: str | None = None  # shards; None: dynamic
    n_samples: int = N_SAMPLES


@dataclass(frozen=True)
class Pairs:
    """What both models are given: float32 pixels [n, 3, H, W] and int64 ids [n, L]."""

    image: np.ndarray
    text: np.ndarray

    def of(self, side: str) -> np.ndarray:
        return self.image if side == "image" else self.text


@dataclass(frozen=True)
class Given:
    """The pairs that fix ranges (None: nothing does), and those that compare."""

    calibrated: Pairs | None
    compared: Pairs


def check(int8: Int8, onnx: bool) -> None:
    """Refuse settings by which nothing can be written, before a model is read. ValueError."""
    if not onnx:
        raise OnnxError("--int8 is of the ONNX files; add --onnx, or leave it out")
    if int8.n_samples < _LEAST:
        raise OnnxError(f"--calibrate-samples is {int8.n_samples}; expected at least {_LEAST}")
    if int8.calibrate is not None:
        _opened(int8)


def write_int8(folder: Path, given: Given) -> list[str]:
    """Write image.int8.onnx and text.int8.onnx beside the float32 files in `folder`, with the same
    inputs and outputs; lines say how far apart they are.

    OnnxError where onnxruntime cannot, or an embedding is not finite.
    """
    notes: list[str] = []
    rows: dict[str, Both] = {}
    for side in INPUTS:
        whole, small = folder / f"{side}.onnx", folder / f"{side}.int8.onnx"
        calibrated = None if given.calibrated is None else given.calibrated.of(side)
        _quantise(whole, small, side, calibrated)
        compared = given.compared.of(side)
        rows[side] = _embedded(whole, side, compared), _embedded(small, side, compared)
        notes.append(_note(whole, small, rows[side], calibrated))

    if given.calibrated is not None:
        notes += _agreements(rows["image"], rows["text"])
    return notes


# --- what is given --------------------------------------------------------------------------------


def read(model: DualEncoder, int8: Int8) -> Given:
    """What `int8` asks for: 2·N pairs spread over the shards, each with its sample's first caption,
    or random inputs. OnnxError for a picture that does not open.
    """
    if int8.calibrate is None:
        pixels, ids = model.example(2 * _BATCH)
        return Given(None, Pairs(pixels.numpy(), ids.numpy()))

    # Odd ones fix the ranges and even ones compare: both are of all shards.
    source = _opened(int8)
    places = np.linspace(0, len(source) - 1, 2 * int8.n_samples).round().astype(int)
    return Given(_pairs(model, source, places[1::2]), _pairs(model, source, places[::2]))


def _pairs(model: DualEncoder, source: Shards, places: np.ndarray) -> Pairs:
    from vlp.data import text

    samples = [source[int(place)] for place in places]
    pixels = torch.stack([_pixels(sample, model.image_spec) for sample in samples])
    ids = text.build(model.text_spec)([sample.captions[0] for sample in samples])
    with torch.no_grad():
        return Pairs(model.pixels(pixels).numpy(), ids.numpy())


def _pixels(sample: Sample, spec: ImageSpec) -> Tensor:
    from vlp.data.decode import eval_transform

    try:
        return eval_transform(sample.image, spec)
    except ValueError as error:
        raise OnnxError(
            f"--calibrate: the picture of sample {sample.key!r} does not open ({error}); remove it "
            "(vlp data validate finds all such), or name other shards"
        ) from error


def _opened(int8: Int8) -> Shards:
    """The samples; OnnxError where they are too few."""
    from vlp.config import Captions
    from vlp.data.sources import shards

    assert int8.calibrate is not None
    source = shards.open(shards.Options(path=int8.calibrate), Captions())
    n_wanted = 2 * int8.n_samples
    if len(source) < n_wanted:
        way_out = "name more shards"
        if len(source) >= 2 * _LEAST:
            way_out += f", or --calibrate-samples {len(source) // 2}"
        raise OnnxError(
            f"--calibrate {int8.calibrate} holds {len(source)} samples, and {n_wanted} are needed: "
            f"{int8.n_samples} that fix the ranges and as many that compare; {way_out}"
        )
    return source


# --- the files ------------------------------------------------------------------------------------


def _quantise(whole: Path, small: Path, side: str, calibrated: np.ndarray | None) -> None:
    """Write the 8-bit file of one tower; OnnxError where onnxruntime cannot."""
    from onnxruntime import quantization

    # A file of weights beside the graph: one ONNX file ends at 2 GiB.
    is_split = any(path != whole for path in whole.parent.glob(f"{whole.name}*"))
    settings: dict[str, Any] = {
        "per_channel": True,
        "weight_type": quantization.QuantType.QInt8,
        "use_external_data_format": is_split,
    }
    try:
        with TemporaryDirectory() as folder, _quiet():
            prepared = Path(folder) / whole.name
            quantization.quant_pre_process(
                whole, prepared, skip_symbolic_shape=True, save_as_external_data=is_split
            )
            if calibrated is None:
                quantization.quantize_dynamic(
                    prepared, small, op_types_to_quantize=_WEIGHTS, **settings
                )
            else:
                quantization.quantize_static(
                    prepared,
                    small,
                    _reader(INPUTS[side], calibrated),
                    op_types_to_quantize=_STATIC,
                    activation_type=quantization.QuantType.QInt8,
                    **settings,
                )
    # onnx's and onnxruntime's own kinds.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0][:300]
        raise OnnxError(
            f"the {side} tower cannot be written in 8 bits ({type(error).__name__}: {reason}); "
            "leave out --int8, or report it with the model's configuration"
        ) from error


def _reader(name: str, rows: np.ndarray) -> Any:
    """The rows in batches, as onnxruntime asks for them."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(_batches(rows))

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {name: batch}

    return Reader()


def _batches(rows: np.ndarray) -> Iterator[np.ndarray]:
    for first in range(0, len(rows), _BATCH):
        yield rows[first : first + _BATCH]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without onnxruntime's advice about its own steps; its errors are exceptions."""
    logger = logging.getLogger()
    disabled = logger.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(disabled)


# --- how far apart they are -----------------------------------------------------------------------


def _embedded(path: Path, side: str, inputs: np.ndarray) -> Tensor:
    """[n, D] unit rows of a file; OnnxError where they are not finite, or it does not run."""
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        parts = [
            session.run([f"{side}_embeds"], {INPUTS[side]: batch})[0] for batch in _batches(inputs)
        ]
    except Exception as error:  # onnxruntime's own kinds
        reason = str(error).strip().partition("\n")[0][:300]
        raise OnnxError(f"{path.name} does not run ({reason}); leave out --int8") from error

    rows = torch.from_numpy(np.concatenate(parts))
    if not rows.isfinite().all():
        raise OnnxError(f"{path.name} gives embeddings that are not finite; leave out --int8")
    return rows


def _note(
    whole: Path,
    small: Path,
    rows: Both,
    calibrated: np.ndarray | None,
) -> str:
    """How one file was made, how large it is, and the cosine of its rows with float32's."""
    kind, compared = "dynamic", "random inputs"
    if calibrated is not None:
        kind = f"static, by {len(calibrated)} samples"
        compared = f"{len(rows[0])} held-out pairs"
    share = _size(small) / _size(whole)
    in_float, in_8_bits = rows
    cosines = torch.nn.functional.cosine_similarity(in_float, in_8_bits)
    return (
        f"ONNX: {small.parent.name}/{small.name}, 8 bits ({kind}), {share:.0%} of the bytes; "
        f"cosine with float32's embeddings on {compared}: mean {cosines.mean():.4f}, least "
        f"{cosines.min():.4f}"
    )


def _size(path: Path) -> int:
    """Bytes of a file and of the weights beside it."""
    return sum(part.stat().st_size for part in path.parent.glob(f"{path.name}*"))


def _agreements(image: Both, text: Both) -> list[str]:
    """Retrieval among the pairs by float32 and by 8 bits, and how often both answer alike."""
    from vlp.eval import metrics

    n_pairs = len(image[0])
    owner = torch.arange(n_pairs)
    recalls: dict[str, list[float]] = {"image": [], "text": []}
    for images, texts in zip(image, text):
        rank_of_text, rank_of_image = metrics.retrieval_ranks(images, texts, owner)
        recalls["text"].append(_share(rank_of_text == 1))
        recalls["image"].append(_share(rank_of_image == 1))

    lines = []
    for way, queries, candidates in (("image", text, image), ("text", image, text)):
        answers = [(rows @ others.T).argmax(1) for rows, others in zip(queries, candidates)]
        whole, small = recalls[way]
        lines.append(
            f"ONNX: {way} retrieval among the {n_pairs} held-out pairs, R@1 {whole:.3f} in float32 "
            f"and {small:.3f} in 8 bits, the same first answer to "
            f"{_share(answers[0] == answers[1]):.1%}"
        )
    return lines


def _share(hits: Tensor) -> float:
    return float(hits.double().mean())
