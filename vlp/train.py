"""The loop: step, log, evaluate, save. Everything that decides numbers lives in `vlp.step` and
`vlp.data`.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vlp import checkpoint, dist, locks, log, losses, optim, selection, stored_embeddings, teacher
from vlp import config as configuration
from vlp.checks import check_batch, check_extent, check_objective
from vlp.config import Config, Plan
from vlp.data import server
from vlp.data.loader import Loader
from vlp.engines import parallel
from vlp.engines.precision import faster
from vlp.files import remove_leftovers
from vlp.lifetime import Interrupted, Stopped, StopRequest
from vlp.models.build import build as build_model
from vlp.models.dual_encoder import DualEncoder
from vlp.plugin import Plugin
from vlp.pretrained.references import resolve as resolve_reference
from vlp.reporter import Reporter
from vlp.seeds import derive
from vlp.selection import Selection
from vlp.step import NonFiniteError, Training, means_over_ranks, train_step

Evaluate = Callable[
    [DualEncoder, list[Plugin]], list[dict[str, Any]]
]  # (plain model, tasks that are due) -> results


def train(config: Config, evaluate: Evaluate | None = None) -> Path:
    """Run `config` to its end; returns the run's folder. A signal that asks to stop saves the run
    and raises Stopped.

    `evaluate` is called on every rank when tasks of `config.eval` are due. Raises FileExistsError
    for an output folder that holds a run, ValueError for settings that do not fit each other or the
    data, CheckpointError for a checkpoint that does not fit.
    """
    server.start_for(config)
    engine = parallel.start(config.train)
    check_batch(config)
    with alone_in(Path(config.out)):
        return _train(config, engine, evaluate)


def _train(config: Config, engine: parallel.Engine, evaluate: Evaluate | None) -> Path:
    """`train`, in a folder that is held."""
    run = Path(config.out)
    source = open_run(config)
    # What is mistyped is answered before the data are read.
    log.check_trackers(config.log.trackers)
    for reference in filter(None, (config.init_from, config.teacher.model)):
        resolve_reference(reference)
    config = with_precision(config, source, engine.device)

    # Model, data and objective.
    torch.manual_seed(derive(config.seed, "init"))
    model = build_model(config.model)
    if config.init_from is not None:
        start_from(model, config.init_from)
    chosen = selection.build(config, model, engine)
    loader = open_data(config, model, chosen)
    plan = Plan.of(config.train, loader.steps_per_epoch)
    warmup = optim.warmup_steps(config.train.optimizer, plan)
    objective = losses.build(
        config.objective,
        **vars(config.pairwise),
        seed=config.seed,
        samples=loader.n_samples,
        steps=plan.total,
    )
    check_objective(config, objective, loader, model)

    # The weights of the checkpoint, before the engine divides them over ranks.
    contents = None
    if source is not None:
        contents = checkpoint.load(source)
        check_extent(contents.state["step"], plan, source)
        checkpoint.restore(model, contents.model, source)
    stored_embeddings.check(loader.sources, model, precomputed=config.model.precomputed)
    say_start(config, model, loader, objective, plan, source)

    engine.prepare(model, config.train)
    training = Training(
        engine,
        objective,
        partial(optim.learning_rate, config.train.optimizer, warmup=warmup, total=plan.total),
        config.seed,
        config.train.micro_batches,
        parallel.precision(config.train, engine.device),
        constants={} if loader.teacher_scale is None else {"teacher_scale": loader.teacher_scale},
        precomputed=config.model.precomputed,
        may_skip=config.train.max_skipped if config.train.non_finite == "skip" else 0,
    )
    if teacher.supplies(config.teacher):
        saved = {} if contents is None else contents.teacher
        training.teacher = teacher.Teacher(config.teacher, engine, model, objective.needs, saved)
    if contents is not None:
        go_on_from(contents, training, loader)
        set_branch_aside(run, training.step)
        del contents  # it holds the moments a second time

    report = Reporter(config, plan, training.step)
    try:
        loop(config, training, loader, chosen, plan, evaluate, report)
    finally:
        loader.close()
        report.close()
    return run


def loop(
    config: Config,
    training: Training,
    loader: Loader,
    chosen: Selection,
    plan: Plan,
    evaluate: Evaluate | None,
    report: Reporter,
) -> None:
    """From the training's step to the plan's end, or to a signal that asks to stop: then Stopped,
    once all is saved.
    """
    batches = iter(loader)
    saved_step = training.step

    def save_unless_saved() -> None:
        nonlocal saved_step
        if saved_step != training.step:
            save(config, training, loader)
            saved_step = training.step

    with StopRequest() as stop:
        while training.step < plan.total:
            with report.waiting():
                loader.wait(lambda: stop.received != 0)
            leave_if_asked(stop, training, save_unless_saved)

            batch, about = chosen.choose(training, next(batches))
            logged = training.step == 0 or plan.due(config.log.every, training.step + 1)
            try:
                scalars = train_step(training, batch, measure=logged) | about
            except NonFiniteError as error:
                raise NonFiniteError(f"{error}\n{ways_out(config)}") from None
            step = training.step

            if logged:
                with stop.console():
                    report.training(step, means_over_ranks(scalars), loader.counters())
            if plan.due(config.checkpoint.every, step):
                save_unless_saved()
            due = [task for task in config.eval if plan.due(task.common.every, step)]
            if evaluate is not None and due and step < plan.total:
                leave_if_asked(stop, training, save_unless_saved)
                with report.paused(), stop.console(), suppress(Interrupted):
                    report.evaluation(step, evaluate_now(evaluate, training, due))
        loader.close()
        if evaluate is not None and config.eval:  # also of a run resumed at its end
            try:
                with stop.console():
                    report.evaluation(plan.total, evaluate_now(evaluate, training, config.eval))
            except Interrupted:
                leave_if_asked(stop, training, save_unless_saved)


def leave_if_asked(stop: StopRequest, training: Training, save: Callable[[], None]) -> None:
    """Save and raise Stopped on every rank if any rank was asked to stop. Collective; costs one
    all-reduce of a number.
    """
    vote = torch.tensor(float(stop.received != 0), device=training.engine.device)
    if not dist.all_reduce(vote, dist.world()).item():
        return
    signum = max(dist.gather_objects(int(stop.received)))
    save()
    outcome = (
        f"after step {training.step}; saved"
        if training.step
        else "before the first step; there is nothing to save"
    )
    raise Stopped(
        signum, f"stopped by {signal.Signals(signum).name} {outcome}. Continue with resume=auto"
    )


def evaluate_now(
    evaluate: Evaluate, training: Training, tasks: list[Plugin]
) -> list[dict[str, Any]]:
    """Hand a plain model in evaluation mode to `evaluate`, without gradients."""
    model = training.engine.evaluation_model().eval()
    try:
        with torch.no_grad():
            return evaluate(model, tasks)
    finally:
        training.engine.model.train()


def ways_out(config: Config) -> str:
    """What a run that met NaN or infinity can go on from, and with which other settings, in words."""
    settings = ["a lower train.optimizer.lr"]
    if config.train.non_finite == "stop":
        settings.append("train.non_finite=skip")
    else:
        settings.append(f"train.max_skipped above {config.train.max_skipped}")
    if config.train.precision != "float32":
        settings.append("train.precision=float32")
    one_of_them = " or ".join(settings)

    saved = checkpoint.all_of(Path(config.out))
    if not saved:
        return (
            f"There is no checkpoint yet. Start anew in another folder (out=…) with {one_of_them}."
        )
    older = f", or from an older checkpoint with resume={saved[-2]}" if len(saved) > 1 else ""
    return (
        f"The weights of {saved[-1]} are finite, but from there the run comes to this very step again. Go on with "
        f"resume=auto and {one_of_them}{older}."
    )


def save(config: Config, training: Training, loader: Loader) -> None:
    """Write a checkpoint of the step just done. Collective."""
    model, optimizer = training.engine.state()
    taught = {} if training.teacher is None else training.teacher.state()
    state = {
        "step": training.step,
        "skipped": training.skipped,
        "loader": loader.state_dict(),
        "versions": versions(),
    }
    objective = checkpoint.flat(training.objective.state_dict())
    error = None
    if dist.is_main():
        contents = checkpoint.Contents(
            model,
            optimizer,
            objective,
            state,
            configuration.dump(config),
            training.engine.description,
            taught,
        )
        try:
            checkpoint.save(Path(config.out), training.step, contents, config.checkpoint.keep)
        except (OSError, checkpoint.CheckpointError) as failure:
            error = failure
    # No rank runs on, and perhaps is killed, before the checkpoint stands; and none waits where it
    # could not be written.
    error = dist.broadcast_object(error)
    if error is not None:
        raise error


@contextmanager
def alone_in(run: Path) -> Iterator[None]:
    """Hold the run's folder while the block runs; raises InUse on every rank where another run
    holds it. Collective.
    """
    error = None
    with ExitStack() as stack:
        if dist.is_main():
            try:
                stack.enter_context(locks.held(run, advice=locks.OF_RUNS))
                remove_leftovers(run)
            except (locks.InUse, OSError) as failure:
                error = failure
        error = dist.broadcast_object(error)
        if error is not None:
            raise error
        yield


def open_run(config: Config) -> Path | None:
    """The checkpoint to continue from, the same on every rank, or None. Refuses a folder that holds
    another run.
    """
    run, outcome = Path(config.out), None
    if dist.is_main():
        try:
            outcome = _open_run(config, run)
        except (FileExistsError, checkpoint.CheckpointError) as error:
            outcome = error  # raised on every rank, so that none waits for another
    outcome = dist.broadcast_object(outcome)
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _open_run(config: Config, run: Path) -> Path | None:
    holds_run = (run / "config.yaml").exists()
    if config.resume == "never":
        if holds_run:
            raise FileExistsError(
                f"{run} already holds a run; continue it with resume=auto, or choose another with out=…"
            )
        source = None
    elif config.resume == "auto":
        source = checkpoint.newest(run)
        if source is None and checkpoint.all_of(run):
            raise checkpoint.CheckpointError(
                f"every checkpoint of {run} is damaged; choose another folder with out=…"
            )
    else:
        source = checkpoint.resolve(config.resume)
        if holds_run and source.parent.resolve() != (run / checkpoint.FOLDER).resolve():
            raise FileExistsError(
                f"{run} holds another run than {source}, which would be overwritten; choose a new folder with out=…, or "
                f"continue the one that is there with resume=auto"
            )
    if source is not None:
        recorded = configuration.recorded(source / "config.yaml")
        for key, (old, new) in changes(recorded, config).items():
            log.say(f"resuming with another {key}: {old!r} -> {new!r}")
    return source


def with_precision(config: Config, source: Path | None, device: torch.device) -> Config:
    """`config` with train.precision decided: as the run that is continued has it, else by a
    measurement on this machine.

    The run's config.yaml records it, so that a resumed run computes as before on whatever machine
    it goes on.
    """
    if config.train.precision != "auto":
        return config
    kept = "auto"
    if source is not None:
        kept = configuration.recorded(source / "config.yaml").train.precision
    chosen = faster(device.type) if kept == "auto" else kept
    chosen = dist.broadcast_object(chosen)  # ranks that measured differently would not fit together
    return replace(config, train=replace(config.train, precision=chosen))


def set_branch_aside(run: Path, step: int) -> None:
    """Mark what the run had beyond the step that it goes on from. Called by all ranks, done by one."""
    if not dist.is_main():
        return
    abandoned = checkpoint.abandon(run, step)
    for path in abandoned:
        log.say(f"going on from step {step}: {path.name} is of the branch that is left")
    results = run / "results.json"
    if abandoned and results.exists():
        results.replace(run / f"results{checkpoint.ABANDONED}.json")


def changes(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ between two configurations, and both values; secrets are not
    compared.
    """

    def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
        if not isinstance(tree, dict):
            return {prefix[:-1]: tree}
        return {
            k: v for name, item in tree.items() for k, v in flat(item, f"{prefix}{name}.").items()
        }

    before, after = flat(configuration.shown(old)), flat(configuration.shown(new))
    different = {k for k in before.keys() | after.keys() if before.get(k) != after.get(k)} - {
        "resume"
    }
    if after.get("train.precision") == "auto":  # it stays what it was
        different.discard("train.precision")
    return {key: (before.get(key), after.get(key)) for key in sorted(different)}


def open_data(config: Config, model: DualEncoder, chosen: Selection) -> Loader:
    """The loader of this rank, in the form that model, objective and selection read."""
    loader = Loader(
        config.data,
        model.image_spec,
        model.text_spec,
        mixture=chosen.mixture,
        batch=chosen.loaded,
        seed=config.seed,
        rank=dist.rank(),
        world=dist.world_size(),
        pixels=not config.model.precomputed,
        reads=losses.reads(config.objective) | chosen.needs,
    )
    chosen.check(loader.carries)
    return loader


def go_on_from(contents: checkpoint.Contents, training: Training, loader: Loader) -> None:
    """Take over all that a checkpoint holds beside the weights. Collective."""
    training.engine.load_moments(contents.optimizer)
    training.objective.load_state_dict(
        checkpoint.nested(contents.objective, training.objective.state)
    )
    loader.load_state_dict(contents.state["loader"])
    training.step = contents.state["step"]
    training.skipped = contents.state.get("skipped", 0)  # absent before steps could be left out


def start_from(model: DualEncoder, reference: str) -> None:
    """Take the weights of another model. Heads start at random where it has none; heads that only
    it has stay away.
    """
    source = checkpoint.load_any(reference, like=model)
    checkpoint.check_alike(source, model, f"init_from {reference}")
    weights = source.state_dict()
    fresh = {
        name: value
        for name, value in model.state_dict().items()
        if name.startswith("heads.") and name not in weights
    }
    foreign = {name for name in weights if name.startswith("heads.")} - model.state_dict().keys()
    for names, what in ((fresh, "start at random"), (foreign, "are left out")):
        if names:
            log.say(
                f"init_from {reference}: {', '.join(sorted({'.'.join(n.split('.')[:2]) for n in names}))} {what}"
            )
    checkpoint.restore(
        model, {n: v for n, v in weights.items() if n not in foreign} | fresh, reference
    )


def versions() -> dict[str, str]:
    """Versions of what decides numbers."""
    from importlib.metadata import version

    return {
        name: version(name)
        for name in ("vlp", "torch", "open_clip_torch", "transformers", "accelerate", "numpy")
    }


def say_start(
    config: Config,
    model: DualEncoder,
    loader: Loader,
    objective: losses.Objective,
    plan: Plan,
    source: Path | None,
) -> None:
    count = sum(p.numel() for p in model.parameters())
    terms = ", ".join(term.label for term in config.objective)
    n = objective.candidates(plan.batch // dist.world_size())
    log.say(
        f"{config.out}: {loader.n_samples:,} samples, {count / 1e6:.1f} M parameters, {plan.total:,} steps of {plan.batch} "
        f"({plan.total / plan.steps_per_epoch:.1f} epochs), {dist.world_size()} process(es), {config.train.precision}"
    )
    log.say(
        f"objective {terms}; {n} candidates a row, log n = {math.log(n):.3f}"
        + (f"; continuing {source}" if source else "")
    )
