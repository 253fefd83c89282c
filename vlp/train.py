"""The loop: step, log, evaluate, save. Everything that decides numbers lives in `vlp.step` and
`vlp.data`.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from vlp import (
    checkpoint,
    dist,
    engines,
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
from vlp.config import Config, Plan
from vlp.data import labels, server
from vlp.data.loader import Loader
from vlp.engines import Engine
from vlp.lifetime import Interrupted, Stopped, StopRequest
from vlp.measurements import means_over_ranks
from vlp.models.build import build as build_model
from vlp.models.build import fit_of
from vlp.models.dual_encoder import DualEncoder
from vlp.out_of_memory import fitting
from vlp.plugin import Plugin
from vlp.pretrained.references import resolve as resolve_reference
from vlp.pretrained.runs import AVERAGED
from vlp.reporter import Reporter
from vlp.resume import (
    alone_in,
    go_on_from,
    open_run,
    save,
    set_branch_aside,
    start_from,
    with_precision,
)
from vlp.seeds import derive
from vlp.selection import Selection
from vlp.stages import Segment
from vlp.step import NonFiniteError, Training, settle, train_step
from vlp.text_store import TextStore
from vlp.types import Batch

# (plain model, tasks that are due, the towers' arithmetic) -> results
Evaluate = Callable[[DualEncoder, list[Plugin], torch.dtype], list[dict[str, Any]]]


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
        return _train(config, engine, evaluate)


def _train(config: Config, engine: Engine, evaluate: Evaluate | None) -> Path:
    """`train`, in a folder that is held."""
    # What is mistyped is answered before weights and data are read.
    source = open_run(config)
    check_names(config)
    config = with_precision(config, source, engine.device)

    # The model before the data: its towers say which pixels and tokens the loader delivers.
    model: DualEncoder | None = initial_model(config)
    optim.build(model, config.train.optimizer)  # its groups name parameters that must be there
    selector = selection.build(config, model, engine)
    loader = open_data(config, model, selector)

    # Ranks index at different speeds, and would meet first where a limit of time holds.
    dist.await_all("the last rank to index the data")

    # How many steps the run has depends on how many samples, and what a stage is, on the model.
    segments = stages.of_run(config, loader, selector.loaded // config.train.batch)
    stages.check(segments, engine, model)
    rate = optim.Schedule(config.train.optimizer, segments[0].plan)
    if config.stages and evaluate is not None:
        evaluate = in_final_form(evaluate, model.description())

    report: Reporter | None = None
    try:
        for segment in stages.left_of(segments, source):
            if segment.stage is not None or model is None:
                model = initial_model(segment.config)
                selector = selection.build(segment.config, model, engine)
            training = begin(segment, engine, model, loader, rate, source)

            # It writes config.yaml, which makes the folder a run: not before all was checked.
            report = report or Reporter(config, segment.plan, training.step)
            report.plan = segment.plan
            loop(config, training, loader, selector, segment.plan, evaluate, report)

            # The next one starts from what this one saved, as if the run had been stopped.
            source, model = stages.joint(config, segment.plan.end), None
            del training  # its teacher's and objective's memory is the next one's
    finally:
        loader.close()
        if report is not None:
            report.close()
    return Path(config.out)


def begin(
    segment: Segment,
    engine: Engine,
    model: DualEncoder,
    loader: Loader,
    rate: Callable[[int], float],
    source: Path | None,
) -> Training:
    """What the steps of a segment work on, from `source` on or with new weights. Collective."""
    config, plan = segment.config, segment.plan
    if segment.n_segments > 1:
        loader.enter(segment.batches, model.image_spec, segment.text_spec(model))
        segment.say(model)

    objective = build_objective(config, loader, plan)
    check_objective(config, objective, loader, model)

    # The weights of the checkpoint before the engine divides them over ranks; whatever else it
    # holds after that, when the parts exist that take it over.
    contents = load_weights(model, source, plan)
    stored_embeddings.check(loader.sources, model, precomputed=config.model.precomputed)
    stored_embeddings.check_texts(
        loader.sources, loader.store, model, config.data.captions, evaluates=bool(config.eval)
    )
    say_start(config, model, loader, objective, plan, source)
    rate = segment.rate(rate)
    training = prepare(config, engine, model, objective, rate, loader, contents)
    if contents is not None:
        go_on_from(contents, training, loader)
        set_branch_aside(Path(config.out), training.step)
    return training


def check_names(config: Config) -> None:
    """Refuse trackers that are not installed, optimisers that do not exist, and references to
    models that lead nowhere.
    """
    log.check_trackers(config.log.trackers)
    optim.check(config.train.optimizer)
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
    # One line of the objective is enough: positives: caption needs no key of the data.
    read_labels = [getattr(term.options, "positives", None) for term in config.objective]
    data = replace(config.data, labels=labels.kind_of(config.data.labels, read_labels))

    stored_texts = config.model.stored_texts
    loader = Loader(
        data,
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
    selector.check(loader.carries)
    return loader


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
    contents = checkpoint.load(source, verified=True)  # `open_run` has compared the hashes
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
        teacher.check_map(model, list(loader.teacher_shape))
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
    evaluate: Evaluate | None,
    report: Reporter,
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
            save(config, training, loader)
            saved_step = training.step

    with StopRequest() as stop, explained(config):
        while training.step < plan.end:
            with report.waiting():
                ready = loader.wait(lambda: stop.received != 0)

            # A rank alone stops at once. Among several the vote travels with a step, for which a
            # rank that got no rows takes part with its last ones; before it had any, all meet here.
            if loaded is None or dist.world_size() == 1:
                leave_if_asked(stop, training, save_unless_saved)
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
            due = [task for task in config.eval if plan.due(task.common.every, step)]
            if logged or saves or due or step == plan.end:
                settle(training)

            if logged and training.step == step:
                values = means_over_ranks(scalars)
                if training.may_skip:
                    values["skipped"] = float(training.skipped)
                with stop.console():
                    report.training(step, values, loader.counters())
            if training.asked_to_stop and training.step < plan.total:
                leave(stop, training, save_unless_saved)

            # Saved before it is evaluated: an evaluation takes long, and may fail.
            if saves:
                save_unless_saved()
            if evaluate is not None and due and step < plan.total:
                leave_if_asked(stop, training, save_unless_saved)
                with report.paused(), stop.console(), suppress(Interrupted):
                    report.evaluation(step, evaluate_now(evaluate, training, due))

        # Its processes and their memory are of no use to the last evaluation, and their pictures
        # none to the next stage.
        loader.close()
        if plan.end < plan.total:
            save_unless_saved()
            return
        if evaluate is not None and config.eval:  # also of a run resumed at its end
            try:
                with stop.console():
                    report.evaluation(plan.total, evaluate_now(evaluate, training, config.eval))
            except Interrupted:
                leave_if_asked(stop, training, save_unless_saved)


def leave_if_asked(stop: StopRequest, training: Training, save: Callable[[], None]) -> None:
    """`leave` on every rank if any rank was asked to stop. Collective, and the host waits: for
    moments at which it waits anyway.
    """
    asked = stop.received != 0
    # A signal reaches ranks at different moments; they have to stop at the same step.
    if dist.world_size() > 1:
        vote = torch.full((), float(asked), device=training.engine.device)
        asked = dist.all_reduce(vote, dist.world()).item() > 0
    if asked:
        leave(stop, training, save)


def leave(stop: StopRequest, training: Training, save: Callable[[], None]) -> NoReturn:
    """Save and raise Stopped. Collective."""
    signum = max(dist.gather_objects(int(stop.received)))
    save()
    outcome = "before the first step; there is nothing to save"
    if training.step:
        outcome = f"after step {training.step}; saved"
    name = signal.Signals(signum).name
    raise Stopped(signum, f"stopped by {name} {outcome}. Continue with resume=auto")


@contextmanager
def explained(config: Config) -> Iterator[None]:
    """Around all steps: NaN or infinity ends them with what to do."""
    try:
        yield
    except NonFiniteError as error:
        raise NonFiniteError(f"{error}\n{ways_out(config)}") from None


def in_final_form(evaluate: Evaluate, description: dict[str, Any]) -> Evaluate:
    """`evaluate` that sees the model of every stage in the form of the run's end."""

    def evaluate_as_final(
        model: DualEncoder, tasks: list[Plugin], dtype: torch.dtype
    ) -> list[dict[str, Any]]:
        return evaluate(stages.in_final_form(model, description), tasks, dtype)

    return evaluate_as_final


def evaluate_now(
    evaluate: Evaluate, training: Training, tasks: list[Plugin]
) -> list[dict[str, Any]]:
    """Hand a plain model in evaluation mode to `evaluate`, without gradients; after it the moving
    average, where that is to be evaluated, whose labels begin with `AVERAGED`.
    """
    try:
        with torch.no_grad():
            # Sharded engines gather the weights for it.
            model = training.engine.evaluation_model().eval()
            records = evaluate(model, tasks, training.dtype)
            del model  # of two whole models one at a time

            teacher = training.teacher
            average = None if teacher is None else teacher.evaluation_model()
            if average is not None:
                for record in evaluate(average.eval(), tasks, training.dtype):
                    records.append(record | {"label": AVERAGED + record["label"]})
            return records
    finally:
        training.engine.model.train()


def ways_out(config: Config) -> str:
    """Explain from which checkpoint, with which settings, a run goes on after NaN or infinity."""
    settings = ["a lower train.optimizer.lr"]
    if config.train.non_finite == "stop":
        settings.append("train.non_finite=skip")
    else:
        settings.append(f"train.max_skipped above {config.train.max_skipped}")
    if config.train.precision != "float32":
        settings.append("train.precision=float32")
    one_of_them = " or ".join(settings)

    # With what is on the disk, for the advice must work as it is written.
    saved = checkpoint.all_of(Path(config.out))
    if not saved:
        return (
            f"There is no checkpoint yet. Start anew in another folder (out=…) with {one_of_them}."
        )
    older = f", or from an older checkpoint with resume={saved[-2]}" if len(saved) > 1 else ""
    return (
        f"The weights of {saved[-1]} are finite, but from there the run comes to this very step "
        f"again. Go on with resume=auto and {one_of_them}{older}."
    )
