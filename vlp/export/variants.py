"""The same model for other needs: weights of half the size, pictures of another size, or
embeddings of fewer numbers.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from vlp.export.place import ExportError, save_weights, write_json
from vlp.export.sentence_form import ROUTER
from vlp.models import language, multimodal
from vlp.models.build import from_description
from vlp.models.dual_encoder import DualEncoder

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bf16": torch.bfloat16}
# ln 100 is 4.59375 in bfloat16: as scalars they cost nothing, and stay as they are.
_WIDE = ("logit_scale", "logit_bias")


def known(name: str) -> torch.dtype:
    """The dtype of `--dtype`; ExportError for another name."""
    if name not in DTYPES:
        raise ExportError(f"dtype is {name!r}; expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


def rounded(weights: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Float32 weights with the values that they have in `dtype`; ExportError where one has none."""
    if dtype == torch.float32:
        return weights
    result = dict(weights)
    for name, value in weights.items():
        if not value.is_floating_point() or name.endswith(_WIDE):
            continue
        result[name] = value.to(dtype).float()
        if not result[name].isfinite().all():
            raise ExportError(
                f"{name} holds {value.abs().max():.4g}, which {dtype} has no number for; write "
                "--dtype bf16, or float32"
            )
    return result


def narrow(folder: Path, dtype: torch.dtype) -> None:
    """Store the weights of every form in `folder` as `dtype`, and say so in transformers' files."""
    if dtype == torch.float32:
        return
    for path in folder.rglob("*.safetensors"):
        weights = {
            name: value.to(dtype)
            if value.is_floating_point() and not name.endswith(_WIDE)
            else value
            for name, value in load_file(path).items()
        }
        save_weights(weights, path)

        # transformers computes in the dtype that the configuration states. In the Router it must
        # be float32, as sentence-transformers' own layers behind it are.
        computed = "float32" if ROUTER in path.parts else str(dtype).removeprefix("torch.")
        config = path.parent / "config.json"
        if path.name == "model.safetensors" and config.is_file():
            settings = json.loads(config.read_text(encoding="utf-8"))
            if "model_type" in settings:
                write_json(config, _stating(settings, computed))


def _stating(settings: dict[str, Any], dtype: str) -> dict[str, Any]:
    """A configuration of transformers, and those inside it, with their dtype."""
    stated = {
        name: _stating(value, dtype) if isinstance(value, dict) and "model_type" in value else value
        for name, value in settings.items()
    }
    return stated | {"dtype": dtype}


@torch.no_grad()
def note(model: DualEncoder, reference: DualEncoder, dtype: torch.dtype) -> list[str]:
    """A line on how far the rounded weights are from the model's; none for float32."""
    if dtype == torch.float32:
        return []
    pixels, ids = _example(model)
    device = next(model.parameters()).device
    ours, theirs = model(pixels.to(device), ids.to(device)), reference(pixels, ids)
    cosines = [
        (rows.cpu() * others).sum(-1).min().item()
        for rows, others in ((ours.image, theirs.image), (ours.text, theirs.text))
    ]
    return [
        f"weights: {str(dtype).removeprefix('torch.')} in every file of safetensors, scale and "
        f"bias in float32; the least cosine with float32's embeddings is {min(cosines):.6f}"
    ]


def _example(model: DualEncoder) -> tuple[Tensor, Tensor]:
    """Pixels and token ids that the model can be run on."""
    pixels, ids = model.example(8)
    if language.reference_of(model.open_clip_config["text_cfg"]):
        # Its language model may be absent, or large: rows in the place of what it would give.
        ids = torch.randn(8, model.text.width)
    return pixels, ids


def resized(model: DualEncoder, size: int) -> DualEncoder:
    """The model for pictures of `size` × `size` pixels, as training at that size builds it
    (vlp.pretrained.image_size); ExportError for a size that the tower cannot read names others.
    """
    if multimodal.is_described(model.open_clip_config):
        raise ExportError(
            f"--image-size {size}: the model was prompted for pictures of "
            f"{model.image_spec.size[0]} pixels; train it with image_tower.image_size {size}"
        )
    described = copy.deepcopy(model.description())
    described["model_cfg"]["vision_cfg"]["image_size"] = size
    described["vlp"]["heads"] = {"nonnegative": model.heads_config.nonnegative}
    trained_as = {"model_cfg": model.open_clip_config}

    with TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        save_weights({k: v.cpu() for k, v in model.open_clip_state_dict().items()}, file)
        try:
            return from_description(described, file, stated=trained_as).eval()
        except ValueError as error:
            raise ExportError(f"--image-size {size}: {error}") from error


@torch.no_grad()
def narrowed(model: DualEncoder, width: int) -> DualEncoder:
    """The model that embeds as the first `width` numbers of this one, as unit rows: its last
    projections are cut. ExportError for a width beyond D, or a tower that cannot be cut.
    """
    if width > model.embed_dim:
        raise ExportError(
            f"--width is {width}, but the embeddings have {model.embed_dim} numbers; name at most "
            f"{model.embed_dim}"
        )
    described = copy.deepcopy(model.description())
    described["model_cfg"]["embed_dim"] = width
    described["vlp"]["heads"] = {"nonnegative": model.heads_config.nonnegative}

    with TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        try:
            # Built once without weights, to learn the shapes that they have at this width.
            shapes = from_description(described).open_clip_state_dict()
            save_weights(_cut(model, shapes, width), file)
            narrow_model = from_description(described, file).eval()
        except ValueError as error:
            # What else it says is advice to whoever configures such a model.
            reason = str(error).partition(";")[0]
            raise ExportError(
                f"--width {width}: this model has no projections that can be cut ({reason}); "
                f"{_CUT_ADVICE}"
            ) from error

    _check_cut(model, narrow_model, width)
    return narrow_model


_CUT_ADVICE = "leave it out: vlp eval, search and embed cut the rows of any model by --width"


def _cut(model: DualEncoder, shapes: dict[str, Tensor], width: int) -> dict[str, Tensor]:
    """The weights with the shapes of a model of embeddings of `width` numbers. ValueError where
    more than the embedding's dimension differs.
    """
    weights = {}
    for name, value in model.open_clip_state_dict().items():
        wanted = shapes[name].shape
        changes = {(before, after) for before, after in zip(value.shape, wanted) if before != after}
        if changes - {(model.embed_dim, width)}:
            raise ValueError(
                f"{name} has the shape {list(value.shape)}, and {list(wanted)} at this width, "
                "which are not its first numbers"
            )
        weights[name] = value[tuple(slice(size) for size in wanted)].cpu()
    return weights


def _check_cut(model: DualEncoder, narrow_model: DualEncoder, width: int) -> None:
    """Raise ExportError unless the cut model's rows are the first numbers of the whole one's."""
    pixels, ids = _example(model)
    device = next(model.parameters()).device
    whole, cut = model(pixels.to(device), ids.to(device)), narrow_model(pixels, ids)
    for side in ("image", "text"):
        prefix = getattr(whole, side).float()[:, :width].cpu()
        expected = torch.nn.functional.normalize(prefix, dim=-1)
        apart = (getattr(cut, side) - expected).abs().max().item()
        # Not <=: NaN is no number that a model was cut to.
        if not apart <= _CUT_TOLERANCE:
            raise ExportError(
                f"--width {width}: the cut {side} tower differs by {apart:.1e} from the first "
                f"numbers of its embeddings; {_CUT_ADVICE}"
            )


_CUT_TOLERANCE = 1e-4  # largest difference of a coordinate; the products are of other shapes
