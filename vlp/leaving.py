"""How a run ends before its last step: on a signal that asks it to stop, for want of data, and on
NaN or infinity.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import torch

from vlp import checkpoint, dist
from vlp.config import Config
from vlp.data.loader import Loader
from vlp.data.steps import DataAway
from vlp.lifetime import PutOff, Stopped, StopRequest
from vlp.step import NonFiniteError, Training


def wait_for_rows(loader: Loader, stop: StopRequest, what_for: str = "") -> bool:
    """Whether the next batch is here. It is not where the process is asked to stop meanwhile, or
    the data are out of reach: this rank then asks all to stop, in words that begin with `what_for`.
    """
    # Until all know, the others must not wait for this rank's patience a second time.
    if stop.lacks:
        return False
    try:
        return loader.wait(lambda: stop.received != 0)
    except DataAway as error:
        stop.lacks = what_for + str(error)
        return False


def leave_if_asked(stop: StopRequest, training: Training, save: Callable[[], None]) -> None:
    """`leave` on every rank if any rank was asked to stop. Collective, and the host waits: for
    moments at which it waits anyway.
    """
    asked = stop.asked
    # A signal reaches ranks at different moments; they have to stop at the same step.
    if dist.world_size() > 1:
        vote = torch.full((), float(asked), device=training.engine.device)
        asked = dist.all_reduce(vote, dist.world()).item() > 0
    if asked:
        leave(stop, training, save)


def leave(stop: StopRequest, training: Training, save: Callable[[], None]) -> NoReturn:
    """Save and raise Stopped. Collective."""
    requests = dist.gather_objects((int(stop.received), stop.lacks))
    save()
    outcome = "before the first step; there is nothing to save"
    if training.step:
        outcome = f"after step {training.step}; saved"

    # A signal first: where data stall, somebody may have asked because of that.
    signum = max(signum for signum, _ in requests)
    if signum:
        name = signal.Signals(signum).name
        raise Stopped(signum, f"stopped by {name} {outcome}. Continue with resume=auto")
    lacks = next(lacks for _, lacks in requests if lacks)
    raise PutOff(
        f"{lacks}\nStopped {outcome}. No sample is lost: once the data can be had again, continue "
        "with resume=auto"
    )


@contextmanager
def explained(config: Config) -> Iterator[None]:
    """Around all steps: NaN or infinity ends them with what to do."""
    try:
        yield
    except NonFiniteError as error:
        raise NonFiniteError(f"{error}\n{ways_out(config)}") from None


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
