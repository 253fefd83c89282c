"""Sounds as log-mel rows: 100 rows a second over windows of 25 ms, mono.

    row = log10 of the power in F mel bands up to half the rate, floored at 10⁻¹⁰, as (x + 4) / 4

Waves of PCM are read by the standard library; all else by soundfile, where it is installed.
"""

from __future__ import annotations

import io
import math
import wave
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from vlp.data_tools.modality.members import Member

_OTHERS = ("flac", "ogg", "mp3")  # by soundfile
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
        sounds = [
            member
            for member in of_sample
            if member.extension in ("wav", *_OTHERS)
            and (not self.name or member.infix == self.name)
        ]
        return sounds[:1]

    def rows(self, files: list[bytes]) -> np.ndarray:
        rate, samples = decoded(files[0])
        longest = math.ceil(self.seconds * rate)
        at_rate = resampled(samples[:longest], rate, self.rate)
        return log_mel(at_rate, self.rate, self.bands)[: self.shape[0]]


def decoded(data: bytes) -> tuple[int, np.ndarray]:
    """Rate in Hz and the mono samples in [−1, 1], float32; ValueError for what is no sound, and for
    one without a sample.
    """
    if not data:
        raise ValueError("a sound file of 0 bytes")
    is_wave = data[:4] == b"RIFF"
    rate, samples = _wave(data) if is_wave else _by_soundfile(data)
    if not samples.size or rate < 1:
        raise ValueError("a sound without samples")
    return rate, samples.mean(1)


def _wave(data: bytes) -> tuple[int, np.ndarray]:
    """Rate and samples [t, channels] of PCM of 8, 16, 24 or 32 bits."""
    try:
        with wave.open(io.BytesIO(data)) as file:
            rate, width, n_channels = file.getframerate(), file.getsampwidth(), file.getnchannels()
            frames = file.readframes(file.getnframes())
    except wave.Error:
        # Floats, say: there are some fifty kinds.
        return _by_soundfile(data)
    except (EOFError, ValueError) as error:
        raise ValueError(f"no wave file ({type(error).__name__})") from None

    frames = frames[: len(frames) // (width * n_channels) * width * n_channels]
    if width == 1:  # unsigned, where all others have a sign
        samples = np.frombuffer(frames, np.uint8).astype(np.float32) - 128
    else:
        # Into the upper bytes of 32 bits.
        wide = np.zeros((len(frames) // width, 4), np.uint8)
        wide[:, 4 - width :] = np.frombuffer(frames, np.uint8).reshape(-1, width)
        samples = wide.view("<i4")[:, 0].astype(np.float32) / 2 ** (32 - 8 * width)
    return rate, samples.reshape(-1, n_channels) / 2 ** (8 * width - 1)


def _by_soundfile(data: bytes) -> tuple[int, np.ndarray]:
    try:
        import soundfile
    except ImportError:
        raise ValueError(
            "a sound that is no wave of PCM: pip install soundfile reads FLAC, OGG, MP3 and others"
        ) from None
    try:
        samples, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"no sound ({error})") from None
    return rate, samples


def resampled(samples: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """The sound at another rate: its spectrum, cut off or filled up with zeros."""
    if rate == wanted:
        return samples
    n_samples = max(1, round(len(samples) * wanted / rate))
    spectrum = np.fft.rfft(samples)[: n_samples // 2 + 1]
    return np.fft.irfft(spectrum, n_samples).astype(np.float32) * (n_samples / len(samples))


def log_mel(samples: np.ndarray, rate: int, bands: int) -> np.ndarray:
    """[t, bands] float32 of a sound [n]: a row each 10 ms, one at least."""
    from transformers.audio_utils import spectrogram, window_function

    window, hop = rate * 25 // 1000, rate // _ROWS_A_SECOND
    fft = 1 << (window - 1).bit_length()
    # A window of silence on each side, also around a sound shorter than that.
    padded = np.pad(samples, (window // 2, window - window // 2))
    rows = spectrogram(
        padded,
        window_function(window, "hann"),
        frame_length=window,
        hop_length=hop,
        fft_length=fft,
        power=2.0,
        center=False,
        mel_filters=_filters(fft, bands, rate),
        mel_floor=1e-10,
        log_mel="log10",
    ).T
    n_rows = max(1, len(samples) // hop)
    return ((rows[:n_rows] + 4) / 4).astype(np.float32)


@cache
def _filters(fft: int, bands: int, rate: int) -> np.ndarray:
    from transformers.audio_utils import mel_filter_bank

    return mel_filter_bank(
        1 + fft // 2, bands, 0.0, rate / 2, rate, norm="slaney", mel_scale="slaney"
    )
