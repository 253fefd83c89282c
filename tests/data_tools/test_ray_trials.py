"""Long trials of tools on a Ray cluster: all tools, nodes and calls that are killed at several
moments, nodes that differ from the machine of the call.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import vlp
from tests.data import loopback_store
from tests.data.loopback_store import Store
from tests.data.material import encoded, picture
from tests.data_tools import in_stores
from tests.data_tools.mining import N, store, twins
from tests.data_tools.mining import write as write_twins
from tests.data_tools.nouns import write_wordnet
from tests.data_tools.ray_cluster import STORE, Nodes, contents, joined, lives, same_on_ray
from tests.data_tools.test_filter_scores import network, write_head
from tests.data_tools.test_modality import shard as sounding
from tests.data_tools.test_modality import sound
from tests.data_tools.test_models import detector  # noqa: F401  # a fixture
from tests.data_tools.test_work import write
from tests.data_tools.tools import CAPTIONS, call
from tests.eval.material import tiny_open_clip
from vlp.data import stores
from vlp.data.format import ShardWriter
from vlp.data_tools import (
    balance,
    certainty,
    concepts,
    counting,
    dedup,
    embed,
    mine,
    modality,
    negatives,
    reshard,
    rewrite,
    scenes,
    stats,
    validate,
)
from vlp.data_tools import filter as filtering
from vlp.data_tools._run import nodes, tries, work

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def running() -> Iterator[Nodes]:
    with joined() as made:
        yield made


def pictured(folder: Path) -> Path:
    """Three shards of pictures that open, two of them twice."""
    with ShardWriter(folder, 6) as writer:
        for i in range(18):
            image = encoded(picture(i % 16, (24, 24)))
            writer.add(f"k{i}", image, "png", CAPTIONS[i % len(CAPTIONS)])
    return folder


def test_every_tool_writes_the_same_bytes_on_a_cluster(
    running: Nodes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    language_models: Path,
    detector: Path,  # noqa: F811
) -> None:
    """The model's device is the CPU: the second node has its GPU in name only."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    source, twin = pictured(Path("in")), write_twins(Path("twins"))
    Path("sounds").mkdir()
    sounds = sounding(Path("sounds"), {"a": [("wav", sound(440))], "b": []})
    rows = store(Path("rows"), *twins())
    clip = tiny_open_clip(Path("clip"))
    head = write_head(Path("head.pth"), network("linear", 2 * N).state_dict())
    cpu = ["--device", "cpu"]
    Path("queries.txt").write_text("car\ntruck\ndogs\ntable\n")
    trials: list[tuple[Any, Path, list[Any]]] = [
        (balance, source, ["--queries", "queries.txt", "--cap", 2]),
        (dedup, source, []),
        (dedup, source, ["--against", "twins", "--keep-copies"]),
        (dedup, source, ["--search", "buckets"]),
        (dedup, twin, ["--embeddings", rows, "--cosine", 0.6, "--search", "buckets"]),
        (negatives, source, []),
        (negatives, source, ["--rewriter", language_models / "masked", *cpu]),
        (rewrite, source, ["--model", language_models / "causal", "--kinds", "short", *cpu]),
        (mine, twin, ["--embeddings", rows, "--k", 2, "--images", *cpu]),
        (mine, twin, ["--embeddings", rows, "--order", 2, *cpu]),
        (embed, source, ["--model", f"local-dir:{clip}", *cpu]),
        (embed, source, ["--model", f"local-dir:{clip}", "--captions", "txt", *cpu]),
        (filtering, source, ["--model", f"local-dir:{clip}", "--min-score", -1, *cpu]),
        (filtering, source, ["--model", f"local-dir:{clip}", "--top", "clip_scores=50%", *cpu]),
        (
            filtering,
            twin,
            ["--embeddings", rows, "--head", f"score={head},linear", "--top", "score=50%"],
        ),
        (filtering, twin, ["--embeddings", rows, "--like", rows, "--cells", 5]),
        (counting, source, ["--balance", 2]),
        (concepts, source, ["--wordnet", write_wordnet(Path("wordnet")), "--min-count", 1]),
        (stats, source, []),
        (counting, source, []),
        (certainty, twin, ["--embeddings", rows, "--epochs", 2, *cpu]),
        (modality, sounds, ["--sound", "--seconds", 0.5]),
        (reshard, source, ["--samples-per-shard", 4, "--renumber"]),
        (reshard, source, ["--samples-per-shard", 5, "--shuffle", 0]),
    ]
    for tool, shards, options in trials:
        same_on_ray(tool, options, str(shards), running.address)

    # What has options of its own in the place of --to, or no input.
    call(validate, source, "--notes", "here")
    call(validate, source, "--notes", "there", "--ray", running.address)
    assert contents(Path("here")) == contents(Path("there"))
    sets = ["--train", 1030, "--val", 4, "--test", 4, "--zeroshot", 56, "--retrieval", 8]
    sets += ["--proofs", 27, "--size", 16]
    call(scenes, *sets, "--to", "scenes here", "--processes", 1)
    call(scenes, *sets, "--to", "scenes there", "--ray", running.address)
    made = contents(Path("scenes here"))
    assert made == contents(Path("scenes there")) and len(made) > 30

    # A detector takes what GPU there is, so that it is asked on the head alone.
    seen = ["--detector", detector, "--threshold", 0.01]
    with pytest.raises(ValueError, match="no caption in in counts anything"):
        call(counting, source, "--to", "seen", *seen, "--ray", running.address)
    assert len(trials) == 24


def test_a_cluster_reads_and_writes_a_store(
    running: Nodes,
    server: Store,
    tmp_path: Path,
) -> None:
    """The nodes need see no folder of the machine of the call."""
    here = in_stores.local(tmp_path, "filter", tmp_path / "root" / "in", *in_stores.FILTER)
    there = ["filter", "s3://bucket/in", *in_stores.FILTER, "--to", "s3://bucket/out"]
    assert in_stores.vlp(*there, "--ray", running.address) == 0
    assert in_stores.content(server.root / "out") == here and len(here) > 10


def curation(
    rows: Path | str, head: Path | str, queries: Path | str
) -> list[tuple[Any, list[Any]]]:
    """Calls that score, share, choose cells, read pictures and balance."""
    scored = ["--embeddings", rows, "--head", f"a={head}", "--head", "near=cosine"]
    reader = "tests.data_tools.test_spotting:of_mean"
    return [
        (filtering, [*scored, "--top", "a=60%", "--top", "extra=0.8", "--keep", "near > -1"]),
        (filtering, ["--embeddings", rows, "--like", rows, "--cells", 5, "--top", "extra=50%"]),
        (filtering, ["--ocr", reader, "--ocr-field", "text in it", "--max-overlap", 0.4]),
        (balance, ["--queries", queries, "--cap", 5, "--seed", 3]),
    ]


@pytest.fixture
def curated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What those calls read."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    captions = {i: [f"caption {i}", f"also {i} 7"] for i in range(24)}
    write_twins(tmp_path / "in", captions)
    image, text = twins()
    image[3] = 0
    store(tmp_path / "rows", image, text)
    torch.save({"weight": torch.linspace(-1, 1, image.shape[1])[None]}, tmp_path / "head.pth")
    (tmp_path / "queries.txt").write_text("caption\nalso\n7\n")
    return tmp_path


def test_curation_writes_the_same_bytes_on_a_cluster(
    running: Nodes, curated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(curated)
    n = 0
    for tool, options in curation("rows", "head.pth", "queries.txt"):
        same_on_ray(tool, options, "in", running.address)
        n += 1
    assert n == 4


def test_curation_in_a_store_on_a_cluster(
    running: Nodes, curated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No folder is shared but the store: rows, head and queries lie there, too."""
    monkeypatch.setenv("VLP_CACHE", str(curated / "cache"))
    in_stores.forget_all(monkeypatch)
    monkeypatch.setattr(stores, "options", {})
    with loopback_store.store(curated) as server:
        stores.use({"s3": in_stores.options(server)})
        calls = zip(
            curation(curated / "rows", curated / "head.pth", curated / "queries.txt"),
            curation(*(f"s3://bucket/{name}" for name in ("rows", "head.pth", "queries.txt"))),
        )
        for n, ((tool, here), (_, there)) in enumerate(calls):
            out = curated / f"out{n}"
            call(tool, curated / "in", *here, "--to", curated / f"here{n}")
            to = ["--to", f"s3://bucket/out{n}", "--ray", running.address]
            call(tool, "s3://bucket/in", *there, *to)
            differing = differences(curated / f"here{n}", out)
            assert not differing, f"{tool.__name__} {there}: {differing}"
        assert n == 3 and any("rows" in request for request in server.requests)


def differences(here: Path, there: Path) -> list[str]:
    """The files of two folders that differ; the page of a report names its input."""
    ours, theirs = contents(here), contents(there)
    names = sorted({*ours, *theirs} - {"balance.html"})
    assert len(names) > 3
    return [name for name in names if ours.get(name) != theirs.get(name)]


def test_nodes_lost_at_several_moments_leave_the_same_bytes(running: Nodes, tmp_path: Path) -> None:
    source = write(tmp_path / "in", 24, 150)
    options: list[Any] = ["--samples-per-shard", 40, "--shuffle", 0]
    call(reshard, source, *options, "--to", tmp_path / "whole")
    rng = random.Random(0)
    n_lost = 0
    for trial in range(4):
        out = tmp_path / f"out{trial}"
        after = rng.randint(0, 80)

        with running.losing_second(out, "0*_reshard.json", after):
            call(reshard, source, *options, "--to", out, "--ray", running.address)
        n_lost += 1
        assert contents(out) == contents(tmp_path / "whole")
    assert n_lost == 4


def workers_of_actors() -> set[int]:
    """Processes on this machine that Ray runs our work in."""
    return {
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if any("ray::Worker" in word for word in process.info["cmdline"] or [])
    }


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_killed_call_leaves_no_process_on_the_nodes_and_goes_on(
    running: Nodes, tmp_path: Path, signum: int
) -> None:
    source, out = write(tmp_path / "in", 40, 100), tmp_path / "out"
    command = [sys.executable, "-m", "vlp.cli", "data", "negatives", str(source), "--to", str(out)]
    command += ["--ray", running.address]
    tool = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 200
    while len(list(out.glob("0*_negatives.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    begun = workers_of_actors()
    os.kill(tool.pid, signum)
    told, _ = tool.communicate()
    marks = list(out.glob("0*_negatives.json"))
    assert begun and 3 <= len(marks) < 40
    if signum != signal.SIGKILL:
        name = signal.Signals(signum).name
        words = f"vlp: ended by {name}; negatives: {len(marks)} of 40 shards are finished and stay"
        assert tool.returncode == 128 + signum and words in told
    while any(map(lives, begun)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(lives, begun))

    call(negatives, source, "--to", out)
    call(negatives, source, "--to", tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")
    assert not list(out.glob(".*"))


def test_without_tries_a_lost_node_ends_the_call(
    running: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control of the test that loses a node in mid-run."""
    from tests.data_tools import ray_works
    from tests.data_tools.ray_cluster import ON_RAY, jobs

    monkeypatch.setattr(tries, "LOST_NODES", 1)
    log, leave = tmp_path / "log", tmp_path / "leave"

    def lose() -> None:
        while len(ray_works.told(log)) < 2:
            time.sleep(0.02)
        running.lose_second()

    thread = threading.Thread(target=lose)
    thread.start()
    with pytest.raises(work.WorkerLost, match="1 nodes were lost at one shard"):
        waits = ray_works.WaitsForLeave(log, leave)
        work.carry_out("slow", jobs(tmp_path, 6), waits, ON_RAY)
    thread.join()
    running.second = running.cluster.add_node(num_cpus=1, num_gpus=1, **STORE)


def start_node(
    running: Nodes, before: Sequence[str] = (), environment: dict[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """A node of eight cores as a user starts it, once it has joined."""
    import ray

    n_before = len([node for node in ray.nodes() if node["Alive"]])
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus", "8"]
    node = subprocess.Popen(
        [*before, *command, "--address", running.address],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 200
    while len([node for node in ray.nodes() if node["Alive"]]) == n_before:
        assert time.monotonic() < deadline, "the node does not join"
        time.sleep(0.1)
    return node


def test_a_node_with_another_version_is_named(running: Nodes, tmp_path: Path) -> None:
    # The package of this checkout, of another number.
    other = tmp_path / "other" / "vlp"
    other.mkdir(parents=True)
    here = Path(vlp.__file__).parent
    for path in here.iterdir():
        if path.name not in ("__init__.py", "__pycache__"):
            (other / path.name).symlink_to(path)
    text = (here / "__init__.py").read_text()
    (other / "__init__.py").write_text(text.replace(vlp.__version__, "0.0.9"))

    # From a folder without a vlp of its own, which the nodes would import first.
    command = [Path(sys.executable).parent / "vlp", "data", "stats", write(tmp_path / "in", 3, 4)]
    command += ["--to", tmp_path / "out", "--ray", running.address]
    node = start_node(running, environment={**os.environ, "PYTHONPATH": str(other.parent)})
    try:
        tool = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    finally:
        node.terminate()
        node.wait()
    message = rf"^vlp: nodes .*: node \S+ \(.*\): vlp 0\.0\.9 \(code \w+\) \(here {vlp.__version__}"
    assert tool.returncode == 1 and re.search(message, tool.stderr), tool.stderr
    assert "node" in tool.stderr and tool.stderr.count("0.0.9") == 1
    assert not (tmp_path / "out").exists()


def test_a_node_that_does_not_see_the_folder_is_named(running: Nodes, tmp_path: Path) -> None:
    """A node behind a mount of its own, in which the folder of the shards is empty."""
    source = write(tmp_path / "in", 6, 4)
    hide = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs none "{source}" && exec "$@"', "sh"]
    if subprocess.run([*hide, "true"], capture_output=True).returncode:
        pytest.skip("this user may not mount")

    node = start_node(running, hide)
    try:
        message = r"node \S+ does not see .*in/00000\.tar.*all nodes share"
        with pytest.raises(nodes.ClusterError, match=message):
            call(stats, source, "--to", tmp_path / "out", "--ray", running.address)
    finally:
        node.terminate()
        node.wait()
