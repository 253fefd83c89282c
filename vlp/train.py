"""The loop: step, log, evaluate, save. Everything that decides numbers lives in `vlp.step` and
`vlp.data`.
"""

from __future__ import annotations

from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import torch

from vlp import dist, engines, log, stages
from vlp.assembly import Part, Run, begin, set_up
from vlp.checks import check_batch, check_patience, check_teacher
from vlp.config import Config
from vlp.data import server
from vlp.leaving import explained, leave, leave_if_asked, wait_for_rows
from vlp.lifetime import Interrupted, StopRequest
from vlp.measurements import means_over_ranks
from vlp.midway import Evaluate, Midway
from vlp.models.dual_encoder import DualEncoder
from vlp.out_of_memory import fitting
from vlp.plugin import Plugin
from vlp.reporter import Reporter
from vlp.resume import alone_in, set_branch_aside
from vlp.saving import Saver
from vlp.stages import Segment
from vlp.step import settle, train_step
from vlp.types import Batch
from vlp.watch import Watch


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
    check_patience(config)
    check_teacher(config)
    with alone_in(Path(config.out)):
        return _train(set_up(config, engine), evaluate)


def _train(run: Run, evaluate: Evaluate | None) -> Path:
    """`train`, in a folder that is held."""
    config, source = run.config, run.source
    if config.stages and evaluate is not None:
        evaluate = in_final_form(evaluate, run.final)
    report: Reporter | None = None
    watch: Watch | None = None
    stop: StopRequest | None = None
    saver = Saver(Path(config.out), config.checkpoint.keep)

    try:
        with ExitStack() as signals:
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

                # From the first step to the last, so that none is lost between two stages.
                stop = stop or signals.enter_context(StopRequest())
                loop(run, segment, part, midway, watch, report, saver, stop)
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


def loop(
    run: Run,
    segment: Segment,
    part: Part,
    midway: Midway,
    watch: Watch,
    report: Reporter,
    saver: Saver,
    stop: StopRequest,
) -> None:
    """Train from the current step to the segment's end, where a stage is saved and a run is
    evaluated, or to a signal that asks to stop: then Stopped, once all is saved.
    """
    config, loader, plan = run.config, run.loader, segment.plan
    training, selector = part.training, part.selector
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

    with explained(config), closing(saver):
        while training.step < plan.end and watch.reason() is None:
            with report.waiting():
                ready = wait_for_rows(loader, stop)

            # A rank alone stops at once. Among several the vote travels with a step, for which a
            # rank that got no rows takes part with its last ones; before it had any, all meet here.
            if loaded is None or dist.world_size() == 1:
                leave_if_asked(stop, training, save_and_wait)
            loaded = next(loader) if ready or loaded is None else loaded

            batch, selection_scalars = selector.choose(training, loaded)
            logged = training.step == 0 or plan.due(config.log.every, training.step + 1)
            with fitting(config.train):
                scalars = train_step(
                    training, batch, measure=logged, stop=stop.asked, void=not ready
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
                values = means_over_ranks(scalars | loader.traffic())
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
            # The next stage starts from it; and it takes minutes to build.
            saver.wait()
            leave_if_asked(stop, training, save_unless_saved)
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
