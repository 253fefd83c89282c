"""The loop: step, log, evaluate, save. Everything that decides numbers lives in `vlp.step` and
`vlp.data`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import closing, suppress
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
    optim,
    selection,
    stages,
    stored_embeddings,
    teacher,
)
from vlp.checks import check_batch, check_extent, check_objective, check_teacher
from vlp.config import Config, Data, Plan
from vlp.data import labels, server
from vlp.data.loader import Loader
from vlp.engines import Engine
from vlp.leaving import explained, leave, leave_if_asked
from vlp.lifetime import Interrupted, StopRequest
from vlp.measurements import means_over_ranks
from vlp.midway import Evaluate, Midway
from vlp.models.build import build as build_model
from vlp.models.build import fit_of
from vlp.models.dual_encoder import DualEncoder
from vlp.out_of_memory import fitting
from vlp.plugin import Plugin
from vlp.pretrained.references import resolve as resolve_reference
from vlp.reporter import Reporter
from vlp.resume import (
    alone_in,
    go_on_from,
    open_run,
    reader_of,
    set_branch_aside,
    start_from,
    with_precision,
)
from vlp.saving import Saver
from vlp.seeds import derive
from vlp.selection import Selection
from vlp.stages import Segment
from vlp.step import Training, settle, train_step
from vlp.text_store import TextStore
from vlp.types import Batch
from vlp.validation import Validator
from vlp.watch import Watch
from vlp.watch import check as check_watched


def train(config: Config, evaluate: Evaluate | None = None) -> Path:
    """Run `config` to its end; returns the run's folder. A signal that asks to stop saves the run
    and raises Stopped.

    `evaluate` is called on every rank when tasks of `config.eval` are due. Raises FileExistsError
    for an output folder that holds a run, ValueError for settings that do not fit each other or the
    data, CheckpointError for a checkpoint that does not fit.
    """
    # First, because its imports take seconds, which pass beside ours.
    server.start_for(config)

    # The ranks have to be joined before anything is decided for all of them.
    engine = engines.start(config.train)
    check_batch(config)
    check_teacher(config)
    with alone_in(Path(config.out)):
        return _train(set_up(config, engine), evaluate)


def _train(run: Run, evaluate: Evaluate | None) -> Path:
    """`train`, in a folder that is held."""
    config, source = run.config, run.source
    if config.stages and evaluate is not None:
        evaluate = in_final_form(evaluate, run.model.description())
    report: Reporter | None = None
    watch: Watch | None = None
    saver = Saver(Path(config.out), config.checkpoint.keep)

    try:
        for segment in stages.left_of(run.segments, source):
            part = begin(run, segment, source)
            training, plan = part.training, segment.plan
            if source is not None:
                set_branch_aside(Path(config.out), training.step)

            # It writes config.yaml, which makes the folder a run: not before all was checked.
            report = report or Reporter(config, plan, training.step)
            report.plan, report.utilisation = plan, part.utilisation
            watch = watch or Watch(config, training.step)
            midway = Midway(config, plan, training, report, evaluate, part.validator)
            loop(config, training, run.loader, part.selector, plan, midway, watch, report, saver)
            if watch.reason() is not None:
                break

            # The next one starts from what this one saved, as if the run had been stopped.
            source = stages.joint(config, plan.end)
            del part, training, midway  # their memory is the next one's
    finally:
        run.loader.close()
        if report is not None:
            report.close()
    return Path(config.out)


@dataclass
class Run:
    """What all of a run has in common, checked."""

    config: Config
    engine: Engine
    source: Path | None  # the checkpoint it goes on from
    model: DualEncoder  # as it is at the end; a stage makes one of its own
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
    optim.build(model, config.train.optimizer)  # its groups name parameters that must be there
    selector = selection.build(config, model, engine)
    loader = open_data(config, model, selector)

    # Ranks index at different speeds, and would meet first where a limit of time holds.
    dist.await_all("the last rank to index the data")

    # How many steps the run has depends on how many samples, and what a stage may be on the model.
    segments = stages.of_run(config, loader, selector.loaded // config.train.batch)
    stages.check(segments, engine, model)
    rate = optim.Schedule(config.train.optimizer, segments[0].plan)
    return Run(config, engine, source, model, selector, loader, segments, rate)


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

    objective = build_objective(config, loader, plan)
    check_objective(config, objective, loader, model)
    validator = open_validation(config, model, loader, plan)
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
    return Part(model, selector, training, utilisation, validator)


def check_names(config: Config) -> None:
    """Refuse trackers that are not installed, optimisers that do not exist, and references to
    models that lead nowhere.
    """
    log.check_trackers(config.log.trackers)
    optim.check(config.train.optimizer)
    check_watched(config)
    for reference in (config.init_from, *config.teacher.models):
        if reference:
            resolve_reference(reference)


def initial_model(config: Config) -> DualEncoder:
    """The model with the weights that a new run starts from, the same on every rank."""
    torch.manual_seed(derive(config.seed, "init"))
    start = None
    if config.init_from is not None:
        # Before towers are locked and adapted: published weights know no adapters.
        start = partial(start_from, reference=config.init_from, fit=fit_of(config.model))
    model = build_model(config.model, start)

    # Where no term learns the scale it would stay at its start, which fits no term.
    own = losses.own_scale(config.objective)
    if own is not None:
        model.scaling.set(own[1])
    return model


def open_data(config: Config, model: DualEncoder, selector: Selection) -> Loader:
    """The loader of this rank, in the form that model, objective and selection read."""
    stored_texts = config.model.stored_texts
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
        reads=losses.reads(config.objective) | selector.needs,
        store=None if stored_texts is None else TextStore(stored_texts),
    )
    selector.check(loader.carries, len(loader.teacher_widths))
    return loader


def labelled(config: Config) -> Data:
    """The section `data`, with the labels that terms read."""
    # One line of the objective is enough: positives: caption needs no key of the data.
    read_labels = [getattr(term.options, "positives", None) for term in config.objective]
    return replace(config.data, labels=labels.kind_of(config.data.labels, read_labels))


def open_validation(
    config: Config, model: DualEncoder, loader: Loader, plan: Plan
) -> Validator | None:
    """What measures the loss over held-out samples, if the configuration names some."""
    if config.validation is None:
        return None
    validator = Validator(config.validation, config, labelled(config), model, loader)
    validator.prepare(config, plan, model, teacher.supplies(config.teacher))
    return validator


def build_objective(config: Config, loader: Loader, plan: Plan) -> losses.Objective:
    """The objective, with what only the run knows: its samples and steps."""
    return losses.build(
        config.objective,
        **vars(config.pairwise),
        seed=config.seed,
        samples=loader.n_samples,
        steps=plan.total,
    )


def load_weights(model: DualEncoder, source: Path | None, plan: Plan) -> checkpoint.Contents | None:
    """Restore the model from a checkpoint; returns all that it holds, or None for a new run."""
    if source is None:
        return None
    # `open_run` has compared the hashes.
    contents = checkpoint.load(source, verified=True, reader=reader_of(source))
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
    training = Training(
        engine,
        objective,
        learning_rate=rate,
        seed=config.seed,
        micro_batches=micro_batches.count(config.train, loader.widths, objective.needs),
        dtype=engines.compute_dtype(config.train, engine.device),
        constants=constants,
        precomputed=config.model.precomputed,
        may_skip=config.train.max_skipped if config.train.non_finite == "skip" else 0,
    )

    # After the engine: a moving average is a copy of what the engine made of the model.
    if teacher.supplies(config.teacher):
        saved = {} if contents is None else contents.teacher
        training.teacher = teacher.Teacher(
            config.teacher, engine, model, objective.needs, saved, loader.teacher_shape
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


def loop(
    config: Config,
    training: Training,
    loader: Loader,
    selector: Selection,
    plan: Plan,
    midway: Midway,
    watch: Watch,
    report: Reporter,
    saver: Saver,
) -> None:
    """Train from the current step to the plan's end, where a stage is saved and a run is evaluated,
    or to a signal that asks to stop: then Stopped, once all is saved.
    """
    saved_step = training.step
    loaded: Batch | None = None

    def save_unless_saved() -> None:
        nonlocal saved_step
        settle(training)
        if saved_step != training.step:
            keep_every = config.checkpoint.keep_every
            stays = keep_every is not None and plan.due(keep_every, training.step)
            saver.save(config, training, loader, stays)
            saved_step = training.step

    def save_and_wait() -> None:
        save_unless_saved()
        saver.wait()

    with StopRequest() as stop, explained(config), closing(saver):
        while training.step < plan.end and watch.reason() is None:
            with report.waiting():
                ready = loader.wait(lambda: stop.received != 0)

            # A rank alone stops at once. Among several the vote travels with a step, for which a
            # rank that got no rows takes part with its last ones; before it had any, all meet here.
            if loaded is None or dist.world_size() == 1:
                leave_if_asked(stop, training, save_and_wait)
            loaded = next(loader) if ready or loaded is None else loaded

            batch, selection_scalars = selector.choose(training, loaded)
            logged = training.step == 0 or plan.due(config.log.every, training.step + 1)
            with fitting(config.train):
                scalars = train_step(
                    training, batch, measure=logged, stop=stop.received != 0, void=not ready
                )
            scalars |= selection_scalars

            # Whoever reports, saves or evaluates a step needs to know what it came to.
            step = training.step
            saves = plan.due(config.checkpoint.every, step)
            saves |= plan.due(config.checkpoint.keep_every, step)
            due = midway.due(step)
            if logged or saves or due or step == plan.end:
                settle(training)

            if logged and training.step == step:
                values = means_over_ranks(scalars)
                if training.may_skip:
                    values["skipped"] = float(training.skipped)
                with stop.console():
                    report.training(step, values, loader.counters())
            report.stepped(step)
            if training.asked_to_stop and training.step < plan.total:
                leave(stop, training, save_and_wait)

            # Saved before it is evaluated: an evaluation takes long, and may fail.
            if saves:
                save_unless_saved()
            if due and step < plan.total:
                leave_if_asked(stop, training, save_and_wait)
                with report.paused(), stop.console(), suppress(Interrupted):
                    if watch.note(midway.measure(step)):
                        save_and_wait()
                        watch.keep(step)

        if (reason := watch.reason()) is not None:
            log.say(reason)
        save_unless_saved()

        # Its processes and their memory are of no use to the last evaluation, and their pictures
        # none to the next stage.
        loader.close()
        if plan.end < plan.total and watch.reason() is None:
            saver.wait()  # the next stage starts from it
            return
        try:
            with report.paused(), stop.console():
                # Also of a run resumed at its end.
                improves = watch.note(midway.finish(training.step))
                saver.wait()
                if improves:
                    watch.keep(training.step)
        except Interrupted:
            leave_if_asked(stop, training, save_and_wait)


def in_final_form(evaluate: Evaluate, description: dict[str, Any]) -> Evaluate:
    """`evaluate` that sees the model of every stage in the form of the run's end."""

    def evaluate_as_final(
        model: DualEncoder, tasks: list[Plugin], dtype: torch.dtype
    ) -> list[dict[str, Any]]:
        return evaluate(stages.in_final_form(model, description), tasks, dtype)

    return evaluate_as_final
