"""A run's folder: who holds it, and what the run goes on from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from vlp import checkpoint, dist, locks, log, retention
from vlp import config as configuration
from vlp.config import Config
from vlp.data.loader import Loader
from vlp.engines.precision import faster
from vlp.files import remove_leftovers
from vlp.models.dual_encoder import DualEncoder
from vlp.pretrained import context, image_size, projections, runs
from vlp.pretrained.fitting import DECODER, UNCHANGED, Fit
from vlp.pretrained.parts import Layout
from vlp.pretrained.read_once import own_share
from vlp.step import Training

T = TypeVar("T")


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
                retention.remove_unfinished(run)
            except (locks.InUse, OSError) as failure:
                error = failure

        error = dist.broadcast_object(error)
        if error is not None:
            raise error
        yield


def open_run(config: Config) -> Path | None:
    """The checkpoint to continue from, whole and the same on every rank, or None. Refuses a folder
    that holds another run. Collective.
    """
    candidates = _agreed(lambda: _candidates(config, Path(config.out)))
    source = None
    for path in candidates:
        problem = _problem_of(path, weights_too=config.resume == "auto")
        if problem is None:
            source = path
            break
        # Whatever the damage is, the one before it still serves.
        if config.resume != "auto":
            raise checkpoint.CheckpointError(problem)
        if dist.is_main():
            log.warn(f"{problem}; trying the checkpoint before it")

    if candidates and source is None:
        raise checkpoint.CheckpointError(
            f"every checkpoint of {config.out} is damaged; choose another folder with out=…"
        )
    if source is not None:
        _agreed(lambda: _check_recorded(config, source))
    return source


def _agreed(of_first: Callable[[], T]) -> T:
    """What the first rank finds, on every rank; so is an error that a user can mend."""
    outcome: Any = None
    if dist.is_main():
        try:
            outcome = of_first()
        except (FileExistsError, checkpoint.CheckpointError) as error:
            outcome = error  # raised on every rank, so that none waits for another
    outcome = dist.broadcast_object(outcome)
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _problem_of(path: Path, weights_too: bool) -> str | None:
    """What is wrong with a checkpoint, at which every rank looks in part; None: it is whole.
    `weights_too`: also NaN and infinity. Collective.
    """
    problem = None
    try:
        checkpoint.verify(path, (dist.rank(), dist.world_size()))
    except checkpoint.CheckpointError as error:
        problem = str(error)
    except OSError as error:  # a disk that fails here alone
        problem = f"{path} cannot be read: {error}"

    # Hashing takes longer than an exchange may.
    dist.await_all("the last rank, which checks its part of a checkpoint")
    problems = [text for text in dist.gather_objects(problem) if text is not None]
    if problems or not weights_too:
        return problems[0] if problems else None

    try:
        weights = checkpoint.tensors_of(path, "model", shared_layout(path))
    except checkpoint.CheckpointError as error:  # on all ranks alike
        return str(error)
    problems = [text for text in dist.gather_objects(_spoilt(path, weights)) if text is not None]
    return problems[0] if problems else None


def _spoilt(path: Path, weights: Mapping[str, Tensor]) -> str | None:
    """What is wrong with the values of weights that this rank reads: its rows, tensor by tensor."""
    try:
        for name, rows in own_share(weights):
            if checkpoint.not_finite({name: rows}):
                return f"{path} holds NaN or infinity in {name}"
    except OSError as error:
        return f"{path} cannot be read: {error}"
    return None


def on_all(of_each: Callable[[], T]) -> T:
    """What this rank gets from something that each rank does by itself; what one of them finds
    wrong is raised on all, so that none waits for another. Collective.
    """
    result: Any = None
    failure = None
    try:
        result = of_each()
    except (checkpoint.CheckpointError, OSError) as error:
        failure = error
    failures = [error for error in dist.gather_objects(failure) if error is not None]
    if failures:
        raise failure or failures[0]
    return result


def shared_layout(path: Path) -> Layout | None:
    """Where the tensors of a checkpoint lie in its parts, whose headers the first rank reads for
    all; None for one in one piece. Collective.
    """
    return _agreed(lambda: runs.layout_of(path))


def _check_recorded(config: Config, source: Path) -> None:
    """Compare the configuration of a checkpoint with that of the run which goes on from it."""
    recorded = configuration.recorded(source / "config.yaml")
    _check_optimizer(recorded, config, source)
    for key, (old, new) in changes(recorded, config).items():
        log.say(f"resuming with another {key}: {old!r} -> {new!r}")


def _check_optimizer(recorded: Config, config: Config, source: Path) -> None:
    """Refuse to go on with another optimiser, to which the gathered state would mean nothing."""
    before, now = recorded.train.optimizer.name, config.train.optimizer.name
    if before != now:
        raise checkpoint.CheckpointError(
            f"{source} was trained with train.optimizer.name {before}, and this run has {now}; go "
            f"on with train.optimizer.name={before}, or start a new run from its weights: "
            f"init_from={source} resume=never out=…"
        )


def _candidates(config: Config, run: Path) -> list[Path]:
    """The checkpoints that `resume` may mean, in the order to try them; FileExistsError where `run`
    holds what would be lost.
    """
    holds_run = (run / "config.yaml").exists()

    if config.resume == "never":
        if holds_run:
            raise FileExistsError(
                f"{run} already holds a run; "
                "continue it with resume=auto, or choose another with out=…"
            )
        return []

    if config.resume == "auto":
        return checkpoint.all_of(run)[::-1]

    # One of another run may only found a new run.
    source = checkpoint.resolve(config.resume)
    if holds_run and source.parent.resolve() != (run / checkpoint.FOLDER).resolve():
        raise FileExistsError(
            f"{run} holds another run than {source}, which would be overwritten; "
            "choose a new folder with out=…, or "
            "continue the one that is there with resume=auto"
        )
    return [source]


def changes(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ between two configurations, and both values; secrets are not
    compared.
    """
    # Secrets are hidden on both sides, so that none is said.
    before = _flat(configuration.shown(old))
    after = _flat(configuration.shown(new))
    different = {k for k in before.keys() | after.keys() if before.get(k) != after.get(k)}

    different.discard("resume")  # it says how to go on, not what the run is
    if after.get("train.precision") == "auto":  # it stays what it was
        different.discard("train.precision")
    return {key: (before.get(key), after.get(key)) for key in sorted(different)}


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The values of nested mappings by dotted key."""
    if not isinstance(tree, dict):
        return {prefix[:-1]: tree}
    values: dict[str, Any] = {}
    for name, item in tree.items():
        values |= _flat(item, f"{prefix}{name}.")
    return values


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


def start_from(model: DualEncoder, reference: str, fit: Fit = UNCHANGED) -> None:
    """Take the weights of another model, its positions interpolated to this one's sizes.

    Heads and text decoder start at random where it has none; those that only it has stay away.
    `fit`: how its context and its projections enter.
    """
    # `like`, because a file of weights alone does not say what it belongs to.
    source = checkpoint.load_any(reference, like=model, fit=fit)
    checkpoint.check_alike(source, model, f"init_from {reference}")
    assert isinstance(source, DualEncoder)
    if type(source.visual) is type(model.visual):
        image_size.resize(source.visual, image_size.pair(model.visual.image_size))

    initial = model.state_dict()
    taken = context.fitted(source.state_dict(), initial, fit.keep, f"init_from {reference}")
    if fit.new_projection:
        taken = projections.replaced(taken, model, initial)
    taken = _with_heads(taken, initial, reference, fit)
    try:
        checkpoint.restore(model, taken, reference)
    except checkpoint.CheckpointError as error:
        advice = projections.advice(initial, taken)
        raise checkpoint.CheckpointError(f"{error}{advice}") from None


# What starts at random beside towers that come from elsewhere.
_HEADS = ("heads.", DECODER)


def _with_heads(
    weights: dict[str, Tensor], initial: dict[str, Tensor], reference: str, fit: Fit
) -> dict[str, Tensor]:
    """The weights with this model's heads and text decoder, at random where the other model has
    none that fits.
    """
    named = {name for name in initial if name.startswith(_HEADS)}
    fresh = named - weights.keys()
    # Heads read the shared space, and a new projection may have another one.
    if fit.new_projection:
        fresh |= {name for name in named if not name.startswith(DECODER)}
    foreign = {name for name in weights if name.startswith(_HEADS) and name not in initial}
    _say_heads(reference, fresh, "start at random")
    _say_heads(reference, foreign, "are left out")

    taken = {name: value for name, value in weights.items() if name not in foreign}
    return taken | {name: initial[name] for name in fresh}


def _say_heads(reference: str, parameters: set[str], fate: str) -> None:
    """Say by name which heads `init_from` does not take over, if there are any."""
    heads = set()
    for name in parameters:
        first, second = name.split(".")[:2]
        heads.add(first if name.startswith(DECODER) else f"{first}.{second}")
    if heads:
        log.say(f"init_from {reference}: {', '.join(sorted(heads))} {fate}")


def go_on_from(contents: checkpoint.Contents, training: Training, loader: Loader) -> None:
    """Take over all that a checkpoint holds beside the weights. Collective."""
    # The weights are there already: the engine got the model with them.
    training.engine.load_moments(contents.optimizer)
    state = checkpoint.nested(contents.objective, training.objective.state)
    training.objective.load_state_dict(state)
    loader.load_state_dict(contents.state["loader"])
    training.step = contents.state["step"]
    training.skipped = contents.state.get("skipped", 0)  # absent before steps could be left out


def set_branch_aside(run: Path, step: int) -> None:
    """Mark what the run had beyond the step it goes on from. Called by all ranks, done by one."""
    # One rank renames; with several the second would find nothing.
    if not dist.is_main():
        return

    abandoned = retention.abandon(run, step)
    for path in abandoned:
        log.say(f"going on from step {step}: {path.name} is of the branch that is left")

    results = run / "results.json"
    if abandoned and results.exists():
        results.replace(run / f"results{retention.ABANDONED}.json")
