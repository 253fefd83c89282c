"""Whole runs on remote shards: a store that is away, or refuses, ends a run that goes on later, as
if nothing had been; metrics say what was fetched.
"""

from __future__ import annotations

import json
import os
import re
import signal

import fsspec
import pytest

from tests import ranks
from tests.data.loopback_store import store
from tests.data.material import write_shards
from vlp import checkpoint, config
from vlp.checks import check_patience
from vlp.cli import main
from vlp.data import asking
from vlp.lifetime import PutOff
from vlp.train import train

PATIENCE_S = 1.5


@pytest.fixture
def server(tmp_path, monkeypatch):
    """12 shards of 40 samples on a server, and an empty cache."""
    monkeypatch.setenv("VLP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(asking, "_PAUSE_S", 0.001)
    write_shards(tmp_path / "root", 480, 40)
    with store(tmp_path / "root") as running:
        yield running


def overrides(url: str, *more: str) -> list[str]:
    """Of a run of nine steps of 48 rows, on shards of three lanes."""
    path = f"{url}/{{00000..00011}}.tar"
    source = f"{{name: remote, path: '{path}', window: 3, patience_s: {PATIENCE_S}}}"
    return [f"data.sources=[{source}]", "data.workers=0", "objective={infonce: {}}", *more]


def records(run) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


def losses(run) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in records(run)}


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("error", r"gave no shard for .* \(patience_s is 1.5\): cannot fetch"),
        pytest.param(
            "denied",
            r"refuses what it gave before: .*401.*. Renew the credentials",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_store_that_is_lost_puts_the_run_off(
    settings, server, tmp_path, capsys, monkeypatch, fault, message
):
    whole = train(settings(*overrides(server.url), out="whole"))
    # What the metrics say was fetched is what the server sent, each shard once.
    last = records(whole)[-1]
    assert last["fetched_gb"] * 1e9 == sum(server.n_sent[f"{i:05d}.tar"] for i in range(12))
    assert 1 <= last["read_amplification"] < 1.25 and max(server.served.values()) == 1
    assert last.keys().isdisjoint({"fetched_bytes", "used_bytes"})

    monkeypatch.setenv("VLP_CACHE", str(tmp_path / "another"))

    # The first shards come, and then none.
    settings(out="cut")
    command = ["train", str(tmp_path / "cut.yaml"), *overrides(server.url)]
    server.faults = [""] * 7 + [fault] * 10**4
    assert main(command) == 75
    said = capsys.readouterr().out
    before = losses(tmp_path / "cut")
    assert 0 < len(before) < 9 and f"Stopped after step {len(before)}; saved." in said
    assert re.search(message, said) and "resume=auto" in said
    assert checkpoint.newest(tmp_path / "cut").name == f"step_{len(before):08d}"

    server.faults = []
    assert main([*command, "resume=auto"]) == 0
    assert losses(tmp_path / "cut") == losses(whole)


class Signalling(list):
    """Faults of a server, the first of which comes with a signal to this process."""

    asks = True

    def pop(self, place: int) -> str:
        fault = super().pop(place)
        if fault and self.asks:
            self.asks = False
            os.kill(os.getpid(), signal.SIGTERM)
        return fault


def watched(server, tmp_path, patience_s: float) -> list[str]:
    """Of a run that measures the loss over a held-out shard on the same server."""
    write_shards(tmp_path / "root" / "held out", 48, 48, start=900)
    path = f"{server.url}/held out/00000.tar"
    source = f"{{name: remote, path: '{path}', window: 1, patience_s: {patience_s}}}"
    held_out = f"{{data: {{sources: [{source}]}}, batch: 48, every: 2}}"
    return [
        text.replace(f"patience_s: {PATIENCE_S}", f"patience_s: {patience_s}")
        for text in overrides(server.url, f"validation={held_out}")
    ]


def test_a_store_of_held_out_samples_that_is_lost_puts_the_run_off(
    settings, server, tmp_path, capsys
):
    settings(out="cut")
    command = ["train", str(tmp_path / "cut.yaml"), *watched(server, tmp_path, 0.2)]
    server.ending, server.faults = "held out/00000.tar", ["error"] * 10**4
    assert main(command) == 75
    said = capsys.readouterr().out
    assert "validation: step 0: " in said and "gave no shard for" in said
    assert "Stopped after step 2; saved." in said
    assert checkpoint.newest(tmp_path / "cut").name == "step_00000002"

    server.faults = []
    assert main([*command, "resume=auto"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "cut/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "val.loss" in line][-1] == 9


@pytest.mark.parametrize(
    ("ending", "n_good", "step"),
    [pytest.param(".tar", 7, r"\d", marks=pytest.mark.slow), ("held out/00000.tar", 0, "2")],
)
def test_a_signal_ends_the_wait_for_a_store(
    settings, server, tmp_path, capsys, ending, n_good, step
):
    settings(out="cut")
    command = ["train", str(tmp_path / "cut.yaml"), *watched(server, tmp_path, 600)]
    server.ending = ending
    server.faults = Signalling([""] * n_good + ["error"] * 10**6)
    assert main(command) == 128 + signal.SIGTERM
    assert re.search(f"stopped by SIGTERM after step {step}; saved", capsys.readouterr().out)


def on_rank(path, url, first_fails, cache, lost=".tar", more=()):
    """A run of which the second rank loses its store after a few shards, whose addresses end in
    `lost`.
    """
    import torch.distributed as torch_dist

    # A node of its own, which needs shards that the other does not fetch.
    rank = torch_dist.get_rank()
    os.environ["VLP_CACHE"] = f"{cache}{rank}"
    asking._PAUSE_S = 0.001
    impatient = overrides(url, "train.timeout_minutes=0.008")
    with pytest.raises(ValueError, match=r"patience_s is 1.5, but .* \(0.48 s\) the other ranks"):
        check_patience(config.load(path, impatient))
    # Steps that are not logged learn of a request to stop later.
    options = ["train.device=cpu", "train.micro_batches=1", "log.every=100", "checkpoint.every=100"]
    n_opened, real = 0, fsspec.open

    def open_some(address, *args, **kwargs):
        nonlocal n_opened
        n_opened += str(address).endswith(lost)
        if str(address).endswith(lost) and rank == 1 and n_opened > first_fails:
            raise ConnectionResetError("connection reset")
        return real(address, *args, **kwargs)

    fsspec.open = open_some
    try:
        train(config.load(path, overrides(url, *options, *more)))
    except PutOff as put_off:
        return [put_off.status, str(put_off)]
    return []


@pytest.mark.parametrize("first_fails", [5, pytest.param(0, marks=pytest.mark.slow)])
def test_all_ranks_save_and_leave_where_one_loses_its_store(settings, tmp_path, first_fails):
    folder = write_shards(tmp_path / "root", 480, 40)
    settings()
    given = (tmp_path / "run.yaml", f"file://{folder}", first_fails, tmp_path / "cache")
    first, second = ranks.run(2, on_rank, *given)
    assert first == second and first[0] == 75
    assert "gave no shard for" in first[1] and "connection reset" in first[1]
    saved = checkpoint.all_of(tmp_path / "run")
    if first_fails:
        assert saved and f"Stopped after step {int(saved[-1].name[-8:])}; saved." in first[1]
    else:
        assert not saved and "before the first step; there is nothing to save" in first[1]


@pytest.mark.slow
def test_all_ranks_save_and_leave_where_one_loses_what_it_measures(settings, tmp_path):
    folder = write_shards(tmp_path / "root", 480, 40)
    write_shards(tmp_path / "root" / "held out", 48, 48, start=900)
    settings()
    source = (
        f"{{name: remote, path: 'file://{folder}/held out/00000.tar', window: 1, patience_s: 1.5}}"
    )
    held_out = f"validation={{data: {{sources: [{source}]}}, batch: 48, every: 2}}"
    of_run = (tmp_path / "run.yaml", f"file://{folder}", 0, tmp_path / "cache")
    first, second = ranks.run(2, on_rank, *of_run, "held out/00000.tar", [held_out])
    assert first == second and first[0] == 75
    assert "gave no shard for" in first[1] and "connection reset" in first[1]
    saved = checkpoint.all_of(tmp_path / "run")
    assert saved and f"Stopped after step {int(saved[-1].name[-8:])}; saved." in first[1]
