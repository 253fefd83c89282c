"""How a process joins the others of its run, and how it leaves them.

The launcher says how many there are (WORLD_SIZE, LOCAL_RANK, …); each takes the GPU of its local
rank. Beside the process group for tensors (NCCL on GPUs, gloo on CPUs) one over gloo is made for
objects and barriers, where ranks may wait for hours. A rank that fails says so in the store that
all joined by, and ends at once; the others look there every second, since a rank that waits for a
GPU does not notice that another one went.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from datetime import timedelta

import torch
import torch.distributed as torch_dist

from vlp import dist, rendezvous
from vlp.rendezvous import LaunchError

__all__ = ["PATIENCE", "TIMEOUT", "LaunchError", "fail", "join", "leave", "local_device"]

TIMEOUT = timedelta(minutes=30)  # of an exchange of tensors, where no option says otherwise
PATIENCE = timedelta(hours=24)  # of objects and barriers: a save or an index may take hours

_FAILED = "vlp/failed"  # in the store: the rank that failed first
_LOOK_EVERY_S = 1.0
_GRACE_S = 5.0  # for a rank's own error message, before it is ended from outside
_ABORT_S = 5.0  # for NCCL to give up its communicators

_left = threading.Event()  # whether this process has nobody to leave
_left.set()


def local_device(name: str, shared: bool = False) -> str:
    """The device of this process by the name that an option gives it.

    auto: the GPU of the launcher's local rank, or the CPU. cuda: that GPU. Any other name is
    returned as it is. Raises LaunchError where there is no such GPU, or where ranks would meet on
    one. `shared`: for processes that work alone; they may meet, and names are left to the loader.
    """
    if shared:
        if name not in ("auto", "cuda") or not torch.cuda.is_available():
            return "cpu" if name == "auto" else name
        return f"cuda:{dist.local_rank() % torch.cuda.device_count()}"

    if name.startswith("cuda:") and dist.local_world_size() > 1:
        raise LaunchError(
            f"device is {name}, which {dist.local_world_size()} processes of this machine "
            "(LOCAL_WORLD_SIZE) would share; use cuda, which takes the GPU of each local rank"
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return _local_gpu() if name == "cuda" else name


def _local_gpu() -> str:
    """The GPU of the launcher's local rank, which no other process of this machine has."""
    if not torch.cuda.is_available():
        raise LaunchError(
            "device is cuda, but torch sees no CUDA device (torch.cuda.is_available() is false); "
            "use auto or cpu, or install a torch that fits the driver"
        )

    # NCCL refuses two ranks on one GPU, but only once all have loaded their data.
    n_gpus = torch.cuda.device_count()
    n_processes = max(dist.local_world_size(), dist.local_rank() + 1)
    if n_processes > n_gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "unset")
        raise LaunchError(
            f"the launcher started {n_processes} processes on this machine (LOCAL_WORLD_SIZE), "
            f"but torch sees {n_gpus} GPU(s) (CUDA_VISIBLE_DEVICES is {visible}); start as many "
            f"as there are GPUs, with accelerate launch --num_processes or torchrun "
            f"--nproc-per-node {n_gpus}, or use the device cpu"
        )
    return f"cuda:{dist.local_rank()}"


def join(device: torch.device | str, timeout: timedelta = TIMEOUT) -> None:
    """Join the processes that the launcher announced, if there are any. Collective.

    timeout: how long a rank waits for another in an exchange of tensors. Raises LaunchError where
    GPUs cannot talk, the first rank is not reached, or packages differ between ranks. A process
    group that is there already is taken as it is.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return
    on_gpu = str(device).startswith("cuda")  # a wrong name is left to whoever uses the device
    if on_gpu:
        torch.cuda.set_device(device)  # before joining: NCCL takes the current one
    if dist.initialised():
        return

    if on_gpu:
        _join_gpus(torch.device(device), timeout)
    else:
        torch_dist.init_process_group("gloo", timeout=timeout, **rendezvous.meet(timeout))

    # Made now, by all ranks at once; a group made later would wait for whoever comes last.
    dist.set_control(torch_dist.new_group(backend="gloo", timeout=PATIENCE))
    _left.clear()
    threading.Thread(target=_watch, daemon=True).start()


def _join_gpus(device: torch.device, timeout: timedelta) -> None:
    """Make the process group of all ranks over NCCL."""
    if not torch_dist.is_nccl_available():
        raise LaunchError(
            f"several processes on {device} talk by NCCL, which this build of torch lacks "
            "(torch.distributed.is_nccl_available() is false); install a CUDA build of torch for "
            "Linux, or use the device cpu"
        )
    others = rendezvous.meet(timeout)
    torch_dist.init_process_group("nccl", device_id=device, timeout=timeout, **others)


def leave() -> None:
    """Leave the processes that `join` joined in good order, at a command's end. Collective."""
    if _left.is_set():
        return
    dist.await_all("the last rank to finish")  # whoever holds the store must not go first
    _left.set()
    dist.set_control(None)
    torch_dist.destroy_process_group()


def fail(status: int) -> None:
    """End this process because of an error that has been reported, so that the others end too.

    Returns where there are no others. Nothing is waited for: destroying communicators in good order
    would wait for ranks that are in the middle of an exchange.
    """
    if _left.is_set():
        return
    report = threading.Thread(target=_report_failure, daemon=True)
    report.start()
    report.join(_ABORT_S)

    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _report_failure() -> None:
    """Tell the others, and give up NCCL's communicators. Each may find its connection dead."""
    try:
        store = torch_dist.distributed_c10d._get_default_store()
        if not store.check([_FAILED]):
            store.set(_FAILED, str(dist.rank()))
        if dist.is_main():
            time.sleep(2 * _LOOK_EVERY_S)  # it may hold the store, where the others look
        if torch_dist.get_backend() == "nccl":
            torch_dist.distributed_c10d._abort_process_group()
    except Exception as error:  # of a lost connection: the rank ends in any case
        print(f"vlp (rank {os.environ.get('RANK', '0')}): {error}", file=sys.stderr)


def _watch() -> None:
    """End this process some seconds after another one has failed, whatever it is waiting for."""
    # A connection of its own: the other one may be busy while a group is made.
    store = torch_dist.distributed_c10d._get_default_store().clone()
    while not _left.wait(_LOOK_EVERY_S):
        try:
            failed = store.check([_FAILED])
        except Exception:  # the store's host has ended: exchanges with it fail by themselves
            return
        if failed:
            break
    else:
        return

    # Most ranks notice by themselves, and report in their own words.
    failed_rank = store.get(_FAILED).decode()
    time.sleep(_GRACE_S)
    if _left.is_set():
        return
    print(
        f"vlp (rank {dist.rank()}): rank {failed_rank} failed, as stands above or in its own log; "
        "this one ends too",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)
