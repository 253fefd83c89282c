"""Puts a run together: what all of it shares, and what the steps of one part of it work with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vlp import (
    checkpoint,
    dist,
    engines,
    flops,
    log,
    losses,
    micro_batches,
    online_judge,
    optim,
    selection,
    stages,
    stored_embeddings,
    teacher,
)
from vlp.checks import check_extent, check_objective, check_tasks, check_tokens
from vlp.config import Config, Data, Plan, WholePlan
from vlp.data import labels, looks
from vlp.data.loader import Loader
from vlp.engines import Engine
from vlp.models.build import build as build_model
from vlp.models.build import fit_of
from vlp.models.dual_encoder import DualEncoder
from vlp.online_judge import OnlineJudge
from vlp.pretrained import references
from vlp.pretrained.read_once import read_once
from vlp.resume import (
    go_on_from,
    on_all,
    open_run,
    shared_layout,
    start_from,
    with_precision,
)
from vlp.seeds import derive
from vlp.selection import Selection
from vlp.stages import Segment
from vlp.step import Training
from vlp.text_store import TextStore
from vlp.validation import Validator
from vlp.watch import check as check_watched


@dataclass
class Run:
    """What all of a run has in common, checked."""

    config: Config
    engine: Engine
    source: Path | None  # the checkpoint it goes on from
    model: DualEncoder  # as configured; a stage makes one of its own
    final: dict[str, Any]  # the description of the model in which the run ends
    selector: Selection
    loader: Loader
    segments: list[Segment]
    rate: Callable[[int], float]


@dataclass
class Part:
    """What the steps of a segment work with."""

    model: DualEncoder
    selector: Selection
    training: Training
    utilisation: flops.Utilisation | None
    validator: Validator | None


def set_up(config: Config, engine: Engine) -> Run:
    """Check and build what all segments share. Collective; writes nothing of the run."""
    # What is mistyped is answered before weights and data are read.
    source = open_run(config)
    check_names(config)
    config = with_precision(config, source, engine.device)

    # The model before the data: its towers say which pixels and tokens the loader delivers.
    model = initial_model(config)
    losses.check_width(config.objective, model.embed_dim)
    check_tokens(config.objective, model)
    optim.build(model, config.train.optimizer)  # its groups name parameters that must be there
    check_tasks(config, model, shards_model=engines.shards_model(engine))
    selector = selection.build(config, model, engine)
    loader = open_data(config, model, selector)

    # Ranks index at different speeds, and would meet first where a limit of time holds.
    dist.await_all("the last rank to index the data")

    # How many steps the run has depends on how many samples, and what a stage may be on the model.
    segments = stages.of_run(config, loader, selector.loaded // config.train.batch)
    final = stages.final_form(segments, model)
    stages.check(config, segments, engine, final)
    check_selections(segments, model)
    warn_of_other_batches(config, segments)
    whole = WholePlan([segment.plan for segment in segments])
    rate = optim.Schedule(config.train.optimizer, whole)
    return Run(config, engine, source, model, final.description(), selector, loader, segments, rate)


def check_selections(segments: Sequence[Segment], model: DualEncoder) -> None:
    """Refuse a stage whose batches the selection cannot be made of. ValueError."""
    for segment in segments:
        try:
            selection.check(segment.config, model)
        except ValueError as error:
            raise ValueError(f"{segment.place}{error}") from error


def check_candidates(segments: Sequence[Segment], objective: losses.Objective) -> None:
    """Refuse a stage whose batches have fewer candidates than terms need. ValueError."""
    for segment in segments:
        n_rows = segment.plan.batch // dist.world_size()
        try:
            objective.check_candidates(n_rows)
            online_judge.check_candidates(segment.config, objective, n_rows)
        except ValueError as error:
            raise ValueError(f"{segment.place}{error}") from error


def warn_of_other_batches(config: Config, segments: Sequence[Segment]) -> None:
    """Say where the losses over held-out samples are of several numbers of candidates."""
    batches = [segment.plan.batch for segment in segments]
    if config.validation is None or config.validation.batch or len(set(batches)) == 1:
        return
    if dist.is_main():
        listed = ", ".join(map(str, batches))
        log.warn(
            f"validation: its batch is that of each stage ({listed}), and val.loss over more "
            "candidates is higher by itself; set validation.batch to one size to compare stages"
        )


def begin(run: Run, segment: Segment, source: Path | None) -> Part:
    """Build what the steps of a segment work with, from `source` on or with new weights.
    Collective; writes nothing of the run.
    """
    config, plan, engine, loader = segment.config, segment.plan, run.engine, run.loader
    model, selector = run.model, run.selector
    # Without stages the model by which the data were opened is the one that is trained.
    if run.config.stages:
        model = initial_model(config)
        selector = selection.build(config, model, engine)
        loader.enter(segment.batches, model.image_spec, segment.text_spec(model))
        segment.say(model)

    objective = build_objective(config, loader, plan, engine)
    check_objective(config, objective, loader, model)
    later = run.segments[segment.number :]
    check_candidates(later, objective)
    validator = open_validation(segment, later, model, loader)
    held_out = [] if validator is None else validator.loader.sources

    # The weights of the checkpoint before the engine divides them over ranks; whatever else it
    # holds after that, when the parts exist that take it over.
    contents = load_weights(model, source, plan)
    sources = [*loader.sources, *held_out]
    captions = config.data.captions
    stored_embeddings.check(sources, model, captions, precomputed=config.model.precomputed)
    stored_embeddings.check_texts(
        sources, loader.store, model, captions, evaluates=bool(config.eval)
    )
    say_start(config, model, loader, objective, plan, source)

    dtype = engines.compute_dtype(config.train, engine.device)
    utilisation = flops.utilisation(model, engine.device, dtype)
    rate = segment.rate(run.rate)
    training = prepare(config, engine, model, objective, rate, loader, contents)
    if contents is not None:
        go_on_from(contents, training, loader)
    if training.judge is not None:
        log.say(training.judge.cost(loader.widths.get("negatives", 0), plan.batch))
    return Part(model, selector, training, utilisation, validator)


def check_places(config: Config) -> None:
    """Refuse references to models that lead nowhere, as far as no Hub need be asked."""
    for reference in (config.init_from, *config.teacher.models):
        if reference:
            references.check(reference)


def check_names(config: Config) -> None:
    """Refuse trackers that are not installed, optimisers that do not exist, and references to
    models that lead nowhere.
    """
    log.check_trackers(config.log.trackers)
    optim.check(config.train.optimizer)
    check_watched(config)
    for reference in (config.init_from, *config.teacher.models):
        if reference:
            references.resolve(reference)
    judge = online_judge.named(config.teacher)
    if judge is not None:
        judge.check()


def initial_model(config: Config) -> DualEncoder:
    """The model with the weights that a new run starts from, the same on every rank."""
    torch.manual_seed(derive(config.seed, "init"))
    start = None
    if config.init_from is not None:
        # Before towers are locked and adapted: published weights know no adapters.
        start = partial(start_from, reference=config.init_from, fit=fit_of(config.model))
    model = build_model(config.model, start, texts_alone=config.data.pairs == "text")

    # Where no term learns the scale it would stay at its start, which fits no term.
    own = losses.own_scale(config.objective)
    if own is not None:
        model.scaling.set(own[1])
    return model


def open_data(config: Config, model: DualEncoder, selector: Selection) -> Loader:
    """The loader of this rank, in the form that model, objective and selection read."""
    stored_texts = config.model.stored_texts
    with looks.once_a_machine(config.data.sources):
        loader = Loader(
            labelled(config),
            model.image_spec,
            model.text_spec,
            mixture=selector.mixture,
            batch=selector.loaded,
            seed=config.seed,
            rank=dist.rank(),
            world=dist.world_size(),
            pixels=not config.model.precomputed,
            reads=losses.reads(config.objective) | selector.needs | online_judge.reads(config),
            store=None if stored_texts is None else TextStore(stored_texts),
            modalities=model.modality_shapes,
            decoded=model.decoded_modalities,
        )
    selector.check(loader.carries, len(loader.teacher_widths))
    return loader


def labelled(config: Config) -> Data:
    """The section `data`, with the labels that terms read and the concepts that the head knows."""
    # One line of the objective is enough: positives: caption needs no key of the data.
    read_labels = [
        getattr(term.options, "positives", None) for term in losses.leaves(config.objective)
    ]
    n_concepts = config.model.heads.concepts
    if config.data.concepts not in (None, n_concepts):
        raise ValueError(
            f"data.concepts is {config.data.concepts} and model.heads.concepts {n_concepts}; the "
            "head has an output for each concept: write one number, or leave out data.concepts"
        )
    return replace(
        config.data,
        labels=labels.kind_of(config.data.labels, read_labels),
        concepts=n_concepts or None,
    )


def open_validation(
    segment: Segment, later: Sequence[Segment], model: DualEncoder, loader: Loader
) -> Validator | None:
    """What measures the loss over held-out samples in a segment, if the configuration names some.
    ValueError also where it could not in a later one.
    """
    config = segment.config
    if config.validation is None:
        return None
    validator = Validator(
        config.validation, config, labelled(config), model, segment.text_spec(model), loader
    )
    of_judge = online_judge.supplies(config.teacher) - loader.carries
    supplies = teacher.supplies(config.teacher) | of_judge
    validator.prepare(config, segment.plan, model, supplies)
    for other in later:
        validator.batches_of(config.validation.batch or other.plan.batch)
    return validator


def build_objective(config: Config, loader: Loader, plan: Plan, engine: Engine) -> losses.Objective:
    """The objective, with what only the run knows: its samples and steps."""
    return losses.build(
        config.objective,
        **vars(config.pairwise),
        seed=config.seed,
        samples=loader.n_samples,
        steps=plan.total,
        texts_apart=engines.shards_model(engine),
    )


def load_weights(model: DualEncoder, source: Path | None, plan: Plan) -> checkpoint.Contents | None:
    """Restore the model from a checkpoint; returns all that it holds, or None for a new run."""
    if source is None:
        return None
    # `open_run` has compared the hashes.
    layout = shared_layout(source)
    stored = on_all(lambda: checkpoint.load(source, verified=True, layout=layout))
    model_weights, of_teacher = read_once(stored.model), read_once(stored.teacher)
    contents = replace(stored, model=model_weights, teacher=of_teacher)
    check_extent(contents.state["step"], plan, source)
    # At a joint it is of the stage before, whose pictures may have had another size.
    if contents.state["step"] == plan.first:
        contents = stages.in_form_of(model, contents)
    checkpoint.restore(model, contents.model, source)
    return contents


def prepare(
    config: Config,
    engine: Engine,
    model: DualEncoder,
    objective: losses.Objective,
    rate: Callable[[int], float],
    loader: Loader,
    contents: checkpoint.Contents | None,
) -> Training:
    """Hand the model to the engine; returns what `train_step` works on. Collective."""
    engine.prepare(model, config.train)

    constants: dict[str, Any] = {}
    if loader.teacher_scale is not None:
        teacher.check_map(model, loader.teacher_widths)
        # On the device from the start: a number would be sent there in every step.
        constants["teacher_scale"] = torch.tensor(loader.teacher_scale, device=engine.device)
    if model.modality_shapes:
        constants["other_names"] = tuple(model.modality_shapes)
    if model.heads.translators is not None:
        constants["translations"] = tuple(model.heads.translators.directions)
    training = Training(
        engine,
        objective,
        learning_rate=rate,
        seed=config.seed,
        micro_batches=micro_batches.count(
            config.train,
            loader.widths,
            micro_batches.embedded(objective, model),
            n_sides=2 if config.data.pairs == "text" else 1,
        ),
        dtype=engines.compute_dtype(config.train, engine.device),
        constants=constants,
        precomputed=config.model.precomputed,
        may_skip=config.train.max_skipped if config.train.non_finite == "skip" else 0,
    )

    needs = objective.needs
    if config.teacher.cross_encoder is not None:
        training.judge = OnlineJudge(
            config.teacher, objective, loader.carries, engine.device, training.dtype
        )
        needs |= training.judge.queued

    # After the engine: a moving average is a copy of what the engine made of the model.
    if teacher.supplies(config.teacher):
        saved = {} if contents is None else contents.teacher
        training.teacher = teacher.Teacher(
            config.teacher, engine, model, needs, saved, loader.teacher_shape
        )
    return training


def say_start(
    config: Config,
    model: DualEncoder,
    loader: Loader,
    objective: losses.Objective,
    plan: Plan,
    source: Path | None,
) -> None:
    """Two lines on what is about to be trained, by which a wrong setting shows at once."""
    n_parameters = sum(p.numel() for p in model.parameters())
    n_steps = plan.end - plan.first
    n_epochs = n_steps / plan.steps_per_epoch
    log.say(
        f"{config.out}: {loader.n_samples:,} samples, {n_parameters / 1e6:.1f} M parameters, "
        f"{n_steps:,} steps of {plan.batch} ({n_epochs:.1f} epochs), "
        f"{dist.world_size()} process(es), {config.train.precision}"
    )

    terms = ", ".join(term.label for term in config.objective)
    n_candidates = objective.candidates(plan.batch // dist.world_size())
    origin = f"; continuing {source}" if source else ""
    log.say(
        f"objective {terms}; {n_candidates} candidates a row, "
        f"log n = {math.log(n_candidates):.3f}{origin}"
    )
