"""Two calls in one folder: the second one is refused and told why. Real processes everywhere."""

import errno
import fcntl
import importlib
import json
import os
import pkgutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.data.material import write_shards
from tests.test_messages import CONFIG
from vlp import checkpoint, data_tools, locks
from vlp.cli import main

ROOT = Path(__file__).resolve().parent.parent
HOLD = """
import sys
from pathlib import Path
from vlp.locks import InUse, held
try:
    part = int(sys.argv[2]), int(sys.argv[3])
    with held(Path(sys.argv[1]), advice="Go away", part=part, beside=len(sys.argv) > 4):
        print("held", flush=True)
        sys.stdin.read()
except InUse as error:
    print(error, flush=True)
"""
RACE = """
import os, sys, time
from pathlib import Path
from vlp.locks import InUse, held
n_times, inside = 0, Path(sys.argv[1]) / "inside"
until = time.monotonic() + 1.5
while time.monotonic() < until:
    try:
        with held(Path(sys.argv[1]), advice=""):
            inside.mkdir()
            time.sleep(0.0002)
            inside.rmdir()
            n_times += 1
    except InUse:
        pass
print(n_times)
"""


@pytest.fixture
def holder():
    """Start processes that hold a folder until the test is over."""
    processes = []

    def start(folder, k=1, n=1, *beside):
        command = [sys.executable, "-c", HOLD, str(folder), str(k), str(n), *beside]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        processes.append(process)
        return process, process.stdout.readline().strip()

    yield start
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.parametrize("beside", [(), ("beside",)])
def test_the_second_is_told_who_and_a_killed_one_holds_nothing(tmp_path, holder, beside):
    folder = tmp_path / "new" / "out"
    first, told = holder(folder, 1, 1, *beside)
    assert told == "held"
    _, told = holder(folder, 1, 1, *beside)
    for part in (
        f"{folder} is in use by",
        f"process {first.pid} on {socket.gethostname()}, for",
        " s)",
        "Go away",
    ):
        assert part in told, told
    first.send_signal(signal.SIGKILL)
    first.wait()
    second, told = holder(folder, 1, 1, *beside)  # the file that the first one left says nothing
    assert told == "held"
    _, told = holder(folder, 1, 1, *beside)
    assert f"process {second.pid} on" in told, told
    second.stdin.close()
    second.wait()
    assert not list(tmp_path.rglob(".*"))


def test_who_wrote_nothing_leaves_nothing(tmp_path):
    with pytest.raises(ValueError), locks.held(tmp_path / "new" / "out", advice=""):
        raise ValueError("a wrong setting")
    assert not list(tmp_path.iterdir())


def test_parts_share_a_folder_and_exclude_what_overlaps(tmp_path, holder):
    folder, told = tmp_path / "out", {}
    parts = [(1, 2), (2, 2), (1, 2), (1, 3), (1, 1)]
    processes = {}
    for number, part in enumerate(parts):
        processes[number], told[number] = holder(folder, *part)
    assert told[0] == told[1] == "held"
    for number, owners in ((2, [0]), (3, [0, 1]), (4, [0, 1])):
        assert all(f"process {processes[owner].pid} on" in told[number] for owner in owners), told[
            number
        ]
    for number in (0, 1):
        processes[number].stdin.close()
        processes[number].wait()
    process, answer = holder(folder)
    assert answer == "held" and [path.name for path in folder.iterdir()] == [".lock"]
    _, answer = holder(folder, 1, 2)
    assert f"process {process.pid} on" in answer


def test_there_is_never_more_than_one_whoever_comes_and_goes(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    command = [sys.executable, "-c", RACE, str(folder)]
    racers = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(4)
    ]
    times = [int(racer.communicate(timeout=60)[0]) for racer in racers]
    assert [racer.returncode for racer in racers] == [0] * 4 and sum(times) > 50
    assert not list(folder.iterdir())


def test_one_process_may_enter_again_and_links_are_not_followed(tmp_path):
    with locks.held(tmp_path, advice=""), locks.held(tmp_path, advice=""):
        locks.refuse_if_held(tmp_path, advice="")
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert not (tmp_path / ".lock").exists()
    (tmp_path / "theirs").write_text("precious")
    (tmp_path / ".lock").symlink_to(tmp_path / "theirs")
    with pytest.raises(OSError), locks.held(tmp_path, advice=""):
        pass
    assert (tmp_path / "theirs").read_text() == "precious"


def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch, capsys):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with locks.held(tmp_path, advice=""):
        (tmp_path / "work").touch()
    assert "knows no locks" in capsys.readouterr().err


# ---- commands


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Shards and a configuration."""
    folder = tmp_path_factory.mktemp("world")
    shards = write_shards(folder / "shards", 400, 40)
    return folder, shards


def stopped_while_it_holds(command: list[str], lock: Path) -> subprocess.Popen:
    """A command that stands still while it holds a lock."""
    process = subprocess.Popen(
        [sys.executable, "-m", "vlp.cli", *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 60
    while not (lock.exists() and lock.read_text()):
        assert process.poll() is None and time.monotonic() < until, process.communicate()
        time.sleep(0.001)
    process.send_signal(signal.SIGSTOP)
    return process


def check_refused(command: list[str], pid: int, capsys: pytest.CaptureFixture) -> None:
    capsys.readouterr()
    started = time.monotonic()
    assert main(command) == 1
    assert time.monotonic() - started < 20
    said = capsys.readouterr().err
    for part in ("is in use by", f"process {pid} on", "Wait until it is done"):
        assert part in said, said
    assert "Traceback" not in said


@pytest.mark.parametrize("tool", ["reshard", "negatives", "stats", "pack"])
def test_a_tool_refuses_the_folder_of_another_call(world, tmp_path, tool, capsys):
    folder, shards = world
    out, whole = tmp_path / "out", tmp_path / "whole"
    source = folder / "pictures" if tool == "pack" else shards
    if tool == "pack" and not source.exists():
        import tarfile

        source.mkdir()
        with tarfile.open(next(iter(shards.glob("*.tar")))) as tar:
            tar.extractall(source, filter="data")
    command = ["data", tool, str(source), "--to"]
    first = stopped_while_it_holds(
        [*command, str(out)], tmp_path / ".out.lock" if tool == "pack" else out / ".lock"
    )
    check_refused([*command, str(out)], first.pid, capsys)
    first.send_signal(signal.SIGCONT)
    _, said = first.communicate(timeout=60)
    assert first.returncode == 0, said
    assert main([*command, str(whole)]) == 0
    names = [sorted(path.name for path in place.iterdir()) for place in (out, whole)]
    assert names[0] == names[1] and not list(tmp_path.glob(".*"))
    tars = [[path.read_bytes() for path in sorted(place.glob("*.tar"))] for place in (out, whole)]
    assert tars[0] == tars[1] and (tars[0] or tool == "stats")


def test_every_tool_that_fills_a_folder_holds_it():
    names = [
        m.name for m in pkgutil.iter_modules(data_tools.__path__) if not m.name.startswith("_")
    ]
    tools = {name: importlib.import_module(f"vlp.data_tools.{name}") for name in names}
    holding = {name for name, tool in tools.items() if hasattr(tool.run, "__wrapped__")}
    one_file = {"cells", "sheet", "inspect", "validate"}  # written whole or not at all
    assert holding | one_file | {"pack"} == set(tools) and len(holding) == 14


def test_a_run_refuses_the_folder_of_a_living_run(world, tmp_path, capsys):
    _, shards = world
    run, path = tmp_path / "run", tmp_path / "good.yaml"
    path.write_text(CONFIG.format(out=run, shards=shards))
    command = ["train", str(path), "train.duration=9000", "checkpoint.every=9000", "log.every=1000"]
    instant = [
        subprocess.Popen(
            [sys.executable, "-m", "vlp.cli", *command],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for _ in range(2)
    ]
    until = time.monotonic() + 120
    while all(process.poll() is None for process in instant) and time.monotonic() < until:
        time.sleep(0.01)
    [refused] = [process for process in instant if process.poll() is not None]
    [living] = [process for process in instant if process.poll() is None]
    living.send_signal(signal.SIGSTOP)
    said = refused.communicate()[1]
    assert refused.returncode == 1 and f"process {living.pid} on" in said, said
    for more in ([], ["resume=auto"]):
        check_refused([*command, *more], living.pid, capsys)
    living.send_signal(signal.SIGCONT)
    living.send_signal(signal.SIGTERM)
    living.communicate(timeout=60)
    assert living.returncode == 128 + signal.SIGTERM
    step = int(checkpoint.newest(run).name.removeprefix("step_"))
    assert main([*command, f"train.duration={step + 1}", "resume=auto"]) == 0
    assert not (run / ".lock").exists()
