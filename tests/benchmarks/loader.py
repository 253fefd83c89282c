"""Our loader beside open_clip's own webdataset pipeline: the same shards, crops, batch and number of loader processes.

    python -m tests.benchmarks.loader [--workers 2] [--batches 40] [--json loader.json]

Measured in one run, each contender in processes of its own, alternating, after a warm-up: samples per second of wall
clock, and per CPU-second over all processes and threads (which other load on the machine disturbs least); bytes read;
memory (proportional set size of all processes). open_clip's training loader needs webdataset ≤ 0.2.86, so it gets an
environment of its own in the cache: this one plus that version.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import statistics
import subprocess
import sys
import tarfile
import time
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
BATCH, CONTEXT = 64, 77
SETS = {"photos at 224 px": 224, "64-px shards": 64}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batches", type=int, default=40, help=f"measured batches of {BATCH}, a repeat")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    parser.add_argument("--publish", action="store_true", help="write docs/results/ and the section of docs/results.md")
    parser.add_argument("--data", type=Path, default=os.environ.get("VLP_DATA") or REPOSITORY.parent / "shared" / "data")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "vlp" / "benchmarks")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--shards", help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        batches = CONTENDERS[args.contender](args.shards, args.size, args.workers)
        print(json.dumps(measure(batches, args.batches, args.workers)))
        return
    pythons = {"vlp": sys.executable, "open_clip": peer_python(args.cache)}
    results: dict[str, Any] = {"workers": args.workers, "batch": BATCH, "cpus": os.cpu_count(), "sets": {}}
    for name, size in SETS.items():
        folder = prepare(args.cache, Path(args.data), size)
        runs: dict[str, list[dict[str, float]]] = {contender: [] for contender in pythons}
        for _ in range(args.repeats):
            for contender, python in pythons.items():
                runs[contender].append(run(python, contender, folder, size, args))
        results["sets"][name] = {c: {k: statistics.median(r[k] for r in rs) for k in rs[0]} for c, rs in runs.items()}
    results["pixel_error"] = pixel_error(Path(args.data))
    publish(results, args)


def publish(results: dict[str, Any], args: argparse.Namespace) -> None:
    """The table, a row a set and measure."""
    sys.path.insert(0, str(REPOSITORY))  # here and not above: open_clip's environment runs this file too
    from tests.benchmarks import report

    rows = [
        {"set": name, "measure": key, "open_clip": theirs[key], "vlp": ours[key],
         "vlp / open_clip": ours[key] / theirs[key] if theirs[key] else None}
        for name, (ours, theirs) in ((name, (both["vlp"], both["open_clip"])) for name, both in results["sets"].items())
        for key in ours
    ]  # fmt: skip
    error = results["pixel_error"]
    notes = (
        f"{args.workers} workers, batches of {BATCH}, median of {args.repeats} runs. CPU seconds are of all processes and threads. "
        f"Pixels against Pillow's: mean error {error['mean']:.3f} levels, largest of a photo {error['worst']:.3f}."
    )
    report.publish("loader", "Loader beside open_clip's webdataset pipeline", rows, args, notes)


def run(python: str, contender: str, folder: Path, size: int, args: argparse.Namespace) -> dict[str, float]:
    """One contender's numbers from a process of its own."""
    command = [python, __file__, "--contender", contender, "--shards", str(folder), "--size", str(size),
               "--workers", str(args.workers), "--batches", str(args.batches)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"{contender} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(batches: Iterator[Any], n: int, workers: int) -> dict[str, float]:
    """Rates over n batches of what `batches` yields, after a warm-up that fills every worker's queue."""
    import psutil

    def used() -> tuple[float, float, float]:
        tree = [psutil.Process(), *psutil.Process().children(recursive=True)]
        times = [process.cpu_times() for process in tree]
        read = sum(process.io_counters().read_chars for process in tree)
        return time.perf_counter(), sum(t.user + t.system for t in times), read

    for _ in range(4 * max(1, workers)):
        next(batches)
    wall, cpu, read = used()
    for _ in range(n):
        next(batches)
    memory = sum(p.memory_full_info().pss for p in [psutil.Process(), *psutil.Process().children(recursive=True)])
    now = used()
    return {
        "samples / s": n * BATCH / (now[0] - wall), "samples / CPU s": n * BATCH / (now[1] - cpu),
        "kB read / sample": (now[2] - read) / n / BATCH / 1e3, "memory, MB": memory / 1e6,
    }  # fmt: skip


def ours(shards: str, size: int, workers: int) -> Iterator[Any]:
    """vlp.data.loader with its default augmentation."""
    sys.path.insert(0, str(REPOSITORY))
    from vlp.config import Data
    from vlp.data.loader import Loader
    from vlp.schema import parse
    from vlp.types import ImageSpec, TextSpec

    data = parse(Data, {"sources": [{"name": "shards", "path": shards}], "workers": workers})
    return iter(Loader(data, ImageSpec((size, size)), TextSpec("clip", CONTEXT), batch=BATCH, seed=0))


def open_clips(shards: str, size: int, workers: int) -> Iterator[Any]:
    """open_clip_train's webdataset pipeline with open_clip's training transform and tokenizer, epoch after epoch."""
    from open_clip import SimpleTokenizer, image_transform
    from open_clip_train.data import get_wds_dataset

    n = len(list(Path(shards).glob("*.tar")))
    options = argparse.Namespace(
        train_data=f"{shards}/{{00000..{n - 1:05d}}}.tar", train_num_samples=10**6, train_data_upsampling_factors=None,
        dataset_resampled=False, seed=0, batch_size=BATCH, workers=workers, world_size=1,
    )  # fmt: skip
    info = get_wds_dataset(options, image_transform((size, size), is_train=True), True, tokenizer=SimpleTokenizer())
    return iter(info.dataloader)


CONTENDERS = {"vlp": ours, "open_clip": open_clips}


def prepare(cache: Path, data: Path, size: int) -> Path:
    """Shards of about 1,300 photos at original size, or of 6,000 small ones; written once."""
    from PIL import Image

    from vlp.data.format import ShardWriter

    folder = cache / f"shards_{size}"
    if (folder / "done").exists():
        return folder
    chance = random.Random(0)
    with tarfile.open(data / ("coco_open.tar" if size == 224 else "caltech101.tar")) as tar:
        images = [tar.extractfile(member).read() for member in tar.getmembers()[: 1000 if size == 64 else None]]
    lines = (data / "coco_open.jsonl").read_text().splitlines()
    captions = [caption for line in lines for caption in json.loads(line)["captions"]]
    if size == 64:
        images = [small(Image.open(io.BytesIO(data))) for data in images]
    repeats = 12 if size == 224 else 6
    with ShardWriter(folder, len(images) * repeats // 12, overwrite=True) as writer:
        for _ in range(repeats):
            for image in chance.sample(images, len(images)):
                writer.add(None, image, "jpg", [chance.choice(captions)])
    (folder / "done").touch()
    return folder


def small(image: Any) -> bytes:
    file = io.BytesIO()
    image.convert("RGB").resize((64, 64)).save(file, "JPEG", quality=90)
    return file.getvalue()


def pixel_error(data: Path) -> dict[str, float]:
    """Mean absolute difference in levels between our training crops and Pillow's crop and bicubic resize, 224 px."""
    import numpy as np
    from PIL import Image

    from vlp.config import Augment
    from vlp.data.decode import crop_box, train
    from vlp.types import ImageSpec

    errors = []
    with tarfile.open(data / "coco_open.tar") as tar:
        for i, member in enumerate(tar.getmembers()):
            encoded = tar.extractfile(member).read()
            image = Image.open(io.BytesIO(encoded)).convert("RGB")
            top, left, h, w = crop_box(image.height, image.width, Augment(), random.Random(i))
            expected = np.asarray(image.crop((left, top, left + w, top + h)).resize((224, 224), Image.Resampling.BICUBIC))
            found = train(encoded, ImageSpec((224, 224)), Augment(), random.Random(i)).permute(1, 2, 0).numpy()
            errors.append(float(np.abs(found.astype(int) - expected).mean()))
    return {"mean": statistics.mean(errors), "worst": max(errors)}


def peer_python(cache: Path) -> str:
    """An environment that sees ours, with the newest webdataset that open_clip's training loader works with."""
    folder = cache / "open_clip"
    python = folder / "bin" / "python"
    if not (folder / "done").exists():
        venv.create(folder, with_pip=True, clear=True)
        site = next(folder.glob("lib/python*/site-packages"))
        (site / "base.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")) + "\n")
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--ignore-installed"]
        subprocess.run([*install, "--no-deps", "webdataset==0.2.86"], check=True)
        subprocess.run([*install, "--no-deps", "pandas", "python-dateutil", "pytz", "six", "tzdata"], check=True)
        (folder / "done").touch()
    return str(python)


if __name__ == "__main__":
    main()
