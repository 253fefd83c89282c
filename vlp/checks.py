"""Whether what a configuration names fits together: ranks, plan, objective, model and data. Each
check raises ValueError.
"""

from __future__ import annotations

from pathlib import Path

from vlp import dist, losses, teacher
from vlp.config import Config, Plan
from vlp.data.loader import Loader
from vlp.models.dual_encoder import DualEncoder


def check_batch(config: Config) -> None:
    """Refuse a batch that ranks and micro-batches do not divide."""
    rows, world, parts = config.train.batch, dist.world_size(), config.train.micro_batches
    if rows % (world * parts):
        near = max(world * parts, rows // (world * parts) * world * parts)
        raise ValueError(
            f"train.batch is {rows}, which {world} ranks x {parts} micro-batches do not divide; use train.batch={near}"
        )


def check_extent(step: int, plan: Plan, source: Path) -> None:
    """Refuse a checkpoint from beyond the run's end, which would be evaluated under the number of
    another step.
    """
    if step > plan.total:
        raise ValueError(
            f"{source} is of step {step:,}, and this run ends after {plan.total:,}; raise train.duration to {step} or more, "
            "or name an older checkpoint with resume="
        )


def check_objective(
    config: Config, objective: losses.Objective, loader: Loader, model: DualEncoder
) -> None:
    """Refuse what the objective lacks, what is given and not read, and what cannot stand for the
    image tower.
    """
    taught = teacher.supplies(config.teacher)
    stored = set() if loader.teacher_scale is None else {"teacher_scale"}
    check_needs(objective, loader.carries | stored | taught, model)
    check_use(objective, config, loader)
    if config.teacher.model is not None and "teacher_image" in loader.carries:
        raise ValueError(
            "both teacher.model and the sources' `embeddings` give a teacher's embeddings; leave out one of them"
        )
    if config.model.precomputed:
        check_precomputed(objective.needs, taught, loader, model)


def check_needs(objective: losses.Objective, carried: frozenset[str], model: DualEncoder) -> None:
    """Refuse an objective whose terms need what neither the data nor the model supplies, and heads
    that no term reads.
    """
    supplied = (
        carried | model.heads.supplies() | {"image", "text", "sample_id", "scale", "caption_ids"}
    )
    supplied |= {"bias"} if model.logit_bias is not None else set()
    missing = [
        f"the term {label!r} needs {name!r}, which this run does not have; it comes from {losses.supplier(name)}"
        for label, needs in objective.required.items()
        for name in sorted(needs - supplied)
    ]
    if missing:
        raise ValueError("\n".join(missing))
    if idle := sorted(model.heads.supplies() - objective.needs):
        raise ValueError(
            f"model.heads gives {idle}, which no term reads; drop that head (views.text: false), or add a term"
        )


def check_use(objective: losses.Objective, config: Config, loader: Loader) -> None:
    """Refuse what costs time or memory and is read by no term, and fewer views than a term needs."""
    for name, given in (
        (
            "teacher.ema",
            {"ema_image", "ema_text", "ema_negatives"} if config.teacher.ema is not None else set(),
        ),
        ("teacher.queue", {"queue_image", "queue_text"} if config.teacher.queue else set()),
        (
            "teacher.model",
            {"teacher_image", "teacher_text"} if config.teacher.model is not None else set(),
        ),
        ("data.views", {"image_views", "text_views"} if config.data.views is not None else set()),
    ):
        if given and not given & (
            objective.needs | ({"ema_image"} if config.teacher.queue else set())
        ):
            raise ValueError(
                f"{name} is set, but no term reads {' or '.join(sorted(given))}; drop it, or add a term"
            )
    for term in objective.plugins:
        least, found = getattr(term.module, "MIN_VIEWS", 0), loader.widths.get("image_views", 0)
        if found < least:
            raise ValueError(
                f"the term {term.label!r} needs {least} image views, found {found}; set data.views.n to {least}"
            )


def check_precomputed(
    needs: frozenset[str], taught: frozenset[str], loader: Loader, model: DualEncoder
) -> None:
    """Refuse stored embeddings of the image tower that cannot stand for it."""
    pictures = sorted(
        needs & {"negative_image", "image_views", "concept_logits", "caption_logits"}
        | taught & {"ema_image", "teacher_image"}
    )
    if pictures:
        raise ValueError(
            f"the objective needs {pictures}, which come from pixels; set image_tower.precomputed: false"
        )
    if any(p.requires_grad for p in model.visual.parameters()):
        raise ValueError(
            "part of the image tower still learns (the projection of a timm trunk); precomputed needs it whole"
        )
    width = loader.widths.get("teacher_image")
    if width is None:
        raise ValueError(
            "image_tower.precomputed reads stored embeddings, and no source names any: set data.sources.0.embeddings to what "
            "`vlp data embed` made with this image tower"
        )
    if width != model.embed_dim:
        raise ValueError(
            f"image_tower.precomputed reads the sources' `embeddings` (made by `vlp data embed` with this image tower): "
            f"found width {width}, expected {model.embed_dim}"
        )
