"""A run's adapters alone: small files beside a base that others have, in peft's layout."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from open_clip import list_pretrained_tags_by_model
from torch import Tensor, nn

from vlp import averaging, checkpoint, config
from vlp.export import licenses, usage
from vlp.export.card import of_scale
from vlp.export.place import ExportError, appearing, check_free, save_weights, write_json
from vlp.files import naming
from vlp.locks import held
from vlp.models import lora
from vlp.models.build import fit_of, from_description
from vlp.models.dual_encoder import DualEncoder
from vlp.models.heads import last_step
from vlp.pretrained import adapter_folder, adapters, places, references, weight_files
from vlp.pretrained.adapter_folder import SIDES
from vlp.pretrained.fitting import Fit
from vlp.pretrained.folders import read_json
from vlp.schema import parse

TOLERANCE = 1e-6  # of a weight, between what is written and what the run trained
_BUSY = "Wait until it is done, or name another folder"


def write_adapters(
    run: Path | str, to: Path | str, *, license: str | None = None, overwrite: bool = False
) -> list[str]:
    """Write the adapters of a run's newest checkpoint, or of one checkpoint, and what else it
    trained, to the folder `to`; returns a line on what was written.

    The folder names the base and appears complete or not at all. ExportError for a run without
    adapters, and for one whose base no reference names.
    """
    lora.check_installed()
    licenses.metadata(license)
    to = Path(to)
    check_free(to, overwrite)
    path, scalings = _adapted_run(run)
    weights = dict(checkpoint.tensors_of(path, "model"))
    settings = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    base_name = _base_of(settings, run)

    described = _described(path)
    fit = fit_of(parse(config.Model, settings["model"]))
    base = _base(base_name, described, fit)
    plain = adapters.merged(_of_towers(weights), dict.fromkeys(scalings, 0.0))
    rest = _changed(base.state_dict(), plain)
    _check_base(base_name, rest, weights)
    rest |= _out_projections(weights, scalings, base)

    with held(to, beside=True, advice=_BUSY), naming(to), appearing(to, overwrite) as folder:
        for side, scaling in scalings.items():
            _write_tower(folder / SIDES[side], side, scaling, weights, base, base_name)
        save_weights(_unscaled(rest), folder / adapter_folder.REST)
        digest = adapter_folder.digest_of(_unscaled(base.state_dict()), base, set(_unscaled(rest)))
        about = {
            "base": base_name,
            "digest": digest,
            "described": described,
            "keep": fit.keep,
            "new_projection": fit.new_projection,
        }
        write_json(folder / references.ADAPTERS, about)
        card = _card(to.name, base_name, [SIDES[side] for side in scalings], license, settings)
        (folder / "README.md").write_text(card, encoding="utf-8")
        _check_read_back(folder, adapters.merged(_of_towers(weights), scalings))

    n_adapters = len(adapters.adapters(weights)) // 2
    return [
        f"adapters: {n_adapters} layers, and {len(rest)} other tensors that were trained, for "
        f"{base_name}; vlp reads the folder wherever a model is named, peft each tower's "
        f"({', '.join(SIDES[side] for side in scalings)})"
    ]


def _adapted_run(run: Path | str) -> tuple[Path, dict[str, float]]:
    """The checkpoint of a run, and alpha/r of its adapted towers; ExportError where it has none."""
    reference = references.resolve(run)
    if reference.kind != "run" or reference.averaged:
        raise ExportError(
            f"{run}: only a run's own weights keep adapters apart (not its moving average, and no "
            "other model); name a run or a checkpoint"
        )
    path = checkpoint.resolve(reference.path)
    checkpoint.verify(path)
    scalings = read_json(path / "model.json").get("vlp", {}).get("lora", {})
    if not scalings:
        raise ExportError(
            f"{run} trained no adapters (model.image_tower.lora, model.text_tower.lora); export "
            "the model: leave out --form adapters"
        )
    return path, scalings


def _base_of(settings: Mapping[str, Any], run: Path | str) -> str:
    """The reference to what a run started from; ExportError where that was random."""
    if settings.get("init_from"):
        return str(settings["init_from"])

    pretrained = settings["model"].get("pretrained")
    if not pretrained:
        raise ExportError(
            f"{run} started from no model that a reference names (init_from, model.pretrained), so "
            "that nobody could have its base; export the model: leave out --form adapters"
        )
    architecture = settings["model"]["image_tower"].get("architecture")
    tags = list_pretrained_tags_by_model(architecture) if architecture else []
    return f"{architecture}:{pretrained}" if pretrained in tags else str(pretrained)


def _described(path: Path) -> dict[str, Any]:
    """The tuned model without what is of training alone."""
    described = read_json(path / "model.json")
    ours = described["vlp"]
    described["vlp"] = {"scale": ours["scale"], "heads": last_step(ours.get("heads", {}))}
    return described


def _base(name: str, described: dict[str, Any], fit: Fit) -> DualEncoder:
    """The model before it was tuned, in the tuned one's sizes."""
    found = weight_files.behind(references.resolve(name))
    if found.adapters is not None:
        raise ExportError(
            f"the base, {name}, is a folder of adapters itself; export the whole model: leave out "
            "--form adapters"
        )
    torch.manual_seed(0)  # of new projections, which the rest holds
    return from_description(described, found.path, fit, stated=found.stated)


def _of_towers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What any model has: without heads."""
    return {name: value for name, value in weights.items() if not name.startswith("heads.")}


def _changed(base: Mapping[str, Tensor], plain: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a run holds otherwise than its base, adapters aside."""
    return {
        name: value
        for name, value in plain.items()
        if name not in base or not torch.equal(value, base[name].to(value.dtype))
    }


def _unscaled(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names as every model's file has them: the scale beside the towers."""
    return {name.removeprefix("scaling."): value for name, value in weights.items()}


def _check_base(name: str, rest: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Refuse a base whose adapted layers are not those that the run has."""
    of_layers = adapters.adapters(weights)
    of_layers |= {n: value for n, value in weights.items() if n.endswith("base_layer.weight")}
    adapted = adapters.merged(of_layers, dict.fromkeys(SIDES, 0.0))
    other = sorted(adapted.keys() & rest.keys())
    if other:
        raise ExportError(
            f"{name} has other weights than this run started from ({other[0]} and "
            f"{len(other) - 1} more); put those back there, or export the model: leave out --form "
            "adapters"
        )


def _write_tower(
    folder: Path,
    side: str,
    scaling: float,
    weights: Mapping[str, Tensor],
    base: DualEncoder,
    base_name: str,
) -> None:
    """peft's two files of one tower, for the plain tower."""
    from peft import LoraConfig

    tower = base.get_submodule(side)
    of_tower = {
        name.removeprefix(f"{side}."): value
        for name, value in adapters.adapters(weights).items()
        if name.startswith(f"{side}.")
    }
    rank = next(value.shape[0] for name, value in of_tower.items() if "lora_A" in name)
    tensors = _named_as_peft(of_tower, tower, rank)

    layers = {name.removesuffix(adapter_folder.A) for name in tensors if "lora_A" in name}
    modules = [layer for layer in sorted(layers) if not layer.endswith(adapter_folder.OUT_PROJ)]
    alpha: Any = round(scaling * rank, 6)  # peft takes any number, and says int
    options = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules=modules,
        base_model_name_or_path=averaging.card_name(base_name),
        inference_mode=True,
    )
    folder.mkdir()
    options.save_pretrained(str(folder))
    named = {adapter_folder.PREFIX + name: value for name, value in tensors.items()}
    save_weights(named, folder / adapter_folder.WEIGHTS)


def _named_as_peft(
    of_tower: Mapping[str, Tensor], tower: nn.Module, rank: int
) -> dict[str, Tensor]:
    """The tensors of a tower by peft's names for the plain one.

    peft adapts torch's attention as a whole. What it has of the output projection is zeros, and the
    rest holds that projection whole: peft 0.21 would add its adapters twice. Zeros also stand for
    an input projection that the run left alone.
    """
    named: dict[str, Tensor] = {}
    for name, value in of_tower.items():
        layer = name.replace(".default.", ".")
        attention, _, part = layer.partition(".attn.")
        if not _is_torchs(tower, f"{attention}.attn"):
            named[layer] = value
        elif part.startswith("in_proj."):
            named[f"{attention}.attn.{part.removeprefix('in_proj.')}"] = value
    return _zeros(_attentions(of_tower, tower), tower, rank) | named


def _zeros(places: set[str], tower: nn.Module, rank: int) -> dict[str, Tensor]:
    """Adapters that add nothing, for torch's attentions at `places`."""
    zeros = {}
    for place in sorted(places):
        attention: Any = tower.get_submodule(place)
        width = attention.embed_dim
        for layer, n_out in ((place, 3 * width), (place + adapter_folder.OUT_PROJ, width)):
            zeros[layer + adapter_folder.A] = torch.zeros(rank, width)
            zeros[layer + adapter_folder.B] = torch.zeros(n_out, rank)
    return zeros


def _attentions(names: Iterable[str], tower: nn.Module) -> set[str]:
    """torch's attentions with adapters, by their names in the plain tower."""
    places = {name.partition(".attn.")[0] + ".attn" for name in names if ".attn." in name}
    return {place for place in places if _is_torchs(tower, place)}


def _is_torchs(tower: nn.Module, name: str) -> bool:
    """Whether a part of the plain tower is torch's attention."""
    try:
        return isinstance(tower.get_submodule(name), nn.MultiheadAttention)
    except AttributeError:
        return False


def _out_projections(
    weights: Mapping[str, Tensor], scalings: Mapping[str, float], base: DualEncoder
) -> dict[str, Tensor]:
    """The output projections of torch's attentions that have adapters, merged."""
    names = set()
    for side in scalings:
        ending = f".out_proj{adapter_folder.A}".replace(".weight", ".default.weight")
        for name in adapters.adapters(weights):
            layer = name.removeprefix(f"{side}.").removesuffix(ending)
            if name == f"{side}.{layer}{ending}" and _is_torchs(base.get_submodule(side), layer):
                names.add(f"{side}.{layer}.out_proj.weight")
    return {n: v for n, v in adapters.merged(weights, scalings).items() if n in names}


def _check_read_back(folder: Path, expected: Mapping[str, Tensor]) -> None:
    """Refuse to leave a folder that does not give the model that was trained."""
    model = checkpoint.load_any(folder)
    assert isinstance(model, DualEncoder)
    state = model.state_dict()
    for name, value in expected.items():
        if name not in state or (state[name] - value).abs().max() > TOLERANCE:
            raise ExportError(
                f"the adapters do not give the trained model again ({name} differs); export the "
                "model: leave out --form adapters"
            )


def _card(
    name: str,
    base: str,
    towers: list[str],
    license: str | None,
    training: Mapping[str, Any],
) -> str:
    """The folder's README.md; of a base on this machine it shows the last name alone."""
    front: dict[str, Any] = {"library_name": "peft", **licenses.metadata(license)}
    if places.on_hub(base):
        front["base_model"] = base.partition(":")[2]
    lines = yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip()
    folders = " and ".join(f"`{tower}`" for tower in towers)
    scale = f"\n{of_scale(training)}\n" if of_scale(training) else ""
    return (
        f"---\n{lines}\n---\n\n# {name}\n\nLow-rank adapters for `{averaging.card_name(base)}`, "
        "which is not in this folder, and in `rest.safetensors` what else was trained beside them. "
        f"vlp adds both to the base:\n\n{usage.vlp_block(name)}\n\n"
        f"peft's `PeftModel.from_pretrained` reads {folders} onto the plain tower of that name.\n"
        f"{scale}"
    )
