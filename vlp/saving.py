"""Checkpoints written beside the steps: copied before the next update, written while training goes
on.

    saver = Saver(run, keep=2)
    saver.save(config, training, loader)    the step just done; waits only for the save before it,
                                            and the next update for the copy
    saver.wait()                            all that was asked for stands

One process writes a checkpoint in one piece. Of several each writes its part through
torch.distributed.checkpoint: 1/W of the bytes, of which it holds a copy, and while it writes a
second one of a kind. Sharded tensors are written as they lie; of those that every rank holds the
first writes the small ones, and large ones are dealt row by row. The folder appears under its name
when all parts are on the disk (vlp.checkpoint).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as torch_dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_saver import save as save_parts
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.device_mesh import DeviceMesh
from torch.futures import Future as TorchFuture

from vlp import checkpoint, dist, log
from vlp import config as configuration
from vlp.checkpoint import Contents, Manifest
from vlp.config import Config
from vlp.data.loader import Loader
from vlp.engines.replicated import local_part
from vlp.files import naming
from vlp.joining import PATIENCE
from vlp.lifetime import launcher_grace_s
from vlp.pretrained.runs import KINDS
from vlp.sendable import sendable
from vlp.staging import Dealt, Staging, collect
from vlp.step import Training


class Saver:
    """Writes the checkpoints of a run, one at a time."""

    def __init__(self, run: Path, keep: int) -> None:
        """Collective: ranks get a process group for it, since the steps use the others."""
        self.run, self.keep = run, keep
        self.group = dist.Group()
        self.staging = Staging()
        if dist.world_size() > 1:
            handle: Any = torch_dist.new_group(backend="gloo", timeout=PATIENCE)
            self.group = dist.group_of(handle)
            self.staging = Dealt(DeviceMesh.from_group(handle, "cpu"))
        # One thread for all saves: starting one would hand this one's core to others.
        self.writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.writing: Future[None] | None = None
        self.error: BaseException | None = None  # of the last one; where one has it, all ranks do

    def save(self, config: Config, training: Training, loader: Loader, stays: bool = False) -> None:
        """Save the step just done, for good if it `stays`; then raises what went wrong with the
        save before. Collective.
        """
        earlier = self._outcome()  # its copies on the host are used again
        started = time.monotonic()
        contents = collect(training, loader, self.staging)
        contents.state["stays"] = stays
        self.write(training.step, contents, started, config)
        training.before_update = self.staging.wait

        # It ends the run, but the steps since then are not lost where they can be saved.
        if earlier is not None:
            self.wait()
            raise earlier

    def write(
        self, step: int, contents: Contents, started: float, config: Config | None = None
    ) -> None:
        """Begin to copy and write what was collected, with `config`: every rank in a thread of its
        own, which exchange over a group of their own.
        """
        self.staging.copied.clear()
        self.writing = self.writer.submit(self._write, step, contents, started, config)

    def wait(self) -> None:
        """Return when the last save stands; raises what went wrong with it, on every rank."""
        error = self._outcome()
        if error is not None:
            raise error

    def close(self) -> None:
        """Let the last save come to its end, whatever has happened beside it."""
        self._outcome()

    def _outcome(self) -> BaseException | None:
        """What went wrong with the last save, once it has come to its end; told once."""
        if self.writing is not None:
            self.writing.result()
            self.writing = None
        error, self.error = self.error, None
        return error

    def _write(self, step: int, contents: Contents, started: float, config: Config | None) -> None:
        try:
            complete = partial(self._complete, contents, config)
            if self.group.size == 1:
                complete()
                checkpoint.save(self.run, step, contents, self.keep)
            else:
                agree(self.group, complete)
                write_parts(self.run, step, contents, self.keep, self.group)
        # Of any kind: what ends this thread in silence would pass for a save.
        except BaseException as error:
            self.error = error  # raised where the run next saves, or at its end
            if dist.is_main():
                log.warn(f"the checkpoint of step {step} could not be written: {error}")
            return
        if dist.is_main():
            check_grace(time.monotonic() - started)

    def _complete(self, contents: Contents, config: Config | None) -> None:
        # First of all: the next update waits for it.
        self.staging.settle()
        if config is not None:
            contents.config = configuration.dump(config)


# --- how several ranks write it -------------------------------------------------------------------


def write_parts(run: Path, step: int, contents: Contents, keep: int, group: dist.Group) -> None:
    """Write a checkpoint of `step` of which every rank holds its part, then remove what is beyond
    `keep`. Collective over `group`; what fails on any rank is raised on all, and leaves nothing.
    """
    agree(group, partial(checkpoint.check_finite, step, local_parts(contents)))
    is_first = group.index == 0
    folder = checkpoint.temporary(run, step)
    try:
        agree(group, partial(checkpoint.make_empty, folder) if is_first else _nothing)
        agree(group, partial(_save_tensors, folder, contents, group))

        # Each rank reads its own files again, for the hashes: all of them at once.
        of_ranks = agree(group, partial(_manifest_of_own, folder, group.index))
        finish = partial(_finish, folder, contents, of_ranks, keep)
        agree(group, finish if is_first else _nothing)
    except BaseException:
        # Half a checkpoint would only fill the disk further.
        if is_first:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def local_parts(contents: Contents) -> Contents:
    """The contents with this rank's rows in the place of sharded tensors, sharing memory."""
    of_kinds: dict[str, Any] = {}
    for kind in KINDS:
        tensors = getattr(contents, kind)
        of_kinds[kind] = {name: local_part(value) for name, value in tensors.items()}
    return replace(contents, **of_kinds)


def _save_tensors(folder: Path, contents: Contents, group: dist.Group) -> None:
    """Write this rank's part of all tensors, one file a kind. Collective."""
    tensors = {}
    for kind in KINDS:
        for name, value in getattr(contents, kind).items():
            tensors[f"{kind}/{name}"] = value

    writer = PartWriter(str(folder), fqn_to_index_mapping=FileOfKind(), save_distributed=True)
    with naming(folder):
        try:
            save_parts(tensors, storage_writer=writer, process_group=group.handle)
        except CheckpointException as failure:  # of several ranks at once, and no Exception
            if writer.interruption is not None:
                raise writer.interruption from None
            error, _ = next(iter(failure.failures.values()))
            raise error from None


class PartWriter(HuggingFaceStorageWriter):
    """torch's writer, of which whatever goes wrong can be sent to the other ranks, as torch does:
    they would wait for a rank that fails to, say for a panic of safetensors, which is no Exception.
    """

    interruption: BaseException | None = None  # of this rank, where it is no Exception

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> TorchFuture[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except BaseException as failure:
            if not isinstance(failure, Exception):
                self.interruption = failure
            raise sendable(failure) from None


class FileOfKind(dict[str, int]):
    """The number of the file that a tensor belongs to, by the kind with which its name begins: one
    mapping for the names of all ranks.
    """

    def __init__(self) -> None:
        super().__init__({kind: number for number, kind in enumerate(KINDS, start=1)})

    def __missing__(self, name: str) -> int:
        return self[name.partition("/")[0]]


def _manifest_of_own(folder: Path, index: int) -> Manifest:
    return checkpoint.described(folder.glob(f"shard-{index + 1:05d}-*"))


def _finish(folder: Path, contents: Contents, of_ranks: list[Manifest], keep: int) -> None:
    """Write what is written once, and let the folder stand. Called by one rank only."""
    manifest = checkpoint.write_texts(folder, contents)
    for of_rank in of_ranks:
        manifest |= of_rank
    checkpoint.write_manifest(folder, manifest)
    checkpoint.finish(folder, keep)


def agree(group: dist.Group, doing: Callable[[], Any]) -> list[Any]:
    """What `doing` returns on each rank; what any rank raises is raised on all. Collective.

    What is no Exception, like KeyboardInterrupt, is raised as it is where it came up, and in words
    on the other ranks.
    """
    failure: BaseException | None = None
    result = None
    try:
        result = doing()
    # Of any kind: it need not end this process, and the others would wait for this rank.
    except BaseException as raised:
        failure = raised
    error = None if failure is None else sendable(failure)
    outcomes = dist.gather_objects((result, error), group)

    if failure is not None and not isinstance(failure, Exception):
        raise failure
    for _, of_rank in outcomes:
        if of_rank is not None:
            raise of_rank
    return [outcome for outcome, _ in outcomes]


def _nothing() -> None:
    pass


def check_grace(save_s: float) -> None:
    """Warn where the launcher would kill a run that was asked to stop before it has saved."""
    # Half of it, because the step that is under way has to end before.
    grace_s = launcher_grace_s()
    if grace_s is not None and save_s > grace_s / 2:
        log.warn(
            f"saving took {save_s:.0f} s, but a run that is asked to stop is killed by its "
            f"launcher after {grace_s:.0f} s, in which a step has to end, too; "
            f"export TORCH_ELASTIC_SHUTDOWN_TIMEOUT={max(110, round(4 * save_s))} before launching"
        )
