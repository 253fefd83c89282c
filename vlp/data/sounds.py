"""Sounds as log-mel rows, mono.

    row = log10 of the power in F mel bands up to half the rate, floored at 10⁻¹⁰, as (x + 4) / 4

Waves of PCM are read by the standard library; all else by soundfile (the extra
audio).
"""

from __future__ import annotations

import importlib.util
import io
import math
import random
import wave
from collections.abc import Collection
from functools import cache

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from vlp import config
from vlp.data.further_members import Files

_INSTALL = "pip install 'vlp[audio]'"
_AT_ONCE = 1 << 20  # numbers that are decoded at once


def rows_of(files: Files, sound: config.Sound, chance: random.Random | None) -> np.ndarray:
    """[t, F] float32 of a sample's sound, t <= T, none where it has none; ValueError for what is no
    sound. Of a longer one a piece where `chance` lets it begin; None: from the middle.
    """
    if not files.members:
        return np.zeros((0, sound.bands), np.float32)
    rate, samples = decoded(files.read(0))
    piece = cut(samples, math.ceil(sound.seconds * rate), chance)
    at_rate = resampled(piece, rate, sound.rate)
    rows = log_mel(at_rate, sound.rate, sound.bands, sound.window_ms, sound.hop_ms)
    return rows[: sound.n_rows]


def can_be_read(extension: str) -> bool:
    """Whether sounds of this kind can be read here."""
    return extension == "wav" or importlib.util.find_spec("soundfile") is not None


def check_installed(extensions: Collection[str], name: str) -> None:
    """Refuse sounds that the package which reads them is missing for."""
    unreadable = sorted(extension for extension in extensions if not can_be_read(extension))
    if unreadable:
        raise ValueError(
            f"{name} has members .{', .'.join(unreadable)}, which need a package: {_INSTALL}; "
            "waves of PCM (.wav) need none"
        )


def cut(samples: np.ndarray, most: int, chance: random.Random | None) -> np.ndarray:
    """At most so many samples: where `chance` lets them begin, or from the middle."""
    spare = len(samples) - most
    if spare <= 0:
        return samples
    start = spare // 2 if chance is None else chance.randint(0, spare)
    return samples[start : start + most]


def decoded(data: bytes) -> tuple[int, np.ndarray]:
    """Rate in Hz and the mono samples in [−1, 1], float32; ValueError for what is no sound, and for
    one without a sample or with NaN or infinity.
    """
    if not data:
        raise ValueError("a sound file of 0 bytes")
    is_wave = data[:4] == b"RIFF"
    rate, samples = _wave(data) if is_wave else _by_soundfile(data)
    if not samples.size or rate < 1:
        raise ValueError("a sound without samples")
    # Waves of floats hold any number.
    if not np.isfinite(samples).all():
        raise ValueError("a sound with NaN or infinity among its samples")
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
    except (EOFError, ValueError, RuntimeError) as error:
        # Sizes that lead beyond the file are a RuntimeError.
        raise ValueError(f"no wave file ({type(error).__name__})") from None
    if width > 4:
        raise ValueError(f"a wave of {8 * width} bits; expected 8, 16, 24 or 32")

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
    # The package without its library, on a system that it has none for, is an OSError.
    except (ImportError, OSError):
        raise ValueError(
            f"a sound that is no wave of PCM: {_INSTALL} reads FLAC, OGG, MP3 and others"
        ) from None
    blocks: list[np.ndarray] = []
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            # Not at once: a damaged header may tell of 256 GiB, which would be asked for.
            n_frames = max(1, _AT_ONCE // file.channels)
            while not blocks or len(blocks[-1]) == n_frames:
                blocks.append(file.read(n_frames, dtype="float32", always_2d=True))
            rate = file.samplerate
    except soundfile.LibsndfileError as error:
        # Its own text names an address in memory, and reasons are counted.
        raise ValueError(f"no sound ({error.error_string})") from None
    return rate, np.concatenate(blocks)


def resampled(samples: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """The sound at another rate: its spectrum, cut off or filled up with zeros."""
    if rate == wanted:
        return samples
    n_samples = max(1, round(len(samples) * wanted / rate))
    spectrum = np.fft.rfft(samples)[: n_samples // 2 + 1]
    return np.fft.irfft(spectrum, n_samples).astype(np.float32) * (n_samples / len(samples))


def log_mel(
    samples: np.ndarray, rate: int, bands: int, window_ms: float = 25.0, hop_ms: float = 10.0
) -> np.ndarray:
    """[t, bands] float32 of a sound [n]: a row each `hop_ms`, one at least."""
    window, hop = int(rate * window_ms / 1000), int(rate * hop_ms / 1000)
    fft = 1 << (window - 1).bit_length()

    # A window of silence on each side, also around a sound shorter than that.
    padded = np.pad(samples, (window // 2, window - window // 2))
    pieces = sliding_window_view(padded, window)[::hop][: max(1, len(samples) // hop)]
    # Hann's window, periodic.
    shape = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    power = np.abs(np.fft.rfft(pieces * shape, fft)) ** 2
    mel = np.maximum(power @ _filters(fft, bands, rate), 1e-10)
    return ((np.log10(mel) + 4) / 4).astype(np.float32)


@cache
def _filters(fft: int, bands: int, rate: int) -> np.ndarray:
    from transformers.audio_utils import mel_filter_bank

    return mel_filter_bank(
        1 + fft // 2, bands, 0.0, rate / 2, rate, norm="slaney", mel_scale="slaney"
    )
