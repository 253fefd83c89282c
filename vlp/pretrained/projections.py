"""The last layers of two towers, which carry their features into the shared space.

`model.new_projection` starts them at random beside published weights, as another embedding size
needs it.
"""

from __future__ import annotations

from collections.abc import Mapping

from open_clip.timm_model import TimmModel
from torch import Tensor, nn

# Beginnings of their names in open_clip's towers, timm's and Hugging Face's in theirs.
_BEGINNINGS = (
    "visual.proj",
    "visual.head.",
    "visual.attnpool.c_proj.",
    "text.text_projection",
    "text.proj",
)


def names(model: nn.Module) -> set[str]:
    """The projections' tensors among those of a model with `visual` and `text`; ValueError for a
    tower that has none.
    """
    state = model.state_dict()
    found = {name for name in state if name.startswith(_BEGINNINGS)} | _classifier(model)
    for tower in ("visual", "text"):
        if not any(name.startswith(f"{tower}.") for name in found):
            raise ValueError(
                f"model.new_projection: the {tower} tower has no projection, its features are the "
                "embedding; leave new_projection out, or give the tower a projection"
            )
    return found


def _classifier(model: nn.Module) -> set[str]:
    """timm's own classifier where it is the projection: open_clip then adds none."""
    visual = model.get_submodule("visual")
    if not isinstance(visual, TimmModel) or list(visual.head.parameters()):
        return set()
    head = visual.trunk.get_classifier()
    of_head = {id(parameter) for parameter in head.parameters()}
    return {name for name, value in model.named_parameters() if id(value) in of_head}


def replaced(
    weights: Mapping[str, Tensor], model: nn.Module, initial: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The weights with the projections of `model` as `initial` has them, in place of their own."""
    fresh = names(model)
    others = {name: value for name, value in weights.items() if not name.startswith(_BEGINNINGS)}
    return others | {name: initial[name] for name in fresh}


def advice(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> str:
    """What to write where nothing but the projections differs; else nothing."""
    missing = expected.keys() ^ weights.keys()
    reshaped = {
        name
        for name in expected.keys() & weights.keys()
        if expected[name].shape != weights[name].shape
    }
    if not all(name.startswith(_BEGINNINGS) for name in missing | reshaped):
        return ""
    return (
        "; only the projections differ: set model.new_projection: true to start new ones, or leave "
        "model.embed_dim as it was published"
    )
