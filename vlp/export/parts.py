"""Each tower of a DualEncoder alone: as a transformers model without projection, and the layers
that project what it pools.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from open_clip.hf_model import ClsLastHiddenStatePooler, ClsPooler, HFTextEncoder, MeanPooler
from open_clip.timm_model import TimmModel
from torch import Tensor, nn

from vlp.export import clip_form
from vlp.models.dual_encoder import DualEncoder
from vlp.pretrained import image_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Layer:
    """A linear layer of a projection, with what follows it."""

    weight: Tensor  # [outputs, inputs]
    bias: Tensor | None = None  # [outputs]
    gelu: bool = False  # whether exact GELU follows


@dataclass(frozen=True)
class Part:
    """One tower: its embedding is `projection` of the model's output, pooled as `pooling` says."""

    network: PreTrainedModel
    # by the network itself (pooler_output), or over its tokens
    pooling: Literal["own", "mean", "cls"]
    projection: list[Layer] = field(default_factory=list)  # empty: what is pooled is the embedding


class NoPart(ValueError):
    """A tower that is no model of transformers; the message says what it has instead."""


def image(model: DualEncoder, weights: Mapping[str, Tensor]) -> Part:
    """The image tower with `weights`, which bear open_clip's names; NoPart where it cannot be."""
    tower = model.visual
    if isinstance(tower, TimmModel):
        return _timm(model, tower)

    reasons = clip_form.image_obstacles(model)
    if reasons:
        raise NoPart("; ".join(reasons))
    from transformers import CLIPVisionModel

    network = CLIPVisionModel(clip_form.image_config(model)).eval()
    _load(network, dict(clip_form.image_trunk(weights)), "vision_model.")
    return Part(network, "own", [Layer(weights["visual.proj"].T)])


def _timm(model: DualEncoder, tower: TimmModel) -> Part:
    from transformers import TimmWrapperConfig, TimmWrapperModel

    section = model.open_clip_config["vision_cfg"]
    if section.get("act_kwargs"):
        raise NoPart("its timm tower has the tanh form of GELU, and timm by name the exact one")
    if hasattr(tower.head, "pool"):
        raise NoPart("its timm tower is pooled by open_clip's attention")

    arguments: dict[str, Any] = {}
    if section.get("timm_pool"):
        arguments["global_pool"] = section["timm_pool"]
    # By itself timm makes the trunk for the size that it states.
    if not image_size.is_default(tower):
        arguments["img_size"] = list(image_size.pair(tower.image_size))
    settings = TimmWrapperConfig(architecture=section["timm_model_name"], model_args=arguments)
    try:
        network = TimmWrapperModel(settings).eval()
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise NoPart(f"timm cannot make its image tower by name ({error})") from None

    # timm's own classifier is a projection where open_clip added none of its own.
    trunk = dict(tower.trunk.state_dict())
    expected = network.timm_model.state_dict()
    beyond = trunk.keys() - expected.keys()
    projection = [*_linear_layers(tower.head), *_classifier(tower.trunk)]
    body = {name: value for name, value in trunk.items() if name in expected}
    if expected.keys() != body.keys() or len(beyond) > 2:
        raise NoPart(f"its timm tower is not made of the parts of {section['timm_model_name']}")
    if any(value.shape != expected[name].shape for name, value in body.items()):
        raise NoPart("its timm tower was built for another size than timm states")
    network.timm_model.load_state_dict(body)

    # VisionTextDualEncoderModel asks for it, and timm's configurations have none.
    width = projection[0].weight.shape[1] if projection else model.embed_dim
    network.config.hidden_size = width
    return Part(network, "own", projection)


def _classifier(trunk: Any) -> list[Layer]:
    classifier = trunk.get_classifier()
    return _linear_layers(classifier) if isinstance(classifier, nn.Linear) else []


def text(model: DualEncoder, weights: Mapping[str, Tensor]) -> Part:
    """The text tower with `weights`, which bear open_clip's names; NoPart where it cannot be."""
    tower = model.text
    if not isinstance(tower, HFTextEncoder):
        return _clip_text(model, weights)

    if getattr(tower.config, "is_encoder_decoder", False):
        raise NoPart(f"its text tower is the encoder of a {tower.config.model_type} model alone")
    # Nothing stops a run whose captions are short; longer ones would fail in every library.
    positions = getattr(tower.config, "max_position_embeddings", None) or math.inf
    if model.text_spec.context_length > positions:
        raise NoPart(
            f"its context is {model.text_spec.context_length} tokens, and its language model has "
            f"{positions} positions"
        )
    poolings: dict[type, Literal["own", "mean", "cls"]] = {
        MeanPooler: "mean",
        ClsLastHiddenStatePooler: "cls",
        ClsPooler: "own" if getattr(tower.transformer, "pooler", None) is not None else "cls",
    }
    kind = type(tower.pooler)
    if kind not in poolings:
        raise NoPart(f"its text tower is pooled by {kind.__name__}")
    # Configurations keep the place that they came from, which is of this machine.
    tower.transformer.config._name_or_path = ""
    return Part(tower.transformer, poolings[kind], _linear_layers(tower.proj))


def _clip_text(model: DualEncoder, weights: Mapping[str, Tensor]) -> Part:
    reasons = clip_form.text_obstacles(model)
    if reasons:
        raise NoPart("; ".join(reasons))
    from transformers import CLIPTextModel

    network = CLIPTextModel(clip_form.text_config(model)).eval()
    _load(network, dict(clip_form.text_trunk(weights)), "text_model.")
    return Part(network, "own", [Layer(weights["text.text_projection"].T)])


def _linear_layers(projection: nn.Module) -> list[Layer]:
    """The linear layers of a projection in their order, with the GELU between them."""
    layers: list[Layer] = []
    for module in projection.modules():
        if isinstance(module, nn.Linear):
            layers.append(Layer(module.weight.detach(), _detached(module.bias)))

    # Both of open_clip's projections of two layers, its own and timm's, have GELU between.
    n_gelus = sum(isinstance(module, nn.GELU) for module in projection.modules())
    if len(layers) > 2 or n_gelus != max(0, len(layers) - 1):
        raise NoPart(f"its projection is {type(projection).__name__}, of {len(layers)} layers")
    if n_gelus:
        layers[0] = Layer(layers[0].weight, layers[0].bias, gelu=True)
    return layers


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _load(network: nn.Module, weights: Mapping[str, Tensor], prefix: str) -> None:
    """Load weights whose names begin with `prefix`, which transformers 5.23 left out."""
    named = dict(weights)
    if not any(name.startswith(prefix) for name in network.state_dict()):
        named = {name.removeprefix(prefix): value for name, value in weights.items()}
    network.load_state_dict(named)


def example(model: DualEncoder) -> tuple[Tensor, Tensor]:
    """Inputs to compare forms on: pixels [5, 3, H, W], and ids [5, L] of texts from one token to as
    many as fit: at the shorter ones shows what masks or pools otherwise.
    """
    pixels, ids = model.example(5)
    padding, end, length = _padding(model), model.text.vocab_size - 1, ids.shape[1]
    ordinary = min({1, 2, 3} - {padding, end})
    ids[(ids == padding) | (ids == end)] = ordinary

    for row, n_tokens in zip(ids, (1, 2, length // 2, length - 1, length)):
        row[n_tokens - 1] = end
        row[n_tokens:] = padding
    return pixels, ids


def text_inputs(model: DualEncoder, ids: Tensor) -> dict[str, Tensor]:
    """Token ids [b, L] as a transformers model takes them: a language model with its mask."""
    if not isinstance(model.text, HFTextEncoder):
        return {"input_ids": ids}
    return {"input_ids": ids, "attention_mask": (ids != _padding(model)).long()}


def _padding(model: DualEncoder) -> int:
    """The id that fills a text up; towers without a mask read up to the largest id, or all."""
    if isinstance(model.text, HFTextEncoder):
        return model.text.config.pad_token_id
    return 0


@torch.no_grad()
def embed(part: Part, **inputs: Tensor) -> Tensor:
    """[b, D] unit rows of a tower alone, as other libraries compute them."""
    output = part.network(**inputs)
    if part.pooling == "own":
        rows = output.pooler_output
    elif part.pooling == "cls":
        rows = output.last_hidden_state[:, 0]
    else:
        mask = inputs["attention_mask"].unsqueeze(-1)
        rows = (output.last_hidden_state * mask).sum(1) / mask.sum(1)

    for layer in part.projection:
        rows = nn.functional.linear(rows, layer.weight, layer.bias)
        rows = nn.functional.gelu(rows) if layer.gelu else rows
    return nn.functional.normalize(rows, dim=-1)
