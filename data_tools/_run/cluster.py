"""Joining a Ray cluster, and what its nodes must have for it to do a tool's work."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vlp.data_tools._run import nodes
from vlp.data_tools._run.local import WorkerLost
from vlp.data_tools._run.nodes import ClusterError

AUTO = "auto"  # the address that --ray alone stands for
_CONNECT_S = 10  # for a cluster's port to answer
# What a client of HTTP/2, which gRPC speaks, begins with; and its settings, of which none differs.
_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
_SETTINGS = 4  # the kind of frame that a server answers with, in its fourth byte
LOOK_S = 5  # between two looks whether the head is still there
_SILENT_S = 25  # of the head, for the call to end: Ray itself ends it after 60
_ANSWER_S = 180  # for a node to start a process and answer
_TOKEN = Path.home() / ".ray" / "auth_token"  # where `ray start` keeps a cluster's


class HeadLost(WorkerLost):
    """The head of the cluster does not answer any more."""


def import_ray() -> Any:
    """Ray, an optional dependency; raises ValueError where it is not installed."""
    try:
        import ray
    except ImportError:
        raise ValueError("Ray is not installed; install it with pip install 'vlp[ray]'") from None
    return ray


def connect(address: str) -> None:
    """Join the cluster at HOST:PORT. AUTO: that of RAY_ADDRESS, else the one that was started on
    this machine, else a new one. Nothing to do where this process has joined one.

    Raises ClusterError where none answers or its nodes differ from this machine.
    """
    # Ray looks for a token by itself only where it finds the cluster by itself.
    if _TOKEN.exists() or "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    ray = import_ray()
    if ray.is_initialized():
        return

    place = _place(address)
    if place is not None:
        _refuse_deaf(place)
    options = {"log_to_driver": False, "logging_level": logging.ERROR, "include_dashboard": False}
    try:
        with _own_signals(), _quiet():
            ray.init(address=place or "local", **options)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise ClusterError(_why_not(place, error)) from None

    # Ray prints what its daemons report on stdout, where tools print what they have made. There is
    # no public switch; a Ray without this one prints.
    with suppress(AttributeError):
        ray._private.worker._worker_logs_enabled = False
    nodes.refuse_differing(nodes.versions(), versions_of_nodes(ray))


def _place(address: str) -> str | None:
    """HOST:PORT of the cluster to join; None where one is to be started."""
    source = "--ray"
    if address == AUTO and os.environ.get("RAY_ADDRESS"):
        source, address = "RAY_ADDRESS", os.environ["RAY_ADDRESS"]
    if address == AUTO:
        return _begun_here()
    if address == "local":
        return None

    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        raise ClusterError(
            f"{source} {address}: expected HOST:PORT of a cluster that this machine is a node of "
            "(ray start says which); to send a call to another one, ray job submit brings it there"
        )
    return address


def _begun_here() -> str | None:
    """HOST:PORT of the cluster that was started on this machine; None where none was."""
    # Ray's address="auto" would also take any cluster whose processes it sees, of whomever. Read
    # here, because what reads the file in Ray is private.
    folder = os.environ.get("RAY_TMPDIR", "/tmp")
    if sys.platform == "linux" and "RAY_TMPDIR" not in os.environ:
        folder = os.environ.get("TMPDIR", "/tmp")
    try:
        return Path(folder, "ray", "ray_current_cluster").read_text().strip() or None
    except FileNotFoundError:
        return None


def _refuse_deaf(place: str) -> None:
    """Raise ClusterError where nothing listens, or what listens is no server of gRPC, as a
    dashboard is none: Ray itself would try for many minutes.
    """
    advice = "start one with ray start --head, look with ray status, or let ray stop forget one"
    try:
        with _reached(place, _CONNECT_S) as connection:
            # Behind TLS nothing answers a greeting that is not encrypted.
            speaks = os.environ.get("RAY_USE_TLS", "0") != "0" or _speaks_grpc(connection)
    except (OSError, OverflowError) as error:
        raise ClusterError(
            f"no Ray cluster answers at {place} ({error}); {advice} that is gone"
        ) from None

    if not speaks:
        raise ClusterError(
            f"no Ray cluster answers at {place}: something else listens there. Expected the port "
            "that ray start --head has said (6379 unless told otherwise), not that of a dashboard "
            "(8265)"
        )


def _speaks_grpc(connection: socket.socket) -> bool:
    """Whether who listens greets as gRPC does; raises OSError where it is silent."""
    connection.sendall(_GREETING)
    answer = b""
    while len(answer) < 4:
        part = connection.recv(4 - len(answer))
        if not part:
            return False
        answer += part
    return answer[3] == _SETTINGS


def _reached(place: str, timeout_s: float) -> socket.socket:
    """A connection to HOST:PORT; raises OSError, OverflowError where nothing listens."""
    host, _, port = place.rpartition(":")
    return socket.create_connection((host.strip("[]"), int(port)), timeout_s)


def _why_not(place: str | None, error: Exception) -> str:
    """What to say where Ray could not join or start a cluster."""
    name = (
        f"the Ray cluster at {place} could not be joined" if place else "Ray could not be started"
    )
    reasons = [str(reason) for reason in (error, error.__cause__) if reason]
    if any("AuthToken" in reason or "uthentication" in reason for reason in reasons):
        return (
            f"{name}: it asks for another token; bring ~/.ray/auth_token of its head here, or its "
            "content as RAY_AUTH_TOKEN"
        )

    # Of versions that differ, the second line tells which.
    lines = [line.strip() for line in reasons[0].splitlines() if line.strip()]
    return f"{name} ({' '.join(lines[:4])[:400]}); look with ray status"


class Head:
    """The head of the cluster that this process has joined. Without it no process starts, and after
    a minute Ray ends the process of the call with a line of its own.
    """

    def __init__(self, ray: Any) -> None:
        self.place: str = ray.get_runtime_context().gcs_address
        self._looked_at = self._heard_at = time.monotonic()

    @property
    def answers(self) -> bool:
        """Whether it did at the last look; asked for anything, Ray waits for one that does not."""
        return self._heard_at == self._looked_at

    def check(self) -> None:
        """Look now and then whether it answers; raises HeadLost once it has not for long."""
        now = time.monotonic()
        if now - self._looked_at < LOOK_S:
            return
        self._looked_at = now
        try:
            _reached(self.place, LOOK_S).close()
            self._heard_at = now
        except OSError as error:
            silent_s = now - self._heard_at
            if silent_s > _SILENT_S:
                raise HeadLost(
                    f"the head of the Ray cluster at {self.place} has not answered for "
                    f"{silent_s:.0f} s ({error}). What is finished stays: the same command goes on "
                    "once a head runs again, on another cluster or without --ray"
                ) from None


@contextmanager
def _own_signals() -> Iterator[None]:
    """Around a call of Ray that puts an answer of its own to SIGTERM in the place of ours."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Around a call of Ray that warns by itself, in C++, of what it raises afterwards."""
    sys.stderr.flush()
    console = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(console, 2)
        os.close(console)
        os.close(nowhere)


def versions_of_nodes(ray: Any) -> dict[str, dict[str, str]]:
    """What each node that can work has installed, by the node's name; ClusterError where one cannot
    say.
    """
    workers = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    answers = {_ask(ray, node): _name(node) for node in workers}
    wait(answers, _ANSWER_S)

    versions: dict[str, dict[str, str]] = {}
    for answer, name in answers.items():
        if not answer.done():
            raise ClusterError(f"{name} has not answered in {_ANSWER_S} s; look with ray status")
        error = answer.exception()
        if isinstance(error, ray.exceptions.RayTaskError):
            raise ClusterError(
                f"{name} cannot import this version of vlp ({error.cause}); install vlp[ray] "
                "there, the same version as here"
            )
        # One that is lost meanwhile will not work.
        if error is None:
            versions[name] = answer.result()
    return versions


def _ask(ray: Any, node: dict[str, Any]) -> Future[Any]:
    """The versions that a node has, once it has said."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # Inside, so that it is sent as a whole to nodes that may lack this module.
    def installed() -> dict[str, str]:
        from vlp.data_tools._run import nodes

        return nodes.versions()

    place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    # On no core of its own: others may have all of them.
    task = ray.remote(installed).options(num_cpus=0, scheduling_strategy=place)
    answer: Future[Any] = task.remote().future()
    return answer


def _name(node: dict[str, Any]) -> str:
    """A node in words. The last part tells those of one machine apart."""
    return (
        f"node {node['NodeManagerHostname']} ({node['NodeManagerAddress']}, {node['NodeID'][:6]})"
    )


def nodes_of(ray: Any, *, alive: bool) -> set[str]:
    """The ids of the nodes that live, or of those that were lost or have left."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"] == alive}


def check_device(device: str) -> None:
    """Raise ClusterError for the device of a model that the cluster lacks."""
    if device.startswith("cuda:"):
        raise ClusterError(
            f"--device {device}: on Ray each process is given a GPU; use --device cuda or auto"
        )
    if device == "cuda" and not has_gpus():
        raise ClusterError(
            "--device cuda, but no node of the cluster has a GPU (ray status); start one that has, "
            "or use --device auto or cpu"
        )


def has_gpus() -> bool:
    """Whether a node of the cluster has a GPU."""
    n_gpus: float = import_ray().cluster_resources().get("GPU", 0)
    return n_gpus >= 1
