"""Whether what a configuration names fits together: ranks, plan, objective, model and data. Each
check raises ValueError.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from vlp import dist, losses, online_judge, teacher
from vlp.config import Config, Plan
from vlp.data.loader import Loader
from vlp.data.text import frame
from vlp.fields import CARRIED, FIELDS, TOKENS, supplier
from vlp.models.dual_encoder import DualEncoder
from vlp.plugin import Plugin

# What every run has, whatever its data, heads and teachers.
_EVERY_RUN = {"image", "text", "sample_id", "scale", "caption_ids"}
# What the image tower makes of pixels, besides the embedding that may be stored in its place.
_FROM_PIXELS = {
    name
    for name, row in FIELDS.items()
    if row.tower == "image" and (row.batch_shape or row.head or row.tokens_of) and name != "image"
}


def check_patience(config: Config) -> None:
    """Refuse a source that may be waited for longer than the ranks wait for one another."""
    timeout_s = 60 * config.train.timeout_minutes
    sources = {f"data.sources.{s}": plugin for s, plugin in enumerate(config.data.sources)}
    if config.validation is not None:
        held_out = enumerate(config.validation.data.sources)
        sources |= {f"validation.data.sources.{s}": plugin for s, plugin in held_out}

    for place, plugin in sources.items():
        patience_s = getattr(plugin.options, "patience_s", 0.0)
        if dist.world_size() > 1 and patience_s >= timeout_s:
            raise ValueError(
                f"{place}.patience_s is {patience_s:g}, but after train.timeout_minutes = "
                f"{config.train.timeout_minutes:g} ({timeout_s:g} s) the other ranks give up; set "
                "it lower, or the minutes higher"
            )


def check_batch(config: Config) -> None:
    """Refuse a batch, of the run or of a stage, that ranks and micro-batches do not divide."""
    train, world = config.train, dist.world_size()
    sizes = {"train": (train.batch, train.micro_batches)}
    for i, stage in enumerate(config.stages):
        rows, parts = stage.batch or train.batch, stage.micro_batches or train.micro_batches
        sizes[f"stages.{i}"] = rows, parts

    for place, (rows, parts) in sizes.items():
        n_parts = world * parts
        if rows % n_parts:
            near = max(n_parts, rows // n_parts * n_parts)
            raise ValueError(
                f"{place}.batch is {rows}, which {world} ranks x {parts} micro-batches do not "
                f"divide; use {place}.batch={near}"
            )


def check_teacher(config: Config) -> None:
    """Refuse a teacher that would have to read captions where their embeddings are stored."""
    if config.model.stored_texts is not None and config.teacher.model is not None:
        raise ValueError(
            f"teacher.model {config.teacher.model} reads tokens, and text_tower: stored reads "
            "stored embeddings in their place; store the teacher's with `vlp data embed` too, and "
            "name them in the source's `embeddings`"
        )


def check_extent(step: int, plan: Plan, source: Path) -> None:
    """Refuse a checkpoint from beyond the run's end, which would be evaluated under the number of
    another step.
    """
    if step > plan.total:
        raise ValueError(
            f"{source} is of step {step:,}, and this run ends after {plan.total:,}; raise "
            f"train.duration to {step} or more, or name an older checkpoint with resume="
        )


def check_tasks(config: Config, model: DualEncoder, shards_model: bool) -> None:
    """Refuse evaluation tasks that a run could not carry out. `shards_model`: each rank holds only
    a part of the model.
    """
    for task in config.eval:
        if not getattr(task.module, "NEEDS_DECODER", False):
            continue
        if model.text_decoder is None:
            raise ValueError(
                f"eval.{task.label}: the model has no text decoder, which the task needs; set "
                "model.decoder, or leave the task out"
            )

        # Ranks whose captions end at other places would wait for one another for ever.
        if shards_model:
            raise ValueError(
                f"eval.{task.label}: captions are written token by token, which ranks that hold "
                "parts of a model (fsdp2, zero3) cannot do side by side; leave the task out, and "
                "run `vlp eval` on the checkpoint"
            )
        frame(model.text_spec)  # a tokenizer that has none is refused here


def check_captioning(objective: losses.Objective, model: DualEncoder) -> None:
    """Refuse a text decoder that would learn padding, or never an end, from this tokenizer."""
    if model.text_decoder is None:
        return
    padding = frame(model.text_spec).padding
    for term in losses.leaves(objective.plugins):
        if term.name != "captioning":
            continue
        if term.options.padding != padding:
            raise ValueError(
                f"the term {term.label!r} leaves out the id {term.options.padding} as padding, and "
                f"the tokenizer {model.text_spec.tokenizer} pads with {padding}; set "
                f"captioning.padding={padding}"
            )


def check_objective(
    config: Config, objective: losses.Objective, loader: Loader, model: DualEncoder
) -> None:
    """Refuse what the objective lacks, what is supplied and not read, and what cannot stand for the
    image tower.
    """
    taught = teacher.supplies(config.teacher) | online_judge.supplies(config.teacher)
    stored = set() if loader.teacher_scale is None else {"teacher_scale"}

    check_needs(objective, loader.carries | stored | taught, model)
    check_use(objective, config, loader)
    n_rows = config.train.batch // dist.world_size()
    online_judge.check(config, objective, loader.carries, n_rows)
    check_roles(objective, config)
    check_modalities(objective, model, n_rows)
    check_captioning(objective, model)

    # Two sources of one field: whichever won, the other would be ignored in silence.
    if config.teacher.models and "teacher_image" in loader.carries:
        raise ValueError(
            "both teacher.model and the sources' `embeddings` give a teacher's embeddings; leave "
            "out one of them"
        )

    by_heads = objective.reads & model.supplies()
    read = objective.needs | through_queue(objective) | by_heads
    if config.model.precomputed:
        check_precomputed(read, taught, loader, model)
    if config.data.pairs == "text" and (pictures := sorted(read & from_pixels(model))):
        raise ValueError(
            f"the objective needs {pictures}, which come from pixels, and data.pairs is text; take "
            "a term that compares embeddings"
        )


def from_pixels(model: DualEncoder) -> set[str]:
    """The fields that only a pass of pictures through the image tower gives."""
    translators = model.heads.translators
    if translators is None or "image" not in translators.names:
        return _FROM_PIXELS
    # Both ways of a pair are made in one pass of the head, or neither.
    return _FROM_PIXELS | {"translated", "cycled"}


def check_needs(objective: losses.Objective, carried: frozenset[str], model: DualEncoder) -> None:
    """Refuse an objective whose terms need what neither the data nor the model supplies, and heads
    that no term reads.
    """
    by_heads = model.supplies()
    supplied = carried | by_heads | _tokens(carried, model) | _EVERY_RUN
    if model.logit_bias is not None:
        supplied |= {"bias"}

    # All at once: the user mends the configuration in one go.
    missing = []
    for label, needs in objective.required.items():
        for name in sorted(needs - supplied):
            missing.append(
                f"the term {label!r} needs {name!r}, which this run does not have; it comes from "
                f"{supplier(name)}"
            )
    if missing:
        raise ValueError("\n".join(missing))

    # Under DDP and DeepSpeed a step would wait for gradients that never come.
    if model.text_decoder is not None and "caption_nll" not in objective.reads:
        raise ValueError(
            "the model has a text decoder (the architecture's, or model.decoder), and no term "
            "trains it; add captioning: {weight: 2}, or take an architecture without one"
        )
    if idle := sorted(by_heads - objective.reads):
        raise ValueError(
            f"model.heads gives {idle}, which no term reads; drop that head (of views one side by "
            "views.text: false or views.image: false), or add a term"
        )


def check_tokens(terms: Iterable[Plugin], model: DualEncoder) -> None:
    """Refuse terms that read tokens of a tower that gives none, which no data can mend."""
    for term in losses.leaves(terms):
        for name in sorted(losses.needs(term) & TOKENS.keys()):
            side = TOKENS[name].tower
            if reason := model.tokens_refusal(side):
                raise ValueError(
                    f"the term {term.label!r} needs {name!r}, and the {side} tower {reason}; it "
                    f"comes from {supplier(name)}"
                )


def _tokens(carried: frozenset[str], model: DualEncoder) -> frozenset[str]:
    """The fields of tokens that the towers give of what the data carry, and their masks."""
    names: set[str] = set()
    for name, row in TOKENS.items():
        if row.tokens_of in carried | _EVERY_RUN and not model.tokens_refusal(row.tower):
            names |= {name} if row.tower == "image" else {name, row.valid}
    return frozenset(names)


def check_use(objective: losses.Objective, config: Config, loader: Loader) -> None:
    """Refuse what costs time or memory and no term reads, and fewer views than a term needs."""
    read = objective.needs | through_queue(objective)
    # Some terms take further views where they can be embedded.
    if config.model.heads.views is not None:
        read |= objective.reads
    for key, supplied in _costly(config).items():
        if not supplied & read:
            names = " or ".join(sorted(supplied))
            way_out = "drop it, or add a term"
            if key == "teacher.ema":
                way_out = "drop it, add a term, or evaluate it with teacher.eval_ema=true"
            if key == "data.views" and supplied & objective.reads:
                way_out = "add the head that they pass, model.heads={views: {}}"
            raise ValueError(f"{key} is set, but no term reads {names}; {way_out}")

    # Terms that compare views with one another need several.
    n_views = loader.widths.get("image_views", 0)
    for term in losses.leaves(objective.plugins):
        least = losses.min_views(term)
        if n_views < least:
            raise ValueError(
                f"the term {term.label!r} needs {least} image views, found {n_views}; "
                f"set data.views.n to {least}"
            )


def through_queue(objective: losses.Objective) -> set[str]:
    """What the queue reads beside the terms: the moving average fills its own part of it."""
    return {"ema_image"} if objective.needs & teacher.OF_AVERAGE.keys() else set()


def check_roles(objective: losses.Objective, config: Config) -> None:
    """Refuse weights of captions that are not those of the roles, in the order of their columns."""
    roles = config.data.captions.roles
    for term in losses.leaves(objective.plugins):
        weights = list(term.options.weights) if term.name == "captions" else []
        if weights and weights != roles:
            raise ValueError(
                f"the term {term.label!r} has weights for {', '.join(weights)}, and "
                f"data.captions.roles is {roles}; name the same roles in the same order"
            )


def check_modalities(objective: losses.Objective, model: DualEncoder, n_rows: int) -> None:
    """Refuse terms that cannot compare the modalities of the model in batches of so many rows."""
    names = ["image", "text", *model.modality_shapes]
    n = objective.candidates(n_rows)
    try:
        losses.check_modalities(objective.plugins, names, model.embed_dim, n)
    except ValueError as error:
        raise ValueError(f"{error} (model.heads.modalities adds further ones)") from error


def _costly(config: Config) -> dict[str, set[str]]:
    """The configured keys that cost something, and the fields that each supplies."""
    keys = {}
    # An average that is evaluated has its use.
    if config.teacher.ema is not None and not config.teacher.eval_ema:
        keys["teacher.ema"] = teacher.embeds(teacher.EMA)
    if config.teacher.queue:
        keys["teacher.queue"] = teacher.embeds(teacher.QUEUE)
    if config.teacher.models:
        keys["teacher.model"] = teacher.embeds(teacher.FROZEN)
    if config.data.views is not None:
        keys["data.views"] = {name for name, row in CARRIED.items() if row.head == "views"}
    return keys


def check_precomputed(
    read: frozenset[str], taught: frozenset[str], loader: Loader, model: DualEncoder
) -> None:
    """Refuse stored embeddings of the image tower that cannot stand for it."""
    # The image tower does not run, so nothing can be made of other pixels.
    of_tower = from_pixels(model) | {"ema_image"}
    pictures = sorted(read & of_tower | taught & {"teacher_image"})
    if pictures:
        raise ValueError(
            f"the objective needs {pictures}, which come from pixels; set "
            "image_tower.precomputed: false"
        )

    # What still learns would have to run.
    if any(parameter.requires_grad for parameter in model.visual.parameters()):
        raise ValueError(
            "part of the image tower still learns (the projection of a timm trunk); precomputed "
            "needs it whole"
        )

    if not loader.teacher_shape:
        raise ValueError(
            "image_tower.precomputed reads stored embeddings, and no source names any: set "
            "data.sources.0.embeddings to what `vlp data embed` made with this image tower"
        )

    if loader.teacher_shape != (model.embed_dim,):
        width = " x ".join(map(str, loader.teacher_shape))
        raise ValueError(
            "image_tower.precomputed reads the sources' `embeddings` (made by `vlp data embed` "
            f"with this image tower): found width {width}, expected {model.embed_dim}"
        )
