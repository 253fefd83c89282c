"""Averages of the weights of several models: a soup of fine-tunings (Wortsman et al., arXiv
2203.05482), and the line between two models (WiSE-FT, Wortsman et al., arXiv 2109.01903).

    θ = Σᵢ wᵢ·θᵢ,  Σᵢ wᵢ = 1        a soup; equal weights unless others are given
    θ = (1 − α)·θ_A + α·θ_B         a blend

It is taken tensor by tensor in float64 and rounded once. What is no weight follows these rules:

    a model of weight 0     is compared, and not read further: a blend at α = 0 or 1 is A or B, bit
                            for bit
    the logit scale         as its logarithm, each as the forward pass bounds it
    batch norms             running means and variances as weights (they were estimated for the
                            members' activations, not for the average's); of the counts the largest
    other integers          constants such as position ids, which must agree
    heads                   are left out, as in every export

Models that differ in architecture, pixels or tokens are refused: a mean over unlike parts means
nothing. That they come from one start cannot be seen here, and averages of others are of no use.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor

from vlp import checkpoint, config
from vlp.data.text import same_tokens
from vlp.models.build import from_description
from vlp.models.dual_encoder import DualEncoder
from vlp.models.heads import last_step
from vlp.pretrained.places import on_hub
from vlp.pretrained.references import Reference, resolve
from vlp.schema import plain
from vlp.types import ImageSpec, TextSpec

# Of a tower's description what changes no embedding, what names a copy of the same files, and what
# is compared through pixels and tokens.
_NO_DIFFERENCE = {
    "patch_dropout",
    "timm_model_pretrained",
    "timm_drop",
    "timm_drop_path",
    "hf_model_name",
    "hf_model_pretrained",
    "hf_tokenizer_name",
    "image_size",
    "context_length",
}
_COUNT = ".num_batches_tracked"
_SHOWN = 4  # differences that a message names


@dataclass(frozen=True)
class Members:
    """The models of an average by reference, with weights that add up to 1."""

    references: list[str]
    weights: list[float]

    def sentence(self) -> str:
        """What a model card says of the weights."""
        parts = [
            f"{weight:.4g} · `{card_name(reference)}`"
            for reference, weight in zip(self.references, self.weights)
        ]
        return f"The weights are an average of {len(parts)} models': {' + '.join(parts)}."


def blend(names: Sequence[str], alpha: float) -> Members:
    """The members of (1 − α)·A + α·B; ValueError for an α outside [0, 1]."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha:g}; expected 0 (A alone) to 1 (B alone)")
    return Members(list(names), [1 - alpha, alpha])


def fractions(option: str, text: str) -> list[float]:
    """The numbers of 0 to 1 in a list with commas."""
    try:
        numbers = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = []
    if not numbers or not all(0 <= number <= 1 for number in numbers):
        raise ValueError(f"{option} is {text!r}; expected numbers of 0 to 1, such as 0.25,0.75")
    return numbers


def card_name(reference: str) -> str:
    """A reference as a card may show it: no path, but which checkpoint of which run."""
    place = Path(reference)
    if place.parent.name == "checkpoints":
        return f"{place.parent.parent.name}/{place.name}"
    if on_hub(reference):
        return reference
    return place.name or place.resolve().name


# --- the mean -------------------------------------------------------------------------------------


def average(references: Sequence[str], weights: Sequence[float]) -> DualEncoder:
    """The mean of the models behind `references` by `weights` that add up to 1, on the CPU, in
    evaluation mode.

    A file of weights alone has the architecture of the first model that says its own. ValueError
    names what models that cannot be averaged differ in.
    """
    return mean_of(loaded(references), weights, references)


def loaded(references: Sequence[str]) -> Iterator[DualEncoder]:
    """The models behind `references`, one at a time."""
    # A mistyped one is answered before the others' weights are read.
    resolved = [resolve(reference) for reference in references]
    return _loaded(resolved)


def _loaded(references: Sequence[Reference]) -> Iterator[DualEncoder]:
    described = [r for r in references if r.kind != "file" or r.architecture]
    like = None
    if described and len(described) < len(references):
        like = _one(checkpoint.load_any(described[0]), described[0].text)

    for reference in references:
        yield _one(checkpoint.load_any(reference, like=like), reference.text)


def _one(model: Any, name: str) -> DualEncoder:
    """The model, unless it is several in one."""
    if not isinstance(model, DualEncoder):
        raise ValueError(f"{name} holds several models as one; average its members, each by itself")
    return model


def mean_of(
    models: Iterable[DualEncoder], weights: Sequence[float], names: Sequence[str]
) -> DualEncoder:
    """`average` of models in memory, or of an iterator that makes them one at a time. `names` are
    for messages.
    """
    total = _Total()
    for model, weight, name in zip(models, weights, names):
        total.add(model, weight, name)
    return total.mean()


# --- the sum --------------------------------------------------------------------------------------


class _Total:
    """Σ wᵢ·θᵢ of models that were found alike."""

    def __init__(self) -> None:
        self.first: _Form | None = None
        self.sums: dict[str, Tensor] = {}
        self.description: dict[str, Any] = {}  # of the first model that counts
        self.scale: config.Scale | None = None

    def add(self, model: DualEncoder, weight: float, name: str) -> None:
        """Take a model in; ValueError where it is unlike the first."""
        form = _Form.of(model, name)
        if self.first is None:
            self.first = form
        refuse_unlike(self.first, form)
        if not weight:
            return

        if self.scale is None:
            self.description, self.scale = model.description(), model.scale_config
        # The mean of bounded scales lies below the highest bound.
        highest = max(self.scale.max, model.scale_config.max)
        self.scale = replace(self.scale, max=highest)
        for key, value in _weights(model).items():
            self.sums[key] = _added(self.sums.get(key), value, weight, key, name)

    def mean(self) -> DualEncoder:
        """The model of what was taken in, its weights rounded to float32."""
        # Other heads are training's alone: members need not have the same.
        heads = last_step(self.description["vlp"]["heads"])
        described = self.description | {"vlp": {"scale": plain(self.scale), "heads": heads}}
        model = from_description(described)
        expected = model.state_dict()
        model.load_state_dict(
            {key: self.sums[key].to(value.dtype) for key, value in expected.items()}
        )
        return model.eval()


def _weights(model: DualEncoder) -> dict[str, Tensor]:
    """The tensors that an average is taken of, by name; the scale as the forward pass bounds it."""
    weights = {k: v for k, v in model.state_dict().items() if not k.startswith("heads.")}
    bounded = model.logit_scale.detach().clamp(max=model.scaling.log_max)
    return weights | {"scaling.logit_scale": bounded}


def _added(total: Tensor | None, value: Tensor, weight: float, key: str, name: str) -> Tensor:
    """One tensor's sum with a further member's; of integers what the average has of them."""
    if value.is_floating_point():
        addend = value.detach().double() * weight
        return addend if total is None else total.add_(addend)

    if total is None:
        return value.clone()
    if key.endswith(_COUNT):
        return torch.maximum(total, value)
    if not torch.equal(total, value):
        raise ValueError(
            f"{key} of {name} holds other integers than the first model's, which have no mean"
        )
    return total


# --- which models have a mean ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Form:
    """What models of one mean have in common."""

    name: str
    towers: dict[str, Any]  # the description's values by dotted key
    image: ImageSpec
    text: TextSpec
    shapes: dict[str, tuple[int, ...]]

    @classmethod
    def of(cls, model: DualEncoder, name: str) -> _Form:
        shapes = {key: tuple(value.shape) for key, value in _weights(model).items()}
        return cls(name, _towers(model), model.image_spec, model.text_spec, shapes)


def _towers(model: DualEncoder) -> dict[str, Any]:
    """A model's description by dotted key, what it leaves out as open_clip takes it."""
    stated = {"quick_gelu": False, "custom_text": True} | model.open_clip_config
    sections = {
        "vision_cfg": asdict(open_clip.CLIPVisionCfg()) | stated["vision_cfg"],
        "text_cfg": asdict(open_clip.CLIPTextCfg()) | stated["text_cfg"],
    }

    towers = {key: value for key, value in stated.items() if key not in sections}
    for section, values in sections.items():
        for key, value in values.items():
            if key not in _NO_DIFFERENCE:
                towers[f"{section}.{key}"] = plain(value)
    # How a bias starts is not how it is built.
    towers.pop("init_logit_bias", None)
    towers.pop("init_logit_scale", None)
    towers["heads.nonnegative"] = model.heads_config.nonnegative
    return towers


def refuse_unlike(first: _Form, other: _Form) -> None:
    """Raise ValueError where two models have no mean, with what they differ in."""
    different = _differing(first.towers, other.towers)
    different += _differing(vars(first.image), vars(other.image), "pixels: ")
    if not same_tokens(first.text, other.text):
        different.append(f"tokens: {first.text} and {other.text}")

    # Only where nothing above explains it: a width shows in every tensor.
    if not different:
        different = _differing(first.shapes, other.shapes)
    if not different:
        return

    more = f"; and {len(different) - _SHOWN} more" if len(different) > _SHOWN else ""
    raise ValueError(
        f"{other.name} and {first.name} have no average, for they differ: "
        f"{'; '.join(different[:_SHOWN])}{more}. Take models of one architecture, preprocessing "
        "and tokenizer that were trained from one start"
    )


def _differing(first: dict[str, Any], other: dict[str, Any], kind: str = "") -> list[str]:
    """The keys whose values differ, with the other's value and the first's."""
    keys = dict.fromkeys([*first, *other])
    return [
        f"{kind}{key} {_shown(other, key)}, not {_shown(first, key)}"
        for key in keys
        if first.get(key) != other.get(key)
    ]


def _shown(values: dict[str, Any], key: str) -> str:
    return str(values[key]) if values.get(key) is not None else "absent"
