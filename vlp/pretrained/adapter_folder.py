"""A folder of adapters beside the base that they are added to (`vlp export --form adapters`).

    vlp_adapters.json   the base, a digest of its weights, the tuned model's description
    image/, text/       of each adapted tower peft's own adapter_config.json and
                        adapter_model.safetensors: PeftModel.from_pretrained(tower, folder) reads
                        them onto the plain tower
    rest.safetensors    what else was trained, whole: the scale, projections, towers without
                        adapters, output projections of torch's attention

Read as a model, W + (alpha/r)·B·A stand in plain towers, without peft.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vlp.pretrained import projections
from vlp.pretrained.fingerprints import fingerprint
from vlp.pretrained.folders import read_json
from vlp.pretrained.references import ADAPTERS, check_sections

REST = "rest.safetensors"
SIDES = {"visual": "image", "text": "text"}  # a tower's name in the model: its folder
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # peft's names

PREFIX = "base_model.model."  # of every name in peft's files
A, B = ".lora_A.weight", ".lora_B.weight"
# torch's attention has its input projection as a parameter, its output projection as a layer that
# it does not call; peft adapts both together, the latter under this name.
OUT_PROJ = ".base_layer.out_proj"

_REMEDY = "export the adapters again with vlp export RUN --form adapters"
# What is fitted to sizes of pictures and texts, and the numbers of every model.
_FITTED = re.compile(r"pos_embed|position|^logit_")
# What changes W + (alpha/r)·B·A into something else.
_OTHER_KINDS = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "layer_replication")


@dataclass(frozen=True)
class AdapterFolder:
    """What a folder says of itself."""

    folder: Path
    base: str  # a reference
    digest: str  # of the base's weights, see `digest_of`
    described: dict[str, Any]  # the tuned model, as open_clip_config.json
    keep: int | None  # positions of the text tower that stayed where its context was stretched
    new_projection: bool

    @classmethod
    def read(cls, folder: Path) -> AdapterFolder:
        """ValueError for a folder that says something else."""
        about = read_json(folder / ADAPTERS)
        kinds = {"base": str, "digest": str, "described": dict}
        wrong = [name for name, kind in kinds.items() if not isinstance(about.get(name), kind)]
        if wrong or "model_cfg" not in about["described"]:
            missing = ", ".join(wrong) or "model_cfg"
            raise ValueError(
                f"{folder / ADAPTERS} does not say {missing} of its adapters; {_REMEDY}"
            )
        described = {"preprocess_cfg": {}} | about["described"]
        check_sections(described, folder / ADAPTERS)
        return cls(
            folder,
            about["base"],
            about["digest"],
            described,
            about.get("keep"),
            bool(about.get("new_projection")),
        )

    def add_to(self, clip: nn.Module, own_projection: bool = False) -> None:
        """Add the adapters to a model with the base's weights, and put the rest in its place.

        own_projection: the model keeps its projections. ValueError for another base.
        """
        weights, rest = clip.state_dict(), _tensors(self.folder / REST)
        found_digest = digest_of(weights, clip, set(rest))
        if own_projection:
            fresh = projections.names(clip)
            rest = {name: value for name, value in rest.items() if name not in fresh}
        if "logit_bias" not in weights:
            rest.pop("logit_bias", None)

        self._check_shapes(weights, rest)
        if found_digest != self.digest:
            raise ValueError(
                f"{self.base} has other weights than {self.folder} was trained on (digest "
                f"{found_digest[:12]}, expected {self.digest[:12]}); set base in "
                f"{self.folder / ADAPTERS} to where those lie"
            )
        for side in self._adapted():
            weights |= self._added(side, weights)
        clip.load_state_dict(weights | {k: v.reshape(weights[k].shape) for k, v in rest.items()})

    def _adapted(self) -> list[str]:
        """The names of the adapted towers."""
        return [side for side, folder in SIDES.items() if (self.folder / folder).is_dir()]

    def _added(self, side: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """W + (alpha/r)·B·A of each adapted layer of a tower, by W's name."""
        folder = self.folder / SIDES[side]
        scaling, tensors = _scaling(folder), _tensors(folder / WEIGHTS)
        added = {}
        for layer, a, b in layers_of(tensors, folder / WEIGHTS):
            name = weight_of(f"{side}.{layer}", weights)
            if name is None or weights[name].shape != (b.shape[0], a.shape[1]):
                raise ValueError(
                    f"{folder / WEIGHTS} adapts {side}.{layer} [{b.shape[0]}, {a.shape[1]}], which "
                    f"{self.base} does not have; set base in {self.folder / ADAPTERS} to the model "
                    "that was adapted"
                )
            # In float64: the sum is rounded once.
            whole = weights[name].double() + scaling * (b.double() @ a.double())
            added[name] = whole.to(weights[name].dtype)
        return added

    def _check_shapes(self, weights: Mapping[str, Tensor], rest: Mapping[str, Tensor]) -> None:
        """Refuse a rest that is none of the model's."""
        foreign = [
            name
            for name, value in rest.items()
            if name not in weights or weights[name].numel() != value.numel()
        ]
        if foreign:
            raise ValueError(
                f"{self.folder} holds {len(foreign)} tensors that do not fit this model "
                f"({', '.join(sorted(foreign)[:3])}); build it with the towers and sizes that were "
                "trained, or name the folder in init_from"
            )


def layers_of(tensors: Mapping[str, Tensor], path: Path) -> list[tuple[str, Tensor, Tensor]]:
    """(layer of the tower, A, B) of peft's tensors, which `path` holds; ValueError for others."""
    layers = dict.fromkeys(name.removesuffix(A).removesuffix(B) for name in tensors)
    if not layers:
        raise ValueError(f"{path} holds no adapters; {_REMEDY}")

    # What is left out in silence would make another model: a bias, a layer that learned whole.
    other = [layer for layer in layers if layer in tensors]
    if other:
        raise ValueError(
            f"{path} holds {other[0]}, which is no A or B of plain LORA. Merge it with peft "
            "(merge_and_unload), and use the model"
        )
    for layer in layers:
        present = [layer + end for end in (A, B) if layer + end in tensors]
        if len(present) == 1:
            raise ValueError(f"{path} holds {present[0]} alone, of A and B; {_REMEDY}")
    return [
        (layer.removeprefix(PREFIX), tensors[layer + A], tensors[layer + B]) for layer in layers
    ]


def weight_of(layer: str, weights: Mapping[str, Tensor]) -> str | None:
    """The weight that a layer of peft's files adapts; None where there is none."""
    if layer.endswith(OUT_PROJ):
        layer = layer.removesuffix(OUT_PROJ) + ".out_proj"
    names = (f"{layer}.weight", f"{layer}.in_proj_weight")
    return next((name for name in names if name in weights), None)


def digest_of(weights: Mapping[str, Tensor], clip: nn.Module, rest: set[str]) -> str:
    """A hash of the base's weights: those of a model that the adapters left as they were, but for
    projections and what is fitted to sizes.
    """
    changeable = rest | _projections(clip)
    compared = {
        name: value.float() if value.is_floating_point() else value
        for name, value in weights.items()
        if name not in changeable and not _FITTED.search(name)
    }
    return fingerprint(compared, "")


def _projections(clip: nn.Module) -> set[str]:
    """The projections' names; none of towers whose features are the embedding."""
    try:
        return projections.names(clip)
    except ValueError:
        return set()


def _scaling(folder: Path) -> float:
    """alpha/r of a tower's adapters; ValueError for adapters of another kind than plain LoRA."""
    config = read_json(folder / CONFIG)
    other = [name for name in _OTHER_KINDS if config.get(name)]
    if config.get("peft_type") != "LORA" or other:
        kind = config.get("peft_type")
        raise ValueError(
            f"{folder / CONFIG} is of peft's {kind} with {other or 'no options'}; expected plain "
            "LORA. Merge it with peft (merge_and_unload), and use the model"
        )
    alpha, rank = config.get("lora_alpha"), config.get("r")
    if not isinstance(alpha, (int, float)) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"{folder / CONFIG} says lora_alpha {alpha} and r {rank}; {_REMEDY}")
    return alpha / rank


def _tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of the folder; ValueError where it is absent or damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read ({error}); {_REMEDY}") from None
