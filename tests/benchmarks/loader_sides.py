"""What `vlp data pack --max-side` gains: photos of a camera's size through the training loader, as
they are and shrunk once.

    python tests/benchmarks/loader_sides.py [--photos 96] [--repeats 3] [--publish]

Photos of shared/data (or --data) are enlarged to 4,000 × 3,000 pixels or so, as a camera of 12
megapixels writes them, and packed twice by the command that users call. The loader then reads both
with its default augmentation at 224 px, in one process, alternating: samples per CPU second, which
other load on the machine disturbs least. Enlarged photos hold little fine detail, so that their
files are smaller, and read faster, than a camera's.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tarfile
import tempfile
import time
from io import BytesIO
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
LONG_SIDE, BATCH, SIZE = 4000, 16, 224


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-side", type=int, default=512)
    parser.add_argument(
        "--data",
        type=Path,
        default=os.environ.get("VLP_DATA") or REPOSITORY.parent / "shared" / "data",
    )
    sys.path.insert(0, str(REPOSITORY))
    from tests.benchmarks import report

    report.add_arguments(parser)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        write_photos(Path(args.data) / "coco_open.tar", place / "photos", args.photos)
        sets = {
            "as they are": (place / "whole", []),
            f"--max-side {args.max_side}": (place / "small", ["--max-side", str(args.max_side)]),
        }
        pack_cpu_s = {
            kind: packed(place / "photos", *target) / args.photos for kind, target in sets.items()
        }
        rates = measured({kind: folder for kind, (folder, _) in sets.items()}, args.repeats)
        sizes = {kind: (folder / "00000.tar").stat().st_size for kind, (folder, _) in sets.items()}

    rows = []
    whole = {scaled: rates["as they are", scaled] for scaled in (False, True)}
    for (kind, scaled), rate in rates.items():
        rows.append(
            {
                "photos": kind,
                "decoding": "scaled" if scaled else "whole",
                "samples / CPU s": rate,
                "times as they are": rate / whole[scaled],
                "kB a sample": sizes[kind] / args.photos / 1e3,
                "CPU s a photo to pack": pack_cpu_s[kind],
            }
        )
    notes = (
        f"{args.photos} photos of COCO enlarged to {LONG_SIDE:,} pixels on the longer side, JPEG "
        f"at quality 90; loader in one process, crops of {SIZE} px, median of {args.repeats} "
        "rounds."
    )
    title = "Loader on photos of 12 megapixels, as they are and shrunk once"
    report.publish("loader_sides", title, rows, args, notes)


def write_photos(archive: Path, folder: Path, n: int) -> None:
    """`n` photos of a camera's size, each with its text."""
    from PIL import Image

    folder.mkdir()
    with tarfile.open(archive) as tar:
        for i, member in enumerate(tar.getmembers()[:n]):
            image = Image.open(BytesIO(tar.extractfile(member).read())).convert("RGB")
            scale = LONG_SIDE / max(image.size)
            width, height = (round(side * scale) for side in image.size)
            enlarged = image.resize((width, height), Image.Resampling.BICUBIC)
            enlarged.save(folder / f"{i:05}.jpg", quality=90)
            (folder / f"{i:05}.txt").write_text(f"photo {i}")


def packed(photos: Path, target: Path, options: list[str]) -> float:
    """Pack the photos; returns the CPU seconds that it took."""
    from vlp.cli import main as vlp

    started = time.process_time()
    if vlp(["data", "pack", str(photos), "--to", str(target), *options]):
        raise SystemExit("vlp data pack failed")
    return time.process_time() - started


def measured(folders: dict[str, Path], repeats: int) -> dict[tuple[str, bool], float]:
    """Samples per CPU second by set and way of decoding, after a warm-up."""
    from vlp.config import Data
    from vlp.data.loader import Loader
    from vlp.schema import parse
    from vlp.types import ImageSpec, TextSpec

    loaders = {}
    for kind, folder in folders.items():
        for scaled in (False, True):
            sources = [{"name": "shards", "path": str(folder)}]
            augment = {"scaled_decoding": scaled}
            data = parse(Data, {"sources": sources, "workers": 0, "augment": augment})
            image, text = ImageSpec((SIZE, SIZE)), TextSpec("clip", 77)
            loaders[kind, scaled] = iter(Loader(data, image, text, batch=BATCH, seed=0))
            next(loaders[kind, scaled])

    rates: dict[tuple[str, bool], list[float]] = {key: [] for key in loaders}
    for _ in range(repeats):
        for key, batches in loaders.items():
            # Short of a tenth of a second the clock's own steps would show.
            n_batches = 2 if key[0] == "as they are" else 8
            started = time.process_time()
            for _ in range(n_batches):
                next(batches)
            rates[key].append(n_batches * BATCH / (time.process_time() - started))
    return {key: statistics.median(values) for key, values in rates.items()}


if __name__ == "__main__":
    main()
