"""Whether the objectives do what they promise: arms that differ in one thing, trained on generated
scenes, over several seeds.

    python tests/benchmarks/evidence.py --seeds 0 1 2 --jobs 2 --publish
    # the arms of one table alone; the tables of what has finished
    python tests/benchmarks/evidence.py --tables evidence_negatives --publish
    python tests/benchmarks/evidence.py --table
    # which of the papers' claims show in what has finished (tests/benchmarks/evidence_claims.py)
    python tests/benchmarks/evidence.py --claims --publish

Every arm is evidence.yaml (model, optimiser, duration, data: chosen with plain `infonce` on a
validation split, then frozen) with another objective or topology, on one thread a process, so that
arms of a seed share initial weights and batches; those of small batches have a lighter tower, less
data and rates of their own. A run is a folder of --out, OUT/ARM/SEED; finished ones are kept,
interrupted ones start again. The cost of a run counts all its CPU time and the rows that its towers
embedded, in training, for one sample seen.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from tests.benchmarks import evidence_claims, evidence_cost, evidence_data, report
from tests.benchmarks.evidence_arms import MINER, Table
from tests.benchmarks.evidence_data import FIRST_SHARDS
from tests.benchmarks.evidence_families import ARMS
from tests.benchmarks.evidence_outcomes import distance, distance_heading, unit
from tests.benchmarks.evidence_second import TABLES

BASE = Path(__file__).with_suffix(".yaml").resolve()
COSTS = {"image_rows": "image rows", "text_rows": "text rows", "cpu_s": "CPU s", "wall_s": "wall s"}
RUN_S = 3600  # a run of several processes that takes longer hangs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    tables = {
        "choices": TABLES,
        "default": list(TABLES),
        "metavar": "TABLE",
        "help": f"of {', '.join(TABLES)}",
    }
    parser.add_argument("--tables", nargs="+", **tables)
    parser.add_argument(
        "--arms",
        nargs="+",
        choices=ARMS,
        metavar="ARM",
        help=f"of {', '.join(ARMS)} (default: the tables')",
    )
    parser.add_argument(
        "--jobs", type=int, default=2, help="runs side by side (default: %(default)s)"
    )
    parser.add_argument(
        "--out", default="runs/evidence", help="folder of data and runs (default: %(default)s)"
    )
    parser.add_argument(
        "--table", action="store_true", help="train nothing, print the tables of what has finished"
    )
    parser.add_argument(
        "--claims", action="store_true", help="train nothing, print which claims show"
    )
    # This script, in its own process.
    parser.add_argument("--run", nargs=2, metavar=("ARM", "SEED"), help=argparse.SUPPRESS)
    parser.add_argument(
        "--publish",
        action="store_true",
        help="write docs/results/ and the sections of docs/results.md",
    )
    parser.set_defaults(json=None)
    args = parser.parse_args()
    out = Path(args.out).resolve()
    if args.run:
        train(args.run[0], int(args.run[1]))
        return
    if args.claims:
        evidence_claims.show(TABLES, lambda arm, seed: finished(out, arm, seed), args)
        return
    if not args.table:
        of_tables = [arm for name in args.tables for arm in TABLES[name].arms]
        train_all(out, args.arms or list(dict.fromkeys(of_tables)), args.seeds, args.jobs)
    for name in args.tables:
        show(out, name, TABLES[name], args)


def train_all(out: Path, arms: list[str], seeds: list[int], jobs: int) -> None:
    """Make the data, and every run of these arms that has not finished."""
    # A run of another recipe is refused here, before anything is made.
    runs = all_runs(arms, seeds)
    records = {run: finished(out, *run) for run in runs}
    costs = {run: record["cost"]["cpu_s"] for run, record in records.items() if record}
    print(evidence_cost.outlook(runs, costs, evidence_cost.published(TABLES)), flush=True)

    evidence_data.make(out / "data")
    train_missing(out, [run for arm in arms if (run := ARMS[arm].needs)], jobs)
    if "mined" in arms:
        arm, seed = MINER
        evidence_data.mine(out / "data", out / arm / str(seed), FIRST_SHARDS)

    # What others go on from comes first.
    begun_with = {ARMS[arm].after or arm: None for arm in arms}
    then = [arm for arm in arms if arm not in begun_with]
    for of_wave in (begun_with, then):
        train_missing(out, [(arm, seed) for seed in seeds for arm in of_wave], jobs)


def all_runs(arms: list[str], seeds: list[int]) -> list[tuple[str, int]]:
    """The runs of these arms, and those that they or their data begin with."""
    runs = [run for arm in arms if (run := ARMS[arm].needs)]
    for seed in seeds:
        for arm in arms:
            runs += [(ARMS[arm].after or arm, seed), (arm, seed)]
    if "mined" in arms:
        runs.append(MINER)
    return list(dict.fromkeys(runs))


def train_missing(out: Path, runs: list[tuple[str, int]], jobs: int) -> None:
    """Train those that have not finished, `jobs` at a time."""
    missing = [run for run in dict.fromkeys(runs) if finished(out, *run) is None]
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda run: start(out, *run), missing))


def recipe(arm: str, seed: int) -> dict[str, Any]:
    """What a run depends on besides the code: a finished run of another recipe is not taken for
    this one.
    """
    chosen = ARMS[arm]
    overrides = [
        f"objective={chosen.objective}",
        *chosen.settings,
        f"seed={seed}",
        f"out={arm}/{seed}",
    ]
    if chosen.after:
        overrides.append(f"init_from={chosen.after}/{seed}")
    base = hashlib.sha256(BASE.read_bytes()).hexdigest()[:16]
    return {
        "base": base,
        "overrides": overrides,
        "ranks": chosen.ranks,
        "data": evidence_data.VERSION,
    }


def finished(out: Path, arm: str, seed: int) -> dict[str, Any] | None:
    """The record of a finished run: its cost and, by label of the task, its scores and their
    chance.
    """
    run = out / arm / str(seed)
    if not (run / "cost.json").exists():
        return None
    cost = json.loads((run / "cost.json").read_text())
    if cost["recipe"] != recipe(arm, seed):
        raise ValueError(
            f"{run} was trained with another recipe ({cost['recipe']}); remove it or choose "
            f"another --out"
        )
    return {
        "cost": cost,
        "results": {r["label"]: r for r in json.loads((run / "results.json").read_text())},
        "folder": run,
    }


def start(out: Path, arm: str, seed: int) -> None:
    """Train one arm in a process of its own, in place of what an interrupted one left."""
    run = out / arm / str(seed)
    shutil.rmtree(run, ignore_errors=True)
    run.parent.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    with (run.parent / f"{seed}.log").open("w") as log:
        command = [sys.executable, str(Path(__file__).resolve()), "--run", arm, str(seed)]
        done = subprocess.run(
            command,
            cwd=out,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    if done.returncode:
        raise RuntimeError(f"{arm} {seed} failed:\n{Path(log.name).read_text()[-3000:]}")
    print(f"{arm} {seed}: {time.perf_counter() - began:.0f} s", flush=True)


def train(arm: str, seed: int) -> None:
    """One run in the current folder, with cost.json as its last file."""
    from tests import ranks

    chosen, began = recipe(arm, seed), time.perf_counter()
    parts = (
        [train_rank(chosen["overrides"])]
        if chosen["ranks"] == 1
        else (ranks.run(chosen["ranks"], train_rank, chosen["overrides"], timeout_s=RUN_S))
    )
    samples = parts[0]["samples"]
    cost = {
        "recipe": chosen,
        "commit": report.commit(),
        "samples": samples,
        "wall_s": time.perf_counter() - began,
    }
    cost |= {
        name: sum(part[name] for part in parts) / samples for name in ("image_rows", "text_rows")
    }
    cost["cpu_s"] = sum(part["cpu_s"] for part in parts)
    path = Path(arm, str(seed), "cost.json")
    path.with_suffix(".part").write_text(json.dumps(cost, indent=1) + "\n")
    path.with_suffix(".part").rename(path)


def train_rank(overrides: list[str]) -> dict[str, Any]:
    """This rank's share of a run; its CPU time, the rows that it embedded, and the samples of the
    whole run.
    """
    from torch.nn.modules.module import register_module_forward_pre_hook

    from vlp import config
    from vlp.config import Plan
    from vlp.eval.evaluation import in_training
    from vlp.models.dual_encoder import DualEncoder
    from vlp.train import train

    rows = {"image_rows": 0, "text_rows": 0}

    def count(module: Any, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, DualEncoder):
            for name, value in zip(
                rows, inputs
            ):  # nothing in evaluation, which names the tower that it calls
                rows[name] += 0 if value is None else len(value)

    settings = config.load(BASE, overrides)
    hook = register_module_forward_pre_hook(count)
    train(settings, in_training)
    hook.remove()
    samples = Plan.of(settings.train, steps_per_epoch=1).total * settings.train.batch
    return {**rows, "samples": samples, "cpu_s": time.process_time()}


def show(out: Path, name: str, table: Table, args: argparse.Namespace) -> None:
    """Print one table, and publish it where that is asked for."""
    runs = {
        arm: [r for seed in args.seeds if (r := finished(out, arm, seed))] for arm in table.arms
    }
    runs = {arm: found for arm, found in runs.items() if found}
    if not runs:
        print(f"\n{table.title}: no run has finished")
        return
    for arm, of_arm in runs.items():
        if not table.evaluated_arms or arm in table.evaluated_arms:
            for run in of_arm:
                run["results"] |= afterwards(run["folder"], table.evaluated)

    # Chances are those of any arm that was evaluated so.
    results: dict[str, Any] = {}
    for of_arm in runs.values():
        results |= of_arm[0]["results"]
    baseline = runs.get(next(iter(table.arms)), [])
    rows = [guessing(results, table)]
    rows += [row(table.arms[arm], of_arm, baseline, table) for arm, of_arm in runs.items()]
    commits = ", ".join(sorted({run["cost"]["commit"] for found in runs.values() for run in found}))
    samples = sorted({run["cost"]["samples"] for found in runs.values() for run in found})
    notes = (
        f"{table.notes} Mean ± standard deviation over seeds, "
        f"{' or '.join(f'{n:,}' for n in samples)} samples seen; rows embedded for one sample "
        f"seen; seconds of a whole run with evaluation, on a shared machine. Trained at {commits}."
    )
    report.publish(name, table.title, rows, args, notes)


def guessing(results: dict[str, Any], table: Table) -> dict[str, Any]:
    """The row of scores under random guessing, where there is such a thing."""
    scores = {}
    for heading, (label, score) in table.columns.items():
        chance = results[label]["chance"].get(score) if label in results else None
        scores[heading] = None if chance is None else chance * unit(heading)

    no_distance = dict.fromkeys(map(distance_heading, table.paired))
    return {
        "arm": "chance",
        "seeds": None,
        **scores,
        **no_distance,
        **dict.fromkeys(COSTS.values()),
    }


def row(
    name: str, runs: list[dict[str, Any]], baseline: list[dict[str, Any]], table: Table
) -> dict[str, Any]:
    """An arm's scores over its seeds, how far they lie from the baseline's, and what it cost."""
    scores = {}
    for heading, (label, score) in table.columns.items():
        records = [run["results"][label] for run in runs if label in run["results"]]
        values = [unit(heading) * record["metrics"][score] for record in records]
        scores[heading] = spread(values) if values else None
    distances = {
        distance_heading(heading): distance(
            runs, baseline, "/".join(table.columns[heading]), unit(heading)
        )
        for heading in table.paired
    }
    costs = {
        heading: statistics.mean(run["cost"][name] for run in runs)
        for name, heading in COSTS.items()
    }
    return {"arm": name, "seeds": len(runs), **scores, **distances, **costs}


def afterwards(run: Path, tasks: dict[str, tuple[str, ...]]) -> dict[str, Any]:
    """Results of tasks that training does not evaluate, by the label that a table gives them."""
    results = {}
    for label, arguments in tasks.items():
        (results[label],) = json.loads(evaluated(run, label, arguments).read_text())["results"]
    return results


def evaluated(run: Path, name: str, arguments: tuple[str, ...]) -> Path:
    """The file of what `vlp eval RUN` gives with these arguments, which is kept beside the run."""
    out = run / f"{name}.json"
    if not out.exists():
        command = [sys.executable, "-m", "vlp.cli", "eval", str(run), *arguments]
        subprocess.run([*command, "--out", str(out)], check=True, cwd=run.parent.parent)
    return out


def spread(values: list[float]) -> str:
    digits = 1 if max(map(abs, values)) >= 10 else 3
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


if __name__ == "__main__":
    main()
