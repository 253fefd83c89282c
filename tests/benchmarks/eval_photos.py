"""JPEG photos to a model's pixels for evaluation, ours beside clip_benchmark's way, in one run.

    python tests/benchmarks/eval_photos.py PHOTOS.tar

clip_benchmark reads pictures with Pillow and open_clip's transform in the workers of a torch
DataLoader; that pipeline is made here of the same parts, so that no other environment is needed.
The sides take turns, and medians of CPU seconds count (the process and its workers), which other
load on the machine changes less than the clock.
"""

from __future__ import annotations

import argparse
import io
import resource
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import open_clip
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from tests.benchmarks import report
from vlp.eval import embed, memory
from vlp.eval.pictures import Picture, open_archive, picture_of


class Photos(torch.utils.data.Dataset):
    """Pictures as clip_benchmark's data sets give them."""

    def __init__(self, pictures: list[Picture], transform: Callable) -> None:
        self.pictures, self.transform = pictures, transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, place: int) -> torch.Tensor:
        image = Image.open(io.BytesIO(self.pictures[place].read()))
        return self.transform(image.convert("RGB"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photos", metavar="TAR", help="a .tar or a folder of JPEGs")
    parser.add_argument("--limit", type=int, default=512, help="photos a pass")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=5)
    report.add_arguments(parser)
    options = parser.parse_args()

    torch.set_num_threads(1)
    memory.keep_freed()  # as `vlp eval` does; the peers' workers inherit it
    archive = open_archive(options.photos)
    pictures = [picture_of(archive, name) for name in list(archive.names)[: options.limit]]
    if not pictures:
        raise SystemExit(f"{options.photos} holds no pictures; name a .tar or a folder of JPEGs")
    transform = open_clip.image_transform(options.size, is_train=False)
    sides = {"vlp": ours, "clip_benchmark's parts": peers}

    # Both once unmeasured, for the pages of the tar and the imports; they must agree.
    pixels = [side(pictures, transform, options.workers) for side in sides.values()]
    difference = float((pixels[0] - pixels[1]).abs().max())

    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(options.repeats):
        for name, side in sides.items():
            start = cpu_seconds()
            side(pictures, transform, options.workers)
            seconds[name].append(cpu_seconds() - start)

    medians = {name: statistics.median(values) for name, values in seconds.items()}
    slowest = medians["clip_benchmark's parts"]
    table = [
        {
            "method": name,
            "photos a CPU-second": len(pictures) / median,
            "of clip_benchmark's": slowest / median,
        }
        for name, median in medians.items()
    ]
    notes = (
        f"{len(pictures)} photos, {options.workers} workers, {options.size} px, medians of "
        f"{options.repeats} turns. Largest difference of a pixel: {difference:.1g}."
    )
    report.publish("eval_photos", "Photos to pixels, for evaluation", table, options, notes)


def ours(pictures: list[Picture], transform: Callable, workers: int) -> torch.Tensor:
    """Every picture's pixels, by the threads of `vlp eval`."""
    batches = [pictures[i : i + 64] for i in range(0, len(pictures), 64)]
    prepared = embed._prepared(lambda shown: transform(shown.open()), batches, workers)
    return torch.cat([small(torch.stack(batch)) for batch in prepared])


def peers(pictures: list[Picture], transform: Callable, workers: int) -> torch.Tensor:
    """Every picture's pixels, by a DataLoader."""
    loader = torch.utils.data.DataLoader(
        Photos(pictures, transform), batch_size=64, num_workers=workers
    )
    return torch.cat([small(batch) for batch in loader])


def small(pixels: torch.Tensor) -> torch.Tensor:
    """A few pixels of each picture, to compare."""
    return pixels[:, :, ::16, ::16].clone()


def cpu_seconds() -> float:
    """Of this process and the workers that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


if __name__ == "__main__":
    main()
