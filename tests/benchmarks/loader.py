"""Our loader beside open_clip's own webdataset pipeline: the same shards, crops, batch and number
of loader processes.

    python -m tests.benchmarks.loader [--workers 2] [--batches 40] [--json loader.json]

Measured in one run, each contender in processes of its own, alternating, after a warm-up: samples
per second of wall clock, and per CPU-second over all processes and threads (which other load on the
machine disturbs least); bytes read; memory (proportional set size of all processes). Scaled
decoding (`data.augment.scaled_decoding`) is ours too, an option that moves pixels more. open_clip's
training loader needs webdataset ≤ 0.2.86, so it gets an environment of its own in the cache: this
one plus that version.
"""

from __future__ import annotations

import argparse
import functools
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
PHOTOS, SMALL, TINY = "photos", "photos at quality 85", "64-px shards"
SIZES = {PHOTOS: 224, SMALL: 224, TINY: 64}
DIGESTS = "digests / reading and decoding"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--batches",
        type=int,
        default=40,
        help=f"measured batches of {BATCH}; four times as many at 64 px",
    )
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument(
        "--alone", action="store_true", help="ours only, where open_clip's packages are not"
    )
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    parser.add_argument(
        "--publish",
        action="store_true",
        help="write docs/results/ and the section of docs/results.md",
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=os.environ.get("VLP_DATA") or REPOSITORY.parent / "shared" / "data",
    )
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "vlp" / "benchmarks")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--shards", help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        batches = CONTENDERS[args.contender](args.shards, args.size, args.workers)
        print(
            json.dumps(
                measure(
                    batches, args.batches * (4 if args.size == SIZES[TINY] else 1), args.workers
                )
            )
        )
        return
    pythons = {"vlp": sys.executable, "scaled": sys.executable}
    if not args.alone:
        pythons = {"open_clip": peer_python(args.cache), **pythons}
    results: dict[str, dict[str, dict[str, float]]] = {}
    for name, size in SIZES.items():
        folder = prepare(args.cache, Path(args.data), name)
        # Whose images have no pixels to spare.
        contenders = [c for c in pythons if c != "scaled" or name != TINY]
        runs: dict[str, list[dict[str, float]]] = {contender: [] for contender in contenders}
        for _ in range(args.repeats):
            for contender in contenders:
                runs[contender].append(run(pythons[contender], contender, folder, size, args))
        results[name] = {
            c: {k: statistics.median(r[k] for r in rs) for k in rs[0]} for c, rs in runs.items()
        }
    if args.alone:
        publish_alone(results, args)
        return

    error = {scaled: pixel_error(Path(args.data), scaled) for scaled in (False, True)}
    shares = {name: digest_share(prepare(args.cache, Path(args.data), name)) for name in SIZES}
    publish(results, error, shares, args)


def publish(
    results: dict[str, Any],
    error: dict[bool, dict[str, float]],
    shares: dict[str, float],
    args: argparse.Namespace,
) -> None:
    """The table, a row a set and measure. `shares`: see `digest_share`."""
    # Here and not above: open_clip's environment runs this file too.
    sys.path.insert(0, str(REPOSITORY))
    from tests.benchmarks import report

    rows = []
    for name, found in results.items():
        for key, theirs in found["open_clip"].items():
            ours, scaled = found["vlp"][key], found.get("scaled", {}).get(key)
            rows.append(
                {
                    "set": f"{name} → {SIZES[name]} px",
                    "measure": key,
                    "open_clip": theirs,
                    "vlp": ours,
                    "vlp / open_clip": ours / theirs,
                    "vlp, scaled decoding": scaled,
                    "scaled / open_clip": scaled and scaled / theirs,
                }
            )
        checking = {"measure": DIGESTS, "vlp": shares[name]}
        rows.append({**dict.fromkeys(rows[-1]), "set": rows[-1]["set"], **checking})
    notes = (
        f"{args.workers} workers, batches of {BATCH}, median of {args.repeats} runs. CPU seconds "
        "are of all processes and threads. Pixels against Pillow's: mean error "
        f"{error[False]['mean']:.3f} levels, largest of a photo {error[False]['worst']:.3f}; with "
        f"scaled decoding {error[True]['mean']:.2f} and {error[True]['worst']:.1f}."
    )
    report.publish("loader", "Loader beside open_clip's webdataset pipeline", rows, args, notes)


def publish_alone(results: dict[str, Any], args: argparse.Namespace) -> None:
    """The table of our own loader: a row a set and way of decoding."""
    sys.path.insert(0, str(REPOSITORY))
    from tests.benchmarks import report

    rows = []
    for name, contenders in results.items():
        for contender, measures in contenders.items():
            rows.append({"set": name, "px": SIZES[name], "method": contender, **measures})
    notes = f"{args.workers} workers, batches of {BATCH}, median of {args.repeats} runs."
    report.publish("loader_alone", "Loader", rows, args, notes)


def run(
    python: str, contender: str, folder: Path, size: int, args: argparse.Namespace
) -> dict[str, float]:
    """One contender's numbers from a process of its own."""
    command = [
        python,
        __file__,
        "--contender",
        contender,
        "--shards",
        str(folder),
        "--size",
        str(size),
        "--workers",
        str(args.workers),
        "--batches",
        str(args.batches),
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        raise SystemExit(f"{contender} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(batches: Iterator[Any], n: int, workers: int) -> dict[str, float]:
    """Rates over n batches of what `batches` yields, after a warm-up.

    Work is counted from one moment at which every queue is full and all processes rest to another
    such moment, so that exactly n batches were made between them; time is taken once the batches of
    the first queue are used up.
    """
    import psutil

    queued = 4 * max(1, workers)
    for _ in range(queued):
        next(batches)
    cpu, read = rest()
    for i in range(queued + n):
        next(batches)
        if i == queued - 1:
            started = time.perf_counter()
    wall = time.perf_counter() - started
    now = rest()
    memory = sum(
        p.memory_full_info().pss
        for p in [psutil.Process(), *psutil.Process().children(recursive=True)]
    )
    made = (queued + n) * BATCH
    return {
        "samples / s": n * BATCH / wall,
        "samples / CPU s": made / (now[0] - cpu),
        "kB read / sample": (now[1] - read) / made / 1e3,
        "memory, MB": memory / 1e6,
    }


def rest() -> tuple[float, float]:
    """CPU seconds and bytes read of this process and its children so far, as soon as they do
    nothing for a while.
    """
    import psutil

    last = -1.0
    while True:
        tree = [psutil.Process(), *psutil.Process().children(recursive=True)]
        cpu = sum(t.user + t.system for t in (process.cpu_times() for process in tree))
        if cpu - last < 0.02:
            return cpu, sum(process.io_counters().read_chars for process in tree)
        last = cpu
        time.sleep(1)


def ours(shards: str, size: int, workers: int, scaled: bool = False) -> Iterator[Any]:
    """vlp.data.loader with its default augmentation."""
    sys.path.insert(0, str(REPOSITORY))
    from vlp.config import Data
    from vlp.data.loader import Loader
    from vlp.schema import parse
    from vlp.types import ImageSpec, TextSpec

    source, augment = {"name": "shards", "path": shards}, {"scaled_decoding": scaled}
    data = parse(Data, {"sources": [source], "workers": workers, "augment": augment})
    return iter(
        Loader(data, ImageSpec((size, size)), TextSpec("clip", CONTEXT), batch=BATCH, seed=0)
    )


def open_clips(shards: str, size: int, workers: int) -> Iterator[Any]:
    """open_clip_train's webdataset pipeline with open_clip's training transform and tokenizer,
    epoch after epoch.
    """
    from open_clip import SimpleTokenizer, image_transform
    from open_clip_train.data import get_wds_dataset

    n = len(list(Path(shards).glob("*.tar")))
    options = argparse.Namespace(
        train_data=f"{shards}/{{00000..{n - 1:05d}}}.tar",
        train_num_samples=10**6,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        seed=0,
        batch_size=BATCH,
        workers=workers,
        world_size=1,
    )
    info = get_wds_dataset(
        options, image_transform((size, size), is_train=True), True, tokenizer=SimpleTokenizer()
    )
    return iter(info.dataloader)


CONTENDERS = {"vlp": ours, "scaled": functools.partial(ours, scaled=True), "open_clip": open_clips}


def prepare(cache: Path, data: Path, name: str) -> Path:
    """Shards of about 1,300 photos, as they are or encoded anew, or of 6,000 images of 64 px;
    written once.
    """
    from PIL import Image

    from vlp.data.format import ShardWriter

    folder = cache / name.replace(" ", "_")
    if (folder / "done").exists():
        return folder
    chance = random.Random(0)
    with tarfile.open(data / ("caltech101.tar" if name == TINY else "coco_open.tar")) as tar:
        images = [
            tar.extractfile(member).read()
            for member in tar.getmembers()[: 1000 if name == TINY else None]
        ]
    lines = (data / "coco_open.jsonl").read_text().splitlines()
    captions = [caption for line in lines for caption in json.loads(line)["captions"]]
    if name != PHOTOS:
        images = [
            encoded_anew(Image.open(io.BytesIO(image)).convert("RGB"), name == TINY)
            for image in images
        ]
    repeats = 6 if name == TINY else 12
    with ShardWriter(folder, len(images) * repeats // 12, overwrite=True) as writer:
        for _ in range(repeats):
            for image in chance.sample(images, len(images)):
                writer.add(None, image, "jpg", [chance.choice(captions)])
    (folder / "done").touch()
    return folder


def encoded_anew(image: Any, tiny: bool) -> bytes:
    file = io.BytesIO()
    (image.resize((64, 64)) if tiny else image).save(file, "JPEG", quality=90 if tiny else 85)
    return file.getvalue()


def pixel_error(data: Path, scaled: bool) -> dict[str, float]:
    """Mean absolute difference in levels between our training crops and Pillow's crop and bicubic
    resize, 224 px.
    """
    import numpy as np
    from PIL import Image

    from vlp.config import Augment
    from vlp.data.decode import crop_box, train_transform
    from vlp.types import ImageSpec

    augment, errors = Augment(scaled_decoding=scaled), []
    with tarfile.open(data / "coco_open.tar") as tar:
        for i, member in enumerate(tar.getmembers()):
            encoded = tar.extractfile(member).read()
            image = Image.open(io.BytesIO(encoded)).convert("RGB")
            top, left, h, w = crop_box(image.height, image.width, augment, random.Random(i))
            expected = np.asarray(
                image.crop((left, top, left + w, top + h)).resize(
                    (224, 224), Image.Resampling.BICUBIC
                )
            )
            found = (
                train_transform(encoded, ImageSpec((224, 224)), augment, random.Random(i))
                .permute(1, 2, 0)
                .numpy()
            )
            errors.append(float(np.abs(found.astype(int) - expected).mean()))
    return {"mean": statistics.mean(errors), "worst": max(errors)}


def digest_share(shards: Path, n: int = 300, rounds: int = 5) -> float:
    """CPU time of comparing samples' digests, as a share of that of reading and decoding them."""
    sys.path.insert(0, str(REPOSITORY))
    from vlp.config import Augment, Captions
    from vlp.data.decode import train_transform
    from vlp.data.digests import digest_of
    from vlp.data.sources.shards import Options
    from vlp.data.sources.shards import open as open_shards
    from vlp.types import ImageSpec

    source = open_shards(Options(str(shards)), Captions())
    samples = [source[i] for i in range(n)]
    records = [json.dumps(sample.meta).encode() for sample in samples]
    members = [
        {"0.jpg": sample.image, "0.txt": record, "0.json": record}
        for sample, record in zip(samples, records)
    ]

    shares = []
    for _ in range(rounds):
        started = time.process_time()
        for i in range(n):
            train_transform(source[i].image, ImageSpec((224, 224)), Augment(), random.Random(i))
        decoded = time.process_time()
        for named in members:
            digest_of(named)
        shares.append((time.process_time() - decoded) / (decoded - started))
    return statistics.median(shares)


def peer_python(cache: Path) -> str:
    """An environment that sees ours, with the newest webdataset that open_clip's training loader
    works with.
    """
    folder = cache / "open_clip"
    python = folder / "bin" / "python"
    if not (folder / "done").exists():
        venv.create(folder, with_pip=True, clear=True)
        site = next(folder.glob("lib/python*/site-packages"))
        (site / "base.pth").write_text(
            "\n".join(path for path in sys.path if path.endswith("site-packages")) + "\n"
        )
        install = [
            python,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--ignore-installed",
        ]
        subprocess.run([*install, "--no-deps", "webdataset==0.2.86"], check=True)
        subprocess.run(
            [*install, "--no-deps", "pandas", "python-dateutil", "pytz", "six", "tzdata"],
            check=True,
        )
        (folder / "done").touch()
    return str(python)


if __name__ == "__main__":
    main()
