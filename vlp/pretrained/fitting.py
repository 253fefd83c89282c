"""How weights get into open_clip's towers: under their names, at their sizes, or refused by what
does not fit.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict
from open_clip.transformer import QuickGELU
from torch import Tensor, nn

from vlp import log
from vlp.pretrained import adapters, context, image_size, projections
from vlp.pretrained.adapter_folder import AdapterFolder
from vlp.pretrained.weight_files import read, same_activation, shortened


@dataclass(frozen=True)
class Fit:
    """How weights of other shapes enter a model."""

    # positions of the text tower that stay where its context is stretched; None: it is not
    keep: int | None = None
    new_projection: bool = False  # both projections stay as the model has them
    new_decoder: bool = False  # so does a text decoder, where the weights have none


UNCHANGED = Fit()
DECODER = "text_decoder."  # how the names of its weights begin


def load_into(
    clip: nn.Module,
    path: Path,
    fit: Fit = UNCHANGED,
    described: Mapping[str, Any] | None = None,
    added: AdapterFolder | None = None,
) -> None:
    """Read weights of any known layout into a CustomTextCLIP; ValueError lists what does not fit.

    Positions are interpolated to the model's sizes (`vlp.pretrained.image_size`,
    `context.fitted`). `described` is what is said beside the weights: their image size, and the
    adapters of a run, which are merged. The scale always comes from the weights. A bias comes from
    them only where the model has one: a model without drops it with a warning, and a model with one
    keeps its own where the weights have none. `added`: adapters for these weights. `fit`: what of
    the model stays as it is.
    """
    if added is not None:
        # As the base entered the model that was tuned; its own projections come with the rest.
        keep = added.keep if fit.keep is None else fit.keep
        new_projection = fit.new_projection or added.new_projection
        # What the run that was tuned began at random comes with the rest, too.
        load_into(clip, path, Fit(keep, new_projection, new_decoder=True), described)
        added.add_to(clip, own_projection=fit.new_projection)
        return

    if path.suffix == ".npz":
        _load_big_vision(clip, path, fit)
        return

    initial = {name: value.clone() for name, value in clip.state_dict().items()}
    described = described or {}
    weights = adapters.merged(read(path), described.get("vlp", {}).get("lora", {}))
    _check_openai(weights, clip, path)
    if "positional_embedding" in weights:  # OpenAI's layout, whose text tower lies at the top level
        weights = convert_to_custom_text_state_dict(weights)
    try:
        weights = convert_state_dict(clip, weights)
    # open_clip raises any of these for weights that are far from fitting.
    except (RuntimeError, KeyError, ValueError, AssertionError) as error:
        problem = misfit(clip.state_dict(), weights) or error
        raise ValueError(f"the weights in {path} do not fit this model: {problem}") from error

    # Read at their own size; the tower that has them is then resized.
    visual: Any = clip.get_submodule("visual")
    size = image_size.pair(visual.image_size)
    stated_size = described.get("model_cfg", {}).get("vision_cfg", {}).get("image_size")
    image_size.resize(visual, image_size.of_weights(visual, weights, stated_size))
    weights = context.fitted(weights, initial, fit.keep, str(path))
    if fit.new_projection:
        weights = projections.replaced(weights, clip, initial)
    if fit.new_decoder:
        weights = _with_decoder(weights, initial, path)

    # The model decides whether there is a bias, the weights what it is.
    bias = weights.pop("logit_bias", None)
    model_bias: Tensor | None = clip.logit_bias  # type: ignore[assignment]  # a Module's attributes
    if model_bias is not None:
        weights["logit_bias"] = model_bias.detach() if bias is None else bias
    elif bias is not None and bias.item():
        message = (
            f"{path} holds a logit bias ({bias.item():.4g}) that this model leaves out; set "
            "model.bias to keep it"
        )
        warnings.warn(message, stacklevel=2)

    # Older versions of transformers saved positions as a buffer; scalars come in either shape.
    expected = clip.state_dict()
    for name in list(weights):
        if name.endswith(".position_ids") and name not in expected:
            del weights[name]
    for name in {"logit_scale", "logit_bias"} & weights.keys():
        weights[name] = weights[name].reshape(expected[name].shape)

    problem = misfit(expected, weights)
    if problem:
        advice = projections.advice(expected, weights)
        raise ValueError(f"the weights in {path} do not fit this model: {problem}{advice}")
    clip.load_state_dict(weights)
    image_size.resize(visual, size)


def _with_decoder(
    weights: dict[str, Tensor], initial: Mapping[str, Tensor], path: Path
) -> dict[str, Tensor]:
    """The weights with the model's text decoder as it is, where they hold none."""
    of_decoder = {name: value for name, value in initial.items() if name.startswith(DECODER)}
    if not of_decoder or any(name.startswith(DECODER) for name in weights):
        return weights
    log.say(f"{path} holds no text decoder; the model keeps its own")
    return weights | of_decoder


# What OpenAI's own files hold beside the weights, and nobody else's.
_OPENAI = ("input_resolution", "context_length", "vocab_size")


def _check_openai(weights: dict[str, Tensor], clip: nn.Module, path: Path) -> None:
    """Take OpenAI's marks out of the weights; ValueError where the towers have not its quick
    GELU.
    """
    marks = [weights.pop(name) for name in _OPENAI if name in weights]
    if marks:
        quick_gelu = any(isinstance(module, QuickGELU) for module in clip.modules())
        same_activation(True, quick_gelu, f"the weights of OpenAI in {path}", None)


def misfit(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> str:
    """What two sets of tensors do not share, in a few lines; "" where they agree in names and
    shapes.
    """
    shared = sorted(expected.keys() & weights.keys())
    reshaped = [
        f"{name} {tuple(weights[name].shape)} for {tuple(expected[name].shape)}"
        for name in shared
        if expected[name].shape != weights[name].shape
    ]
    problems = {
        "missing": sorted(expected.keys() - weights.keys()),
        "not known here": sorted(weights.keys() - expected.keys()),
        "of another shape": reshaped,
    }

    # Three names of each tell what went wrong; a wrong architecture has hundreds.
    parts = [
        f"{len(names)} {problem} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for problem, names in problems.items()
        if names
    ]
    if not parts:
        return ""
    n_fitting = len(shared) - len(reshaped)
    return f"{n_fitting} of {len(expected)} tensors fit; {'; '.join(parts)}"


def _load_big_vision(clip: nn.Module, path: Path, fit: Fit) -> None:
    if fit != UNCHANGED:
        raise ValueError(
            f"{path} is of big_vision's layout, which is only read as it is; convert it to "
            "open_clip's first, or leave context and new_projection out"
        )
    try:
        open_clip.load_checkpoint(clip, str(path))
    # numpy, zipfile and open_clip each have kinds of their own.
    except Exception as error:
        raise ValueError(
            f"the weights in {path} do not fit this model, or are damaged: {shortened(str(error))}"
        ) from error
