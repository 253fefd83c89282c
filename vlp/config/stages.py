"""The section `stages`: phases of a run that differ from what the configuration says besides."""

from __future__ import annotations

from dataclasses import dataclass

from vlp.config.durations import Duration


@dataclass(frozen=True)
class Stage:
    """One phase; what a key leaves open is as configured, and so is all that follows the last
    stage.
    """

    # how long, in any unit; 90% is of train.duration, and samples and epochs count at this batch
    duration: Duration
    batch: int | None = None  # in the place of train.batch
    micro_batches: int | None = None  # in the place of train.micro_batches
    # pixels, one number or [height, width], in the place of the image tower's; its positions are
    # interpolated at the next joint
    image_size: int | tuple[int, int] | None = None
    # share of patches left out (FLIP), in the place of the image tower's
    patch_dropout: float | None = None
    # most tokens of a text (CLIPA); the text tower keeps the positions of its own context
    context_length: int | None = None
    lr: float = 1.0  # factor of the learning rate
    # gives the stage a schedule of its own, from its first step to its last, with this warm-up;
    # None: it takes part in the whole run's
    warmup: Duration | None = None

    def __post_init__(self) -> None:
        pixels = self.image_size
        sizes = {
            "batch": self.batch,
            "micro_batches": self.micro_batches,
            "image_size": min(pixels) if isinstance(pixels, tuple) else pixels,
        }
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise ValueError(f"{name} is {size}; expected at least 1, or leave it out")
        if self.context_length is not None and self.context_length < 3:
            raise ValueError(
                f"context_length is {self.context_length}; expected at least 3: begin, a token, end"
            )
        if self.patch_dropout is not None and not 0 <= self.patch_dropout < 1:
            raise ValueError(f"patch_dropout is {self.patch_dropout}; expected a share in [0, 1)")
        if self.lr <= 0:
            raise ValueError(f"lr is {self.lr}; expected a positive factor, such as 0.1")
        if not self.duration.value:
            raise ValueError("duration is 0; give the stage a length, or leave it out")
