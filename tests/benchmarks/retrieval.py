"""Exact retrieval of 25,000 captions among 5,000 images once embedded, ours beside
clip_benchmark's, in one run.

    python tests/benchmarks/retrieval.py                         ours alone
    python tests/benchmarks/retrieval.py --peer .../bin/python   and clip_benchmark's own functions,
                                                                 from an environment that has them
    python tests/benchmarks/retrieval.py --images 5000 10000 20000 40000 --repeats 1 \\
        --extrapolate 200000                                     ours by size, and what a larger set
                                                                 would take

Each side runs in a process of its own, so that its peak memory is its own; the table gives the time
of all recalls (1, 5, 10, both ways; ours with all ranks) and the resident memory gained over the
embeddings.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from tests.benchmarks import report

OURS = """
import sys, time, json, threading, torch
from safetensors.torch import load_file
from vlp.eval import metrics
"""
PEER = """
import sys, time, json, threading, torch
from safetensors.torch import load_file
from clip_benchmark.metrics import zeroshot_retrieval as peer
"""
RUN = """
def resident():
    lines = open("/proc/self/status").read().splitlines()
    (kib,) = [int(line.split()[1]) for line in lines if line.startswith("VmRSS")]
    return kib / 1024

class Peak(threading.Thread):
    def __init__(self):
        super().__init__(daemon=True)
        self.start_at = self.most = resident()
        self.on = True

    def run(self):
        while self.on:
            self.most = max(self.most, resident())
            time.sleep(0.002)

# Clones, because the file is mapped: its pages would count as they are first read.
rows = {name: value.clone() for name, value in load_file(sys.argv[1]).items()}
image, text, owner = rows["image"], rows["text"], rows["owner"]
best, busy, result, gained = float("inf"), float("inf"), None, 0.0
for _ in range(int(sys.argv[2])):
    peak = Peak()
    peak.start()
    start, busy_before = time.perf_counter(), time.process_time()
    result = measure(image, text, owner)
    best = min(best, time.perf_counter() - start)
    busy = min(busy, time.process_time() - busy_before)
    peak.on = False
    peak.join()
    gained = max(gained, peak.most - peak.start_at)
print(json.dumps({"seconds": best, "cpu_s": busy, "memory_mib": gained, "metrics": result}))
"""
MEASURE_OURS = """
def measure(image, text, owner):
    image_rank, text_rank = metrics.retrieval_ranks(image, text, owner)
    result = {}
    for k in (1, 5, 10):
        for name, ranks in (("image", text_rank), ("text", image_rank)):
            result[f"{name}_retrieval_recall@{k}"] = float((ranks <= k).double().mean())
    return result
"""
MEASURE_PEER = """
def measure(image, text, owner):
    # The body of zeroshot_retrieval.evaluate after embedding, with its own functions and its
    # default batch of 64.
    scores = text @ image.t()
    positive = torch.zeros_like(scores, dtype=bool)
    positive[torch.arange(len(scores)), owner] = True
    result = {}
    for k in (1, 5, 10):
        for name, s, p in (("image", scores, positive), ("text", scores.T, positive.T)):
            hits = peer.batchify(peer.recall_at_k, s, p, 64, "cpu", k=k) > 0
            result[f"{name}_retrieval_recall@{k}"] = hits.float().mean().item()
    return result
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    peer_help = "interpreter of an environment that has clip-benchmark"
    parser.add_argument("--peer", metavar="PYTHON", help=peer_help)
    images_help = "several: a row each, without a peer"
    parser.add_argument("--images", type=int, nargs="+", default=[5000], help=images_help)
    extrapolate_help = "of several: a last row, computed from the largest two"
    parser.add_argument("--extrapolate", type=int, metavar="IMAGES", help=extrapolate_help)
    parser.add_argument("--captions", type=int, default=5, help="an image")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3, help="the best time counts")
    report.add_arguments(parser)
    options = parser.parse_args()

    if options.peer and (len(options.images) > 1 or options.extrapolate):
        parser.error("--peer compares at one size; give one number of images")
    if options.extrapolate and len(options.images) < 2:
        parser.error("--extrapolate needs at least two numbers of images")
    if len(options.images) > 1:
        by_size(options)
    else:
        beside_peer(options)


def beside_peer(options: argparse.Namespace) -> None:
    """Publish one size, ours and where there is an interpreter for it clip_benchmark's."""
    (n_images,) = options.images
    results = {"vlp": measured(options, n_images, sys.executable, OURS + MEASURE_OURS)}
    if options.peer:
        once = argparse.Namespace(**{**vars(options), "repeats": 1})
        peer = measured(once, n_images, options.peer, PEER + MEASURE_PEER)
        results["clip_benchmark"] = peer

    peer_seconds = results["clip_benchmark"]["seconds"] if options.peer else None
    table = [
        {
            "method": name,
            "s": result["seconds"],
            "extra MiB": result["memory_mib"],
            "image R@1": result["metrics"]["image_retrieval_recall@1"],
            "text R@1": result["metrics"]["text_retrieval_recall@1"],
            "time / clip_benchmark": result["seconds"] / peer_seconds if peer_seconds else None,
        }
        for name, result in results.items()
    ]

    n_captions = n_images * options.captions
    notes = (
        f"{n_captions:,} captions, {n_images:,} images, D = {options.dim}; all recalls at 1, "
        "5 and 10."
    )
    if options.peer:
        ours, peers = (result["metrics"] for result in results.values())
        difference = max(abs(ours[name] - peers[name]) for name in ours)
        notes += f" Largest difference of a recall: {difference:.1g}."
    else:
        notes += " clip_benchmark was not run: name an interpreter that has it with --peer."
    report.publish("retrieval", "Exact retrieval, once embedded", table, options, notes)


def by_size(options: argparse.Namespace) -> None:
    """Publish ours at several sizes, and if asked for what a larger one comes to."""
    rows = []
    for n_images in sorted(options.images):
        result = measured(options, n_images, sys.executable, OURS + MEASURE_OURS)
        rows.append(size_row(options, n_images, result["cpu_s"], result["memory_mib"]))
        rows[-1]["elapsed s"] = result["seconds"]

    notes = (
        f"D = {options.dim}, {os.environ.get('OMP_NUM_THREADS', 'all')} thread(s), "
        f"{options.repeats} repeat(s), on a machine that others use too, so that CPU seconds and "
        "not elapsed ones tell the cost; extra MiB are over the embeddings."
    )
    if options.extrapolate:
        rows.append(extrapolated(options, rows))
        notes += (
            f" The row of {options.extrapolate:,} images was NOT run: its CPU seconds are those of "
            "the largest measured row by the number of scores, its memory the line through the two "
            "largest rows."
        )
    report.publish(
        "retrieval_sizes", "Exact retrieval of large sets, once embedded", rows, options, notes
    )


def size_row(
    options: argparse.Namespace, n_images: int, cpu_s: float, memory_mib: float
) -> dict[str, Any]:
    """A line of the table of sizes."""
    n_captions = n_images * options.captions
    return {
        "images": n_images,
        "captions": n_captions,
        "extra MiB": memory_mib,
        "full matrix, MiB": n_images * n_captions * 4 / 2**20,
        "CPU s": cpu_s,
        "10⁹ scores a CPU s": n_images * n_captions / cpu_s / 1e9,
        "elapsed s": None,
    }


def extrapolated(options: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The line of a size that was not run: time by scores, memory by rows."""
    before, largest = rows[-2:]
    growth = options.extrapolate / largest["images"]
    slope = (largest["extra MiB"] - before["extra MiB"]) / (largest["images"] - before["images"])

    more_mib = slope * (options.extrapolate - largest["images"])
    cpu_s, memory_mib = largest["CPU s"] * growth**2, largest["extra MiB"] + more_mib
    return size_row(options, options.extrapolate, cpu_s, memory_mib)


def measured(options: argparse.Namespace, n_images: int, python: str, code: str) -> dict[str, Any]:
    """Seconds, memory and recalls of one side on rows of one size."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.safetensors"
        embed(rows, n_images, options.captions, options.dim)
        return measure(python, code + RUN, rows, options.repeats)


def embed(path: Path, n_images: int, n_captions: int, dim: int) -> None:
    """Unit rows whose captions lie near their images, so that recalls are neither 0 nor 1."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    image = torch.nn.functional.normalize(torch.randn(n_images, dim, generator=generator), dim=1)
    owner = torch.arange(n_images).repeat_interleave(n_captions)
    noise = torch.randn(len(owner), dim, generator=generator) / dim**0.5
    text = torch.nn.functional.normalize(image[owner] + 6 * noise, dim=1)
    save_file({"image": image, "text": text, "owner": owner}, path)


def measure(python: str, code: str, rows: Path, repeats: int) -> dict:
    done = subprocess.run(
        [python, "-c", code, str(rows), str(repeats)], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{python} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
