"""Sounds as log-mel rows: 100 rows a second over windows of 25 ms, mono.

    row = log10 of the power in F mel bands up to half the rate, floored at 10⁻¹⁰, as (x + 4) / 4

Waves of PCM are read by the standard library; all else by soundfile (the extra
audio).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlp.data.further_members import Member, sound_of
from vlp.data.sounds import decoded, log_mel, resampled

_ROWS_A_SECOND = 100


@dataclass(frozen=True)
class Sounds:
    """The first `seconds` of a sample's sound."""

    name: str
    seconds: float
    bands: int
    rate: int  # Hz, to which sounds are resampled

    def __post_init__(self) -> None:
        if self.seconds * _ROWS_A_SECOND < 1 or self.bands < 1 or self.rate < 1000:
            raise ValueError(
                f"--seconds {self.seconds:g}, --bands {self.bands} and --rate {self.rate}: "
                "expected at least 0.01 seconds, 1 band and 1,000 Hz"
            )

    @property
    def shape(self) -> tuple[int, int]:
        return round(self.seconds * _ROWS_A_SECOND), self.bands

    def settings(self) -> dict[str, Any]:
        return {
            "kind": "sound",
            "name": self.name,
            "seconds": self.seconds,
            "bands": self.bands,
            "rate": self.rate,
        }

    def members(self, of_sample: list[Member]) -> list[Member]:
        return sound_of(of_sample, self.name)

    def rows(self, files: list[bytes]) -> np.ndarray:
        rate, samples = decoded(files[0])
        longest = math.ceil(self.seconds * rate)
        at_rate = resampled(samples[:longest], rate, self.rate)
        return log_mel(at_rate, self.rate, self.bands)[: self.shape[0]]
