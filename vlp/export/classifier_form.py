"""An image tower with its head for concepts as a classifier of timm, without texts:
`vlp export RUN --form classifier --to DIR`.

The folder is what timm's own repositories are, config.json and model.safetensors:
`timm.create_model("local-dir:DIR", pretrained=True)` gives the logits of the head. open_clip's
vision transformers become timm's CLIP ones of the same sizes, towers of timm what they are by name.
A head that reads the embedding is multiplied by the projection.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from vlp import checkpoint
from vlp.export.place import ExportError, appearing, check_free, save_weights, write_json
from vlp.files import naming
from vlp.locks import held
from vlp.models import trunk_features
from vlp.models.dual_encoder import DualEncoder
from vlp.pretrained import image_size, references

TOLERANCE = 1e-4  # largest difference of a logit, relative to the largest
_BUSY = "Wait until it is done, or name another folder"
_WEIGHTS = "model.safetensors"  # as timm looks for it
# timm's vision transformer in the layout of CLIP's: its sizes are arguments.
_VIT = "vit_base_patch32_clip_224"
# What that one cannot vary, in open_clip's section.
_VIT_ONLY = {
    "attentional_pool": False,
    "pos_embed_type": "learnable",
    "no_ln_pre": False,
    "final_ln_after_pool": False,
    "block_type": None,
    "qk_norm": False,
    "scaled_cosine_attn": False,
    "scale_heads": False,
    "scale_attn_inner": False,
    "scale_attn": False,
    "scale_fc": False,
    "norm_kwargs": None,
}


def write_classifier(
    run: Path | str, to: Path | str, *, labels: Path | str | None = None, overwrite: bool = False
) -> list[str]:
    """Write the classifier of a run's newest checkpoint, of one checkpoint or of an average
    (RUN@ema) into the folder `to`, which appears complete or not at all; returns a line on it.

    labels: concepts.tsv of `vlp data concepts`, whose synsets become the classes' names.
    ExportError for a model without such a head, and for a tower that timm cannot make.
    """
    to = Path(to)
    check_free(to, overwrite)
    names = None if labels is None else _names(labels)
    reference = references.resolve(run)
    if reference.kind != "run":
        raise ExportError(
            f"{run} is no run: exports leave the head for concepts out; name a run or a checkpoint"
        )
    model = checkpoint.load_model(checkpoint.resolve(reference.path), reference.averaged)
    return write_model(model, to, names, overwrite=overwrite)


def write_model(
    model: DualEncoder, to: Path, names: list[str] | None = None, *, overwrite: bool = False
) -> list[str]:
    """The same of a model in memory, in evaluation mode, and the names of its concepts."""
    head = model.heads.concepts
    if head is None:
        raise ExportError(
            "the model has no model.heads.concepts, whose outputs the classes are; train with it, "
            "or export the model: leave out --form classifier"
        )
    if names is not None and len(names) != head.out_features:
        raise ExportError(
            f"--labels names {len(names)} concepts and the head has {head.out_features}; name the "
            "table by which the run's data were labelled"
        )

    architecture, arguments = timm_model(model)
    network = _network(model, head, architecture, arguments)
    difference = _difference(model, network)
    if not difference <= TOLERANCE:  # NaN as well
        raise ExportError(
            f"timm's {architecture} gives logits that differ by {difference:.1e} of the largest, "
            f"more than {TOLERANCE:g}; nothing was written"
        )

    with held(to, beside=True, advice=_BUSY), naming(to), appearing(to, overwrite) as folder:
        save_weights(network.state_dict(), folder / _WEIGHTS)
        write_json(folder / "config.json", _config(model, network, architecture, arguments, names))
    return [
        f"timm: {architecture} with {head.out_features} classes, logits within {difference:.1e} of "
        f'the model\'s; timm.create_model("local-dir:{to}", pretrained=True)'
    ]


def timm_model(model: DualEncoder) -> tuple[str, dict[str, Any]]:
    """timm's name of the image tower, and the arguments that make it; ExportError for none."""
    try:
        trunk_features.check(model.visual)
    except ValueError:
        kind = type(model.visual).__name__
        raise ExportError(
            f"the image tower is a {kind}, and timm has no such model whose features before the "
            "projection are known; a vision transformer or a tower of timm can be a classifier"
        ) from None

    section = model.open_clip_config["vision_cfg"]
    if isinstance(model.visual, TimmModel):
        arguments: dict[str, Any] = {}
        if section.get("timm_pool"):
            arguments["global_pool"] = section["timm_pool"]
            # open_clip changed the pooling of the made trunk, which left its last norm in place.
            if hasattr(model.visual.trunk, "fc_norm"):
                arguments["fc_norm"] = not isinstance(model.visual.trunk.fc_norm, nn.Identity)
        # By itself timm makes the trunk for the size that it states.
        if not image_size.is_default(model.visual):
            arguments["img_size"] = list(model.image_spec.size)
        return section["timm_model_name"], arguments
    return _VIT, _vit_arguments(model, section)


def _vit_arguments(model: DualEncoder, section: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of timm's vision transformer for open_clip's."""
    unlike = [
        f"{key} {section[key]!r}"
        for key, usual in _VIT_ONLY.items()
        if section.get(key, usual) != usual
    ]
    if unlike:
        raise ExportError(f"timm's CLIP vision transformers cannot have {', '.join(unlike)}")

    visual = model.visual
    assert isinstance(visual, VisionTransformer)
    block = visual.transformer.resblocks[0]
    arguments = {
        "img_size": list(model.image_spec.size),
        "patch_size": visual.patch_size[0],
        "embed_dim": visual.conv1.out_channels,
        "depth": len(visual.transformer.resblocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": block.mlp.c_fc.out_features / visual.conv1.out_channels,
    }
    if model.open_clip_config.get("quick_gelu"):
        arguments["act_layer"] = "quick_gelu"
    elif section.get("act_kwargs"):
        arguments["act_layer"] = f"gelu_{section['act_kwargs'].get('approximate', 'tanh')}"
    if visual.pool_type == "avg":
        # timm would move the last norm behind the mean.
        arguments |= {"global_pool": "avg", "fc_norm": False}
    if section.get("ls_init_value") is not None:
        arguments["init_values"] = section["ls_init_value"]
    return arguments


def _network(
    model: DualEncoder, head: nn.Linear, architecture: str, arguments: dict[str, Any]
) -> Any:
    """timm's model with the tower's weights and the head's; ExportError where it cannot be made."""
    import timm

    try:
        network: Any = timm.create_model(architecture, num_classes=head.out_features, **arguments)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise ExportError(
            f"timm cannot make its {architecture} with {arguments}: {error}"
        ) from None

    trunk = _under_timms_names(model.visual, model.state_dict(), network)
    try:
        weight, bias = trunk_features.classifier(model.visual, head, model.heads_config.concepts_of)
    except ValueError as error:
        raise ExportError(str(error)) from None

    name = next(name for name, part in network.named_modules() if part is network.get_classifier())
    wanted = network.state_dict()
    of_head = {f"{name}.weight": weight.view_as(wanted[f"{name}.weight"]), f"{name}.bias": bias}
    weights = {key: value for key, value in trunk.items() if not key.startswith(f"{name}.")}
    try:
        network.load_state_dict(weights | of_head)
    except RuntimeError:
        raise ExportError(
            f"the image tower is not made of the parts of timm's {architecture} with {arguments}; "
            "export the model: leave out --form classifier"
        ) from None
    return network.eval()


def _under_timms_names(
    visual: nn.Module, weights: Mapping[str, Tensor], network: Any
) -> dict[str, Tensor]:
    """The tower's tensors as timm's model calls them."""
    if isinstance(visual, TimmModel):
        prefix = "visual.trunk."
        return {
            name.removeprefix(prefix): value
            for name, value in weights.items()
            if name.startswith(prefix)
        }

    from timm.models.vision_transformer import checkpoint_filter_fn

    of_tower = {name: value for name, value in weights.items() if name.startswith("visual.")}
    return dict(checkpoint_filter_fn(of_tower, network))


@torch.no_grad()
def _difference(model: DualEncoder, network: nn.Module) -> float:
    """The largest difference of a logit, relative to the largest logit."""
    pixels, _ = model.example(3)
    ours = model(pixels, pairs=len(pixels)).concept_logits
    assert ours is not None
    apart = (ours - network(pixels)).abs().max() / ours.abs().max()
    return float(apart)


def _config(
    model: DualEncoder,
    network: Any,
    architecture: str,
    arguments: dict[str, Any],
    names: list[str] | None,
) -> dict[str, Any]:
    """timm's config.json: how the model is made, and which pixels it reads."""
    spec = model.image_spec
    # Of timm's statement about its own weights only what says where things are stays.
    stated = {key: network.pretrained_cfg.get(key) for key in ("first_conv", "classifier")}
    pretrained = stated | {
        "custom_load": False,
        "input_size": [3, *spec.size],
        "fixed_input_size": isinstance(model.visual, VisionTransformer),
        "interpolation": spec.interpolation,
        "crop_pct": 1.0,
        "crop_mode": "squash" if spec.resize == "squash" else "center",
        "mean": list(spec.mean),
        "std": list(spec.std),
        "num_classes": network.num_classes,
    }
    written = {
        "architecture": architecture,
        "num_classes": network.num_classes,
        "num_features": network.num_features,
        "pretrained_cfg": pretrained,
    }
    if arguments:
        written["model_args"] = arguments
    if names is not None:
        written["label_names"] = names
    return written


def _names(path: Path | str) -> list[str]:
    """The second column of a table of concepts, in the order of their numbers; ExportError."""
    expected = "expected concepts.tsv of `vlp data concepts`"
    try:
        _, *lines = Path(path).read_text(encoding="utf-8").splitlines()
        rows = [line.split("\t") for line in lines]
        numbers, names = [row[0] for row in rows], [row[1] for row in rows]
    except (OSError, ValueError, IndexError) as error:
        raise ExportError(f"--labels {path} cannot be read ({error}); {expected}") from None
    if numbers != [str(number) for number in range(len(rows))] or not rows:
        raise ExportError(f"--labels {path} has no rows numbered from 0 on; {expected}")
    return names
