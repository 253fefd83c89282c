"""A reference becomes a model: a dual encoder, or several of them as one."""

from __future__ import annotations

from pathlib import Path

from vlp.models.build import from_description
from vlp.models.concatenated import Concatenated
from vlp.models.dual_encoder import DualEncoder
from vlp.models.heads import last_step
from vlp.pretrained import references, weight_files
from vlp.pretrained.fitting import UNCHANGED, Fit


def load(
    reference: str | Path | references.Reference,
    like: DualEncoder | None = None,
    fit: Fit = UNCHANGED,
) -> DualEncoder | Concatenated:
    """The model behind a reference (vlp.pretrained.references), a run's excepted:
    `vlp.checkpoint.load_any` takes those too.

    `like`: the model whose architecture a file of weights alone has; `fit`: how these enter it.
    Several models as one give a `vlp.models.concatenated.Concatenated`. ValueError says what was
    found where the model was looked for.
    """
    resolved = references.resolve(reference)
    if resolved.kind == "concatenated":
        return load_concatenated(resolved.path)
    if resolved.kind == "run":
        raise ValueError(
            f"{resolved.text} is a run; load it with vlp.checkpoint.load_any, or export it"
        )

    weights = weight_files.behind(resolved)
    if weights.described:
        return from_description(
            weights.described, weights.path, stated=weights.stated, added=weights.adapters
        )
    if like is None:
        raise ValueError(
            f"{resolved.text} holds weights, which do not say their architecture; write "
            f"{references.architecture_hint(resolved.path)}"
        )
    quick_gelu = bool(like.open_clip_config.get("quick_gelu", False))
    weight_files.check_activation(weights.path, quick_gelu)

    # Weights of towers alone: the heads of `like` are not theirs.
    described = like.description()
    ours = described["vlp"]
    towers_alone = {"scale": ours["scale"], "heads": last_step(ours["heads"])}
    return from_description(described | {"vlp": towers_alone}, weights.path, fit)


def load_concatenated(folder: Path) -> Concatenated:
    """The model that `export` wrote to a folder, on the CPU."""
    members = [load(folder / name) for name in references.members_of(folder)]
    return Concatenated([member for member in members if isinstance(member, DualEncoder)])
