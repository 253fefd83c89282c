"""Real processes that write into a store: killed at every request, and two at once."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from tests.data.loopback_store import Store
from tests.data_tools.in_stores import FILTER, content, forget_all, local, vlp

CALL = ("filter", "s3://bucket/in", *FILTER, "--to")


def started(server: Store, *arguments: object) -> subprocess.Popen[str]:
    """A process of its own with a call of `vlp data`."""
    storage = [
        "s3:key=k",
        "s3:secret=s",
        f"s3:client_kwargs.endpoint_url={server.url}",
        "s3:client_kwargs.region_name=us-east-1",
    ]
    options = [word for setting in storage for word in ("--storage", setting)]
    command = [sys.executable, "-m", "vlp.cli", "data", *map(str, arguments), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def killed(server: Store, call: tuple, number: int) -> bool:
    """Kill a call with SIGKILL at its request of this number, from 0, before that is carried out;
    whether it came so far.
    """
    server.requests.clear()
    server.faulty = {number: "stall"}
    process = started(server, *call)
    while process.poll() is None and len(server.requests) <= number:
        time.sleep(0.01)
    came_so_far = process.poll() is None
    process.kill()
    process.communicate()
    server.faulty = {}
    return came_so_far


def requests_of(server: Store, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a call asks of the store in a process that has just begun, its input in the cache."""
    for folder in ("first", "whole"):
        forget_all(monkeypatch)
        server.requests.clear()
        assert vlp(*CALL, f"s3://bucket/{folder}") == 0
    return list(server.requests)


def test_a_killed_call_goes_on(server, tmp_path, monkeypatch):
    here = local(tmp_path, "filter", tmp_path / "root" / "in", *FILTER)
    asked = requests_of(server, monkeypatch)
    [*_, last_shard] = [i for i, request in enumerate(asked) if request.endswith("/00002.tar")]
    assert asked[last_shard].startswith("PUT")

    assert killed(server, (*CALL, "s3://bucket/out"), last_shard)
    there = content(server.root / "out")
    assert "00001.tar" in there and "00002.tar" not in there and ".writer-1-of-1.json" in there
    forget_all(monkeypatch)
    server.requests.clear()
    assert vlp(*CALL, "s3://bucket/out") == 0
    assert content(server.root / "out") == here
    sent = [request for request in server.requests if request.startswith("PUT")]
    assert sum(request.endswith(".tar") for request in sent) == 1


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_call_may_be_killed_at_any_request(server, tmp_path, monkeypatch):
    here = local(tmp_path, "filter", tmp_path / "root" / "in", *FILTER)
    n_requests = len(requests_of(server, monkeypatch))
    n_killed = 0
    for number in range(0, n_requests, 3):
        # A call of several processes asks in another order each time.
        shared = ("--processes", 2) if number % 2 else ()
        call = (*CALL, f"s3://bucket/out{number}", *shared)
        n_killed += killed(server, call, number)
        forget_all(monkeypatch)
        assert vlp(*call) == 0
        assert content(server.root / f"out{number}") == here, number
    assert n_killed > 8


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_calls_at_once_leave_what_one_does(server, tmp_path):
    here = local(tmp_path, "filter", tmp_path / "root" / "in", *FILTER)
    calls = [started(server, *CALL, "s3://bucket/out") for _ in range(2)]
    said = [call.communicate()[1] for call in calls]

    # The second refuses, or has watched the note of the first until that was gone.
    refused = [i for i, call in enumerate(calls) if call.returncode]
    assert len(refused) < 2 and all("is in use by" in said[i] for i in refused), said
    assert content(server.root / "out") == here
