"""What it costs to find copies among many samples, and how many are found.

    python tests/benchmarks/dedup.py [--sizes 100000 …] [--embedded 100000 …] [--publish]

Fingerprints are fabricated: random hashes and colors, 10 % near copies of another one (1 to 4 bits
and some levels off), 5 % equal ones, 1 % blank pictures of one hash in many shades. Embeddings are
random unit rows, 10 % of them copies with cosines from 0.95 to 1; at one size also rows of 384
numbers in clusters, rows in one dense region (mean cosine 0.7), and rows of which 10 % are equal.
Measured is the search in buckets and the decision, by one process on one thread, in a process of
its own; memory is its peak above that of its imports. For comparison with all pairs: fingerprints
are decided by both, and of embeddings some copies are compared with all others.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

# Run as a file, the folder of this file stands first on the path.
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

SIZES = [100_000, 1_000_000, 3_000_000, 10_000_000]
EMBEDDED = [10_000, 100_000, 300_000, 1_000_000]
OTHER_ROWS = 100_000  # of each of the other kinds
COMPARED = (100_000, 1_000_000)  # fingerprints of which all pairs are compared as well
N_ROWS = 5_000
EXTRAPOLATED = [400_000_000, 5_000_000_000]
A_SHARD = 100_000
WIDTH = 64
WIDTHS = {"clustered": 384}
COSINE = 0.95
MEMORY = 1 << 30


def main() -> None:
    from tests.benchmarks import report

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--embedded", type=int, nargs="+", default=EMBEDDED)
    parser.add_argument("--other-rows", type=int, default=OTHER_ROWS)
    parser.add_argument(
        "--lines",
        type=Path,
        metavar="FILE",
        help="keep each line there once it is measured; those that are there stand",
    )
    parser.add_argument("--one", nargs=2, metavar=("KIND", "N"), help=argparse.SUPPRESS)
    report.add_arguments(parser)
    args = parser.parse_args()
    if args.one:
        kind, n = args.one
        print(json.dumps(measured(kind, int(n))))
        return

    by_hash = [line("fingerprints", n, args.lines) for n in args.sizes]
    by_cosine = [line("embeddings", n, args.lines) for n in args.embedded]
    of_others = [line(f"embeddings, {kind}", args.other_rows, args.lines) for kind in OTHERS]
    rows = [*by_hash, *(extrapolated("fingerprints", by_hash, n) for n in EXTRAPOLATED)]
    rows += [*by_cosine, *(extrapolated("embeddings", by_cosine, n) for n in EXTRAPOLATED)]
    rows += of_others
    for row in rows:
        # With all its digits: a table's three would make 100 of 99.99.
        row["found, %"] = row["found, %"] and f"{row['found, %']:.3f}"
    slopes = "; ".join(
        f"{name}: {growth(lines):.2f}"
        for name, lines in (("fingerprints", by_hash), ("embeddings", by_cosine))
    )
    notes = (
        f"One process, one thread, `--memory {MEMORY / 1e9:.1f}`, embeddings of {WIDTH} numbers; "
        "memory counts mapped files, which the system may take back. "
        f"Log-log slopes of CPU seconds over the measured lines: {slopes}. Found: of "
        "fingerprints, what comparing all with all drops and this drops, too; of embeddings, the "
        f"pairs of {N_ROWS:,} copies with all others. Every pair is compared before it counts, so "
        "none is wrong. The extrapolated lines are core hours: of fingerprints, seconds a row of "
        "the largest measured line, times the sorts that the cheapest number of blocks takes; "
        "of embeddings, n · log n. They count no waiting for disks; shuffled bytes are "
        "what the stages write for one another."
    )
    report.publish("dedup", "Deduplication in buckets", rows, args, notes)


def line(kind: str, n: int, kept: Path | None) -> dict[str, Any]:
    """The table's line of so many samples, measured in a process of its own."""
    lines = kept.read_text().splitlines() if kept and kept.exists() else []
    for one in map(json.loads, lines):
        if (one["what"], one["samples"]) == (kind, n):
            return one

    command = [sys.executable, __file__, "--one", kind, str(n)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    text = done.stdout.splitlines()[-1]
    if kept:
        with kept.open("a") as file:
            file.write(text + "\n")
    return json.loads(text)


def measured(kind: str, n: int) -> dict[str, Any]:
    """The line of `kind`, in this process."""
    # Now, so that the time and the memory of imports are not counted.
    from vlp.data_tools.dedup import copies  # noqa: F401
    from vlp.eval.search.nearest import import_faiss
    from vlp.joining import local_device

    import_faiss()
    local_device("auto", shared=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if kind == "fingerprints":
            return _of_fingerprints(folder, n)
        return _of_embeddings(folder, n, kind)


def _of_fingerprints(folder: Path, n: int) -> dict[str, Any]:
    from vlp.data_tools.dedup import decision
    from vlp.data_tools.dedup.near import Limits
    from vlp.data_tools.dedup.near import decide as decide_exactly

    limits = Limits(4, COSINE, keep_copies=False)
    sizes, paths = fabricate_prints(folder, n)
    before, started, used = forget_peak(), time.perf_counter(), time.process_time()
    copies, _ = _searched(folder, sizes, paths, limits, None)
    dropped = decision.decide(copies, 0, keep_copies=False)
    result = _line("fingerprints", n, started, used, before, folder, len(dropped))

    if n in COMPARED:
        prints = np.concatenate([np.load(path) for path in paths])
        copy_of, _ = decide_exactly(prints, [], 0, limits)
        expected = np.flatnonzero(copy_of >= 0)
        is_same = np.isin(expected, dropped["sample"])
        same = dropped[np.isin(dropped["sample"], expected)]
        partners = copy_of[same["sample"]] == same["copy_of"]
        result["found, %"] = 100 * float(is_same.mean())
        print(f"same partners: {partners.mean():.6f}, exact {len(expected)}", file=sys.stderr)
    return result


def _of_embeddings(folder: Path, n: int, what: str) -> dict[str, Any]:
    from vlp.data_tools.dedup import decision
    from vlp.data_tools.dedup.embedded import Rows
    from vlp.data_tools.dedup.near import Limits

    limits = Limits(-1, COSINE, keep_copies=False)
    kind = what.removeprefix("embeddings, ")
    sizes, files, copied = fabricate_rows(folder, n, kind)
    rows = Rows(files, sizes, WIDTHS.get(kind, WIDTH))
    before, started, used = forget_peak(), time.perf_counter(), time.process_time()
    copies, _ = _searched(folder, sizes, [], limits, rows)
    dropped = decision.decide(copies, 0, keep_copies=False)
    result = _line(what, n, started, used, before, folder, len(dropped))
    result["found, %"] = 100 * _recall(rows, n, copied, copies)
    return result


def _searched(
    folder: Path, sizes: list[int], paths: list[Path], limits: Any, rows: Any
) -> tuple[Any, Any]:
    from vlp.data_tools._run.work import Pool
    from vlp.data_tools.dedup import PROBES
    from vlp.data_tools.dedup.cells import ROWS_A_CELL
    from vlp.data_tools.dedup.plan import Division, planned
    from vlp.data_tools.dedup.stages import Search

    n = sum(sizes)
    division = Division(MEMORY, 0 if rows is None else ROWS_A_CELL, PROBES)
    plan = planned(folder / "search", n, 0, limits, division)
    search = Search(folder / "search", paths, sizes, plan, Pool())
    return search.copies(rows), plan


def _line(
    kind: str, n: int, started: float, used: float, before: int, folder: Path, n_dropped: int
) -> dict[str, Any]:
    search = folder / "search"
    shuffled = sum(path.stat().st_size for path in search.iterdir())
    return {
        "what": kind,
        "samples": n,
        "seconds": time.perf_counter() - started,
        "CPU, s": time.process_time() - used,
        "memory, MB": (peak_bytes() - before) / 1e6,
        "shuffled, GB": shuffled / 1e9,
        "dropped": n_dropped,
        "found, %": None,
        "core hours": None,
    }


def _recall(rows: Any, n: int, copied: np.ndarray, copies: Any) -> float:
    """Which part of the pairs of some copies with all others was found."""
    rng = np.random.default_rng(1)
    queries = np.sort(rng.choice(copied, min(N_ROWS, len(copied)), replace=False))
    x = rows.gathered(queries).astype(np.float32)
    pairs = []
    for start in range(0, n, A_SHARD):
        numbers = np.arange(start, min(start + A_SHARD, n))
        y = rows.gathered(numbers).astype(np.float32)
        for low in range(0, len(x), 2000):
            row, column = np.nonzero(x[low : low + 2000] @ y.T >= COSINE)
            pairs.append(np.stack([queries[low + row], numbers[column]], 1))
    # Equal rows are one in the pairs that are found.
    first = np.arange(n)
    first[copies.equal[:, 1]] = copies.equal[:, 0]
    all_pairs = np.sort(first[np.concatenate(pairs)], 1)
    expected = np.unique(_key(all_pairs[all_pairs[:, 0] != all_pairs[:, 1]].T, n))
    similar = np.stack([copies.similar["earlier"], copies.similar["later"]], 1)
    found = np.isin(expected, _key(np.sort(first[similar], 1).T, n))
    print(f"{len(expected)} pairs of {N_ROWS} rows", file=sys.stderr)
    return float(found.mean())


def _key(pairs: Any, n: int) -> np.ndarray:
    earlier, later = pairs
    return earlier * n + later


def fabricate_prints(folder: Path, n: int) -> tuple[list[int], list[Path]]:
    """Fingerprints of n samples in shards: (their sizes, their files)."""
    from vlp.data_tools.dedup.near import FINGERPRINT
    from vlp.data_tools.dedup.survey import prints_file

    rng = np.random.default_rng(0)
    sizes, paths = _sizes(n), []
    earlier = None
    for number, size in enumerate(sizes):
        prints = np.zeros(size, FINGERPRINT)
        prints["seen"] = True
        prints["hash"] = rng.integers(0, 2**64, size, np.uint64)
        prints["grid"] = rng.integers(0, 256, (size, 48), np.uint8)

        # Copies of samples of this shard or of the one before, in places of their own.
        pool = prints if earlier is None else earlier
        places = rng.permutation(size)
        near, equal, blank = np.split(places[: 16 * size // 100], [size // 10, 15 * size // 100])
        prints[equal] = pool[rng.integers(0, len(pool), len(equal))]
        prints[near] = pool[rng.integers(0, len(pool), len(near))]
        for _ in range(4):
            prints["hash"][near] ^= np.uint64(1) << rng.integers(0, 64, len(near), np.uint64)
        prints["grid"][near] ^= rng.integers(0, 4, (len(near), 48), np.uint8)
        prints["hash"][blank] = 1 << 63
        prints["grid"][blank] = np.tile(rng.integers(0, 256, (len(blank), 3), np.uint8), 16)

        paths.append(prints_file(folder, number))
        np.save(paths[-1], prints)
        earlier = prints
    return sizes, paths


def fabricate_rows(
    folder: Path, n: int, kind: str = "embeddings"
) -> tuple[list[int], list[Path], np.ndarray]:
    """Embeddings of n samples in shards: (their sizes, their files, the numbers of the copies)."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    sizes, files = _sizes(n), []
    copies = []
    earlier = None
    draw = OTHERS.get(kind, _random)
    for number, size in enumerate(sizes):
        rows, n_copied = draw(rng, size), size // 10
        copied = rng.choice(size // 10 * 9, n_copied, replace=False)
        copies.append(number * A_SHARD + copied)
        pool = rows if earlier is None else earlier
        originals = pool[rng.integers(0, len(pool) // 10 * 9, n_copied)]
        cosines = rng.uniform(COSINE, 1, (n_copied, 1))
        away = rng.normal(size=originals.shape)
        away = _unit(away - (away * originals).sum(1, keepdims=True) * originals)
        rows[copied] = cosines * originals + np.sqrt(1 - cosines**2) * away

        files.append(folder / f"{number:05d}.safetensors")
        save_file({"image": rows.astype(np.float16)}, files[-1])
        earlier = rows
    return sizes, files, np.concatenate(copies)


def _random(rng: np.random.Generator, n: int) -> np.ndarray:
    return _unit(rng.normal(size=(n, WIDTH)))


def _clustered(rng: np.random.Generator, n: int) -> np.ndarray:
    """50 rows a cluster, which lie in 20 of the dimensions; noise, and a mean, in all."""
    of_all = np.random.default_rng(1)
    width, n_dimensions = WIDTHS["clustered"], 20
    turned = of_all.normal(size=(n_dimensions, width)) / n_dimensions**0.5
    centres = rng.normal(size=(n // 50 + 1, n_dimensions))
    places = centres[rng.integers(0, len(centres), n)] + 0.7 * rng.normal(size=(n, n_dimensions))
    return _unit(places @ turned + 0.3 * rng.normal(size=(n, width)) + 0.5)


def _dense(rng: np.random.Generator, n: int) -> np.ndarray:
    """All around one direction: two rows have a cosine of 0.7 on average."""
    mean = _unit(np.random.default_rng(1).normal(size=(1, WIDTH)))
    return _unit(0.7**0.5 * mean + 0.3**0.5 * _random(rng, n))


def _with_equal(rng: np.random.Generator, n: int) -> np.ndarray:
    """The last tenth is one row."""
    rows = _random(rng, n)
    rows[n // 10 * 9 :] = _unit(np.ones((1, WIDTH)))
    return rows


OTHERS = {"clustered": _clustered, "dense": _dense, "a tenth equal": _with_equal}


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _sizes(n: int) -> list[int]:
    return [min(A_SHARD, n - start) for start in range(0, n, A_SHARD)]


def extrapolated(kind: str, rows: list[dict[str, Any]], n: int) -> dict[str, Any]:
    """The line of n samples, from the largest measured one."""
    from vlp.data_tools.dedup.bands import Bands

    largest = rows[-1]
    times = n / largest["samples"]
    growth = times * math.log(n) / math.log(largest["samples"])
    shuffled = largest["shuffled, GB"] * times
    if kind == "fingerprints":
        costs = [Bands.cheapest(4, size).cost_ns(size) for size in (n, largest["samples"])]
        growth = max(times, costs[0] / costs[1])
    result: dict[str, Any] = dict.fromkeys(largest)
    return result | {
        "what": f"{kind}, extrapolated",
        "samples": n,
        "shuffled, GB": shuffled,
        "core hours": largest["CPU, s"] * growth / 3600,
    }


def growth(rows: list[dict[str, Any]]) -> float:
    """The exponent with which CPU seconds grow."""
    from tests.benchmarks import report

    return report.slope([row["samples"] for row in rows], [row["CPU, s"] for row in rows])


def forget_peak() -> int:
    """Let the peak of this process begin anew; returns the memory that it has now."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def peak_bytes() -> int:
    """The most memory that this process has had since."""
    lines = Path("/proc/self/status").read_text().splitlines()
    [peak] = [line.split()[1] for line in lines if line.startswith("VmHWM")]
    return int(peak) << 10


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
