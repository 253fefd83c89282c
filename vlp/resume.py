"""A run's folder: who holds it, what the run goes on from, and what it leaves to go on from."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlp import checkpoint, dist, locks, log
from vlp import config as configuration
from vlp.config import Config
from vlp.data.loader import Loader
from vlp.engines.precision import faster
from vlp.files import remove_leftovers
from vlp.lifetime import launcher_grace_s
from vlp.models.dual_encoder import DualEncoder
from vlp.pretrained import context, image_size, projections
from vlp.pretrained.fitting import UNCHANGED, Fit
from vlp.step import Training

# Packages whose versions decide numbers; a checkpoint records them.
DECIDING = ("vlp", "torch", "open_clip_torch", "transformers", "accelerate", "numpy")


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
    outcome: Any = None
    if dist.is_main():
        try:
            outcome = _open_run(config, Path(config.out))
        except (FileExistsError, checkpoint.CheckpointError) as error:
            outcome = error  # raised on every rank, so that none waits for another

    # Hashing a large checkpoint takes longer than an exchange may.
    dist.await_all("the first rank, which checks checkpoints")
    outcome = dist.broadcast_object(outcome)
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _open_run(config: Config, run: Path) -> Path | None:
    """`open_run` on the first rank."""
    source = _source(config, run)
    if source is not None:
        recorded = configuration.recorded(source / "config.yaml")
        _check_optimizer(recorded, config, source)
        for key, (old, new) in changes(recorded, config).items():
            log.say(f"resuming with another {key}: {old!r} -> {new!r}")
    return source


def _check_optimizer(recorded: Config, config: Config, source: Path) -> None:
    """Refuse to go on with another optimiser, to which the gathered state would mean nothing."""
    before, now = recorded.train.optimizer.name, config.train.optimizer.name
    if before != now:
        raise checkpoint.CheckpointError(
            f"{source} was trained with train.optimizer.name {before}, and this run has {now}; go "
            f"on with train.optimizer.name={before}, or start a new run from its weights: "
            f"init_from={source} resume=never out=…"
        )


def _source(config: Config, run: Path) -> Path | None:
    """The checkpoint that `resume` means; FileExistsError where `run` holds what would be lost."""
    holds_run = (run / "config.yaml").exists()

    if config.resume == "never":
        if holds_run:
            raise FileExistsError(
                f"{run} already holds a run; "
                "continue it with resume=auto, or choose another with out=…"
            )
        return None

    if config.resume == "auto":
        newest = checkpoint.newest(run)
        if newest is None and checkpoint.all_of(run):
            raise checkpoint.CheckpointError(
                f"every checkpoint of {run} is damaged; choose another folder with out=…"
            )
        return newest

    # A named checkpoint is verified here, once, and not by each rank that reads it.
    source = checkpoint.resolve(config.resume)
    checkpoint.verify(source)

    # One of another run may only found a new run.
    if holds_run and source.parent.resolve() != (run / checkpoint.FOLDER).resolve():
        raise FileExistsError(
            f"{run} holds another run than {source}, which would be overwritten; "
            "choose a new folder with out=…, or "
            "continue the one that is there with resume=auto"
        )
    return source


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

    Heads start at random where it has none; heads that only it has stay away. `fit`: how its
    context and its projections enter.
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


def _with_heads(
    weights: dict[str, Tensor], initial: dict[str, Tensor], reference: str, fit: Fit
) -> dict[str, Tensor]:
    """The weights with this model's heads, at random where the other model has none that fits."""
    named = {name for name in initial if name.startswith("heads.")}
    fresh = named - weights.keys()
    # Heads read the shared space, and a new projection may have another one.
    if fit.new_projection:
        fresh |= named
    foreign = {name for name in weights if name.startswith("heads.") and name not in initial}
    _say_heads(reference, fresh, "start at random")
    _say_heads(reference, foreign, "are left out")

    taken = {name: value for name, value in weights.items() if name not in foreign}
    return taken | {name: initial[name] for name in fresh}


def _say_heads(reference: str, parameters: set[str], fate: str) -> None:
    """Say by name which heads `init_from` does not take over, if there are any."""
    heads = {".".join(name.split(".")[:2]) for name in parameters}
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

    abandoned = checkpoint.abandon(run, step)
    for path in abandoned:
        log.say(f"going on from step {step}: {path.name} is of the branch that is left")

    results = run / "results.json"
    if abandoned and results.exists():
        results.replace(run / f"results{checkpoint.ABANDONED}.json")


def save(config: Config, training: Training, loader: Loader) -> None:
    """Write a checkpoint of the step just done. Collective."""
    started = time.monotonic()

    # Every rank takes part in gathering; only the first one gets the tensors.
    model, optimizer = training.engine.state()
    teacher = {} if training.teacher is None else training.teacher.state()
    objective = checkpoint.flat(training.objective.state_dict())
    state = {
        "step": training.step,
        "skipped": training.skipped,
        # What is made ahead, or was not trained on in the end, is made again.
        "loader": loader.state_dict(training.step),
        "versions": {name: version(name) for name in DECIDING},
    }

    error = None
    if dist.is_main():
        contents = checkpoint.Contents(
            model=model,
            optimizer=optimizer,
            objective=objective,
            state=state,
            config=configuration.dump(config),
            description=training.engine.description,
            teacher=teacher,
        )
        try:
            checkpoint.save(Path(config.out), training.step, contents, config.checkpoint.keep)
        except (OSError, checkpoint.CheckpointError) as failure:
            error = failure

    dist.await_all("the first rank, which saves a checkpoint")

    # No rank runs on, and perhaps is killed, before the checkpoint stands; and none waits where it
    # could not be written.
    error = dist.broadcast_object(error)
    if error is not None:
        raise error
    if dist.is_main():
        _check_grace(time.monotonic() - started)


def _check_grace(save_s: float) -> None:
    """Warn where the launcher would kill a run that was asked to stop before it has saved."""
    # Half of it, because the step that is under way has to end before.
    grace_s = launcher_grace_s()
    if grace_s is not None and save_s > grace_s / 2:
        log.warn(
            f"saving took {save_s:.0f} s, but a run that is asked to stop is killed by its "
            f"launcher after {grace_s:.0f} s, in which a step has to end, too; "
            f"export TORCH_ELASTIC_SHUTDOWN_TIMEOUT={max(110, round(4 * save_s))} before launching"
        )
