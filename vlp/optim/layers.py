"""Layer-wise decay of the learning rate: how deep in its tower each parameter lies."""

from __future__ import annotations

import re

from torch import nn

from vlp.config import LayerDecay

# The first number in a name is that of its block: transformer.resblocks.3.…, layer2.0.…
BLOCK = re.compile(r"^(?P<list>(?:[^.]+\.)*?[^.]+)\.(?P<number>\d+)\.")
# Of what lies in no block, what makes vectors of pixels and tokens; the rest follows the blocks.
STEM = re.compile(r"(^|\.)(conv[123]|bn[123]|ln_pre|cls_emb|shared|wte|wpe|\w*embed\w*)(\.|$)")
# Layers of a projection are no blocks of the tower.
PROJECTION = re.compile(r"^(proj|head|text_projection)(\.|$)")


def layer_factors(model: nn.Module, decay: float | LayerDecay | None) -> dict[str, float]:
    """Factor on the learning rate by parameter name; what is not named has 1.

        factor = decay^(n − l)    in layer l of a tower of n,

    where l is 0 for embeddings and stem, and n for the last block, its norms and projections
    (Clark et al. 2020, ELECTRA; Bao et al. 2022, BEiT). ValueError for a tower without layers.
    """
    if decay is None:
        return {}
    if not isinstance(decay, LayerDecay):
        decay = LayerDecay(image=decay, text=decay)

    factors: dict[str, float] = {}
    for prefix, base in (("visual", decay.image), ("text", decay.text)):
        if base == 1:
            continue
        ids = layer_ids(model.get_submodule(prefix))
        deepest = max(ids.values())
        if deepest == 0:
            raise ValueError(
                f"train.optimizer.layer_decay: no numbered blocks in the parameter names of the "
                f"tower {prefix!r}; leave it out for this tower (layer_decay: {{image: …}} or "
                "{text: …})"
            )
        for name, layer in ids.items():
            factors[f"{prefix}.{name}"] = base ** (deepest - layer)
    return factors


def layer_ids(tower: nn.Module) -> dict[str, int]:
    """The layer of every parameter of a tower, from 0 (embeddings, stem) upwards.

    By the tower's own grouping where it has one (timm's `group_matcher`), otherwise by the numbers
    in its names.
    """
    trunk = getattr(tower, "trunk", None)
    if trunk is None or not hasattr(trunk, "group_matcher"):
        return _by_numbers([name for name, _ in tower.named_parameters()])

    from timm.models import group_parameters

    of_trunk = group_parameters(trunk, trunk.group_matcher(coarse=False), reverse=True)
    deepest = max(of_trunk.values(), default=0)
    ids = {name: deepest for name, _ in tower.named_parameters()}
    return ids | {f"trunk.{name}": layer for name, layer in of_trunk.items()}


def _by_numbers(names: list[str]) -> dict[str, int]:
    """`layer_ids` of a tower whose blocks are numbered in its names."""
    in_block: dict[str, str] = {}
    for name in names:
        match = BLOCK.match(name)
        if match is not None and not PROJECTION.match(name):
            in_block[name] = match[0]

    # In the order of the forward pass, which is that of the modules.
    order = {block: number for number, block in enumerate(dict.fromkeys(in_block.values()), 1)}
    ids = {}
    for name in names:
        if name in in_block:
            ids[name] = order[in_block[name]]
        else:
            ids[name] = 0 if STEM.search(name) else len(order)
    return ids
