"""Everything that only a GPU can show, in one command: is it right, and is it fast.

    python tests/benchmarks/gpu.py --json gpu.json                    # about 20 minutes
    python tests/benchmarks/gpu.py --publish gpu.json                 # where the repository is
    python tests/benchmarks/gpu.py --parts tests loss loader --minutes 9.5 --json first.json
    python tests/benchmarks/gpu.py --parts step --minutes 9.5 --json second.json

Parts: `tests` are all tests marked gpu (kernels against dense, no host wait in a step); `loss` the
contrastive loss from 8 k to 1 M rows beside open_clip's and, where it is installed, Inf-CL's;
`loader` decoded samples a second on this machine's cores; `step` the training step of three models
beside open_clip's, eager and compiled.

Each measurement is a process of its own with what remains of `--minutes`; what no longer fits is
listed, not left out in silence. The JSON holds every table, the card, its clocks, the commit, and
where each target stands. `--rehearse` runs the same on a CPU with tiny sizes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from tests.benchmarks import report
from tests.benchmarks.step import compare

PARTS = ("tests", "loss", "loader", "step")
HERE = Path(__file__).resolve().parent
CLOCKS = "clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.draw"

Row = dict[str, Any]


@dataclass(frozen=True)
class Measurement:
    """One command that writes a JSON file: of which part, and what it needs at least."""

    part: str
    command: tuple[str, ...]  # after `python`; a further `--json FILE` is appended
    seconds: float  # with less than this left it is not started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=25, help="no measurement outlasts them")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on any machine")
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    parser.add_argument(
        "--publish",
        metavar="FILE",
        help="measure nothing: write what such a JSON file holds to docs/results.md",
    )
    args = parser.parse_args()
    if args.publish:
        publish(json.loads(Path(args.publish).read_text()))
        return
    refuse_without_a_card(args.rehearse)

    deadline = time.monotonic() + 60 * args.minutes
    results: dict[str, Any] = {
        "command": report.command(),
        "hardware": report.hardware(),
        "commit": report.commit(),
        "clocks before": clocks(),
        "tables": {part: [] for part in args.parts},
        "not run": [],
    }
    for measurement in measurements(args.rehearse):
        if measurement.part in args.parts:
            carry_out(measurement, results, deadline)
            # After each: what is measured stays, whatever ends this process.
            write(args.json, results)

    # Each measurement of a step knew one method alone.
    compare(results["tables"].get("step", []))
    results["clocks after"] = clocks()
    results["targets"] = targets(results["tables"])
    write(args.json, results)
    show(results)


def refuse_without_a_card(rehearse: bool) -> None:
    import torch

    if not rehearse and not torch.cuda.is_available():
        sys.exit(
            "this benchmark measures a GPU and found none (torch.cuda.is_available() is False); "
            "--rehearse runs it on a CPU with tiny sizes"
        )


def measurements(rehearse: bool) -> list[Measurement]:
    """All measurements, the most telling first."""
    if rehearse:
        return [
            Measurement("tests", ("tests",), 1),
            loss(["64"], "32", "tiled", "open_clip"),
            loader(1, 2),
            *steps("RN50", 4, 1, ("vlp", "open_clip")),
        ]

    cores = len(os.sched_getaffinity(0))
    return [
        loss(["8192", "32768"], "512", "triton", "open_clip"),
        *steps("ViT-B-32", 1024, 20),
        Measurement("tests", ("tests",), 60),
        *steps("ViT-B-16", 512, 15),
        loss(["131072", "1048576"], "512", "triton"),
        *steps("ViT-L-14", 256, 10),
        loss(["32768"], "768", "triton", "open_clip"),
        loss(["32768"], "1024", "triton", "open_clip"),
        loss(["32768"], "512", "triton siglip", "open_clip siglip", "tiled", "infcl"),
        loader(cores, 40),
    ]


STEP_METHODS = ("open_clip compile", "vlp compile", "open_clip", "vlp")


def loss(batches: list[str], dim: str, *methods: str) -> Measurement:
    options = ("--batch", *batches, "--dim", dim, "--methods", *methods)
    return Measurement("loss", (str(HERE / "loss.py"), *options), 20)


def steps(
    architecture: str, batch: int, n_steps: int, methods: Iterable[str] = STEP_METHODS
) -> list[Measurement]:
    """A measurement for each method, so that one that takes too long does not cost the others."""
    options = ["--architecture", architecture, "--batch", str(batch), "--micro", "1"]
    options += ["--steps", str(n_steps), "--warmup", str(min(n_steps, 5)), "--methods"]
    return [
        Measurement("step", (str(HERE / "step.py"), *options, method), 40) for method in methods
    ]


def loader(workers: int, batches: int) -> Measurement:
    options = ("--workers", str(workers), "--batches", str(batches), "--repeats", "1", "--alone")
    return Measurement("loader", ("-m", "tests.benchmarks.loader", *options), 30)


def carry_out(measurement: Measurement, results: dict[str, Any], deadline: float) -> None:
    """Run one measurement and put its rows into `results`, or the reason why there are none."""
    name = " ".join(measurement.command).replace(f"{HERE}{os.sep}", "")
    left = deadline - time.monotonic()
    if left < measurement.seconds:
        results["not run"].append(f"{name}: {left:.0f} s were left")
        return

    print(f"{name} ({left:.0f} s left)", file=sys.stderr, flush=True)
    function = run_tests if measurement.part == "tests" else run_benchmark
    try:
        rows = function(measurement, left)
    except subprocess.TimeoutExpired:
        results["not run"].append(f"{name}: not done within the {left:.0f} s that were left")
    except RuntimeError as error:
        results["not run"].append(f"{name}: {error}")
    else:
        results["tables"][measurement.part] += rows


def run_benchmark(measurement: Measurement, seconds: float) -> list[Row]:
    """The rows of another benchmark's table."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        run([*measurement.command, "--json", str(path)], seconds)
        return json.loads(path.read_text())["rows"]


def run_tests(measurement: Measurement, seconds: float) -> list[Row]:
    """The tests marked gpu: how many passed, and the names of those that did not."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "junit.xml"
        options = ["-m", "gpu", "-q", "-p", "no:cacheprovider", f"--junitxml={path}"]
        run(["-m", "pytest", *options, *files_with_gpu_tests()], seconds, accepted=(0, 1, 5))
        cases = ElementTree.parse(path).getroot().iter("testcase")
        return [outcome(case) for case in cases]


def files_with_gpu_tests() -> list[str]:
    """By their text: collecting all files takes longer than these tests, and more packages."""
    files = sorted((report.ROOT / "tests").rglob("test_*.py"))
    return [str(file) for file in files if "pytest.mark.gpu" in file.read_text(encoding="utf-8")]


def outcome(case: ElementTree.Element) -> Row:
    """One test's name, result and reason."""
    row: Row = {"test": f"{case.get('classname')}::{case.get('name')}", "result": "passed"}
    row["note"] = None
    for kind in ("failure", "error", "skipped"):
        reason = case.find(kind)
        if reason is not None:
            # A line: it stands in a table.
            lines = (reason.get("message") or kind).splitlines()
            row |= {"result": kind, "note": lines[0][:200]}
    return row


def run(arguments: list[str], seconds: float, accepted: Iterable[int] = (0,)) -> None:
    """Call Python with these arguments in the repository; RuntimeError with its last line."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=report.ROOT,
        timeout=seconds,
        capture_output=True,
        text=True,
    )
    sys.stderr.write(done.stderr)
    if done.returncode not in accepted:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise RuntimeError(f"exit {done.returncode}: {''.join(last)[:200]}")


def targets(tables: dict[str, list[Row]]) -> list[Row]:
    """Where each target stands: `measured` is None where the measurement is missing."""
    losses = tables.get("loss", [])
    largest = {"method": "triton", "B": 32768, "D": 512}
    million = largest | {"B": 2**20}

    return [
        at_most("gpu tests that failed", failures(tables.get("tests", [])), 0),
        at_most("loss, B 32,768, D 512: ms", cell(losses, largest, "ms"), 7.2),
        at_most("loss, B 32,768, D 512: extra MiB", cell(losses, largest, "extra MiB"), 300),
        at_least(
            "loss, B 1,048,576: share of the matmul rate", cell(losses, million, "share"), 0.6
        ),
        at_most("host waits a step", most_waits(tables.get("step", [])), 0),
        at_least("step, ViT-B-32 / open_clip's best", fastest(tables, "ViT-B-32"), 1.3),
        at_least("step, ViT-B-16 / open_clip's best", fastest(tables, "ViT-B-16"), 1.15),
    ]


def failures(tests: list[Row]) -> int | None:
    """How many tests failed; None where all were skipped, which shows nothing."""
    results = [row["result"] for row in tests]
    ran = len(results) - results.count("skipped")
    return ran - results.count("passed") if ran else None


def most_waits(steps: list[Row]) -> int | None:
    """The host's waits in a step of ours, of the model that has most."""
    waits = [row["host waits"] for row in steps if row["method"].startswith("vlp")]
    return max((n for n in waits if n is not None), default=None)


def fastest(tables: dict[str, list[Row]], model: str) -> float | None:
    """Our fastest step beside open_clip's fastest."""
    ratios = [
        row["speed / its best"]
        for row in tables.get("step", [])
        if row["model"] == model and row["method"].startswith("vlp")
    ]
    return max((ratio for ratio in ratios if ratio is not None), default=None)


def cell(rows: list[Row], place: Row, name: str) -> Any:
    """The value `name` of the row that has all of `place`."""
    for row in rows:
        if place.items() <= row.items():
            return row[name]
    return None


def at_most(name: str, measured: float | None, limit: float) -> Row:
    holds = None if measured is None else measured <= limit
    return {"target": name, "wanted": f"<= {limit}", "measured": measured, "holds": holds}


def at_least(name: str, measured: float | None, limit: float) -> Row:
    holds = None if measured is None else measured >= limit
    return {"target": name, "wanted": f">= {limit}", "measured": measured, "holds": holds}


def clocks() -> dict[str, str] | None:
    """What nvidia-smi says of the first card, None where there is no nvidia-smi."""
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={CLOCKS}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    values = [value.strip() for value in done.stdout.split(",")]
    return dict(zip(CLOCKS.split(","), values)) if done.returncode == 0 else None


def publish(results: dict[str, Any]) -> None:
    """Write docs/results/gpu.json and the section of docs/results.md: a card has no other way."""
    origin = (
        f"`{results['command']}` on {results['hardware']}, commit {results['commit']}; clocks "
        f"{results['clocks after']}."
    )
    parts = [table_of(part, rows) for part, rows in results["tables"].items() if rows]
    parts += [f"Targets:\n\n{report.table(results['targets'])}"]
    parts += [f"Not run: {line}." for line in results["not run"]]
    body = "\n\n".join(["### On a GPU", origin, *parts])

    path = report.RESULTS.parent / "results" / "gpu.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    report.RESULTS.write_text(report.replace_section(report.RESULTS.read_text(), "gpu", body))


def table_of(part: str, rows: list[Row]) -> str:
    """The rows of a part; of the tests, those that did not pass."""
    shown = [row for row in rows if part != "tests" or row["result"] != "passed"]
    headline = f"{part}: {len(rows)} rows"
    if part == "tests":
        headline = f"tests: {len(rows) - len(shown)} of {len(rows)} passed"
    return "\n\n".join([headline, report.table(shown)] if shown else [headline])


def write(file: str | None, results: dict[str, Any]) -> None:
    if file:
        Path(file).write_text(json.dumps(results, indent=1) + "\n")


def show(results: dict[str, Any]) -> None:
    """Every table, what was not run, and the targets last."""
    print(f"{results['hardware']}, commit {results['commit']}, {results['clocks after']}")
    for part, rows in results["tables"].items():
        print(f"\n{table_of(part, rows)}\n")

    for line in results["not run"]:
        print(f"not run: {line}")
    print(f"\n{report.table(results['targets'])}")


if __name__ == "__main__":
    main()
