"""A scene as a sound: a beep for each object, group by group, from the left or the top.

color    pitch, a step of a scale from 262 to 1,047 Hz
shape    waveform: its harmonics, or how its loudness and pitch move
size     loudness
number   number of beeps of .12 s, .06 s apart
"""

from __future__ import annotations

import io
import wave
from typing import Any

import numpy as np

from vlp.data_tools.scenes.words import COLORS, SHAPES

RATE = 8000  # Hz
_BEEP_S, _GAP_S = 0.12, 0.06
_STEPS = (0, 4, 7, 10, 14, 17, 21, 24)  # semitones above 262 Hz, of the colors in their order
PITCHES = {color: 261.6 * 2 ** (step / 12) for color, step in zip(COLORS, _STEPS, strict=True)}
_LOUDNESS = {"small": 0.35, "large": 0.7}


def encode(scene: dict[str, Any]) -> bytes:
    """The wave file, PCM of 16 bits, of a scene as `vlp.data_tools.scenes.sample` describes it."""
    gap = np.zeros(round(_GAP_S * RATE))
    parts = [gap]
    for group in _in_order(scene):
        beep = _LOUDNESS[group["size"]] * _beep(PITCHES[group["color"]], group["shape"])
        parts += [beep, gap] * group["count"]
        parts.append(gap)

    samples = np.concatenate(parts)
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(RATE)
        writer.writeframes((samples * 32767).astype("<i2").tobytes())
    return file.getvalue()


def _in_order(scene: dict[str, Any]) -> list[dict[str, Any]]:
    """The groups as they are heard: what is left or above comes first."""
    groups: list[dict[str, Any]] = scene["groups"]
    return groups[::-1] if scene["relation"] in ("right", "below") else groups


def _beep(hertz: float, shape: str) -> np.ndarray:
    """One tone in [−1, 1], that begins and ends in silence."""
    times = np.arange(round(_BEEP_S * RATE)) / RATE
    share = times / _BEEP_S
    turns = hertz * times
    forms = {
        "circle": lambda: np.sin(2 * np.pi * turns),
        "square": lambda: np.sign(np.sin(2 * np.pi * turns)),
        "triangle": lambda: 2 * np.abs(2 * (turns % 1) - 1) - 1,
        "star": lambda: 2 * (turns % 1) - 1,
        # Loudness that trembles, then pitch that rises and pitch that falls.
        "heart": lambda: np.sin(2 * np.pi * turns) * (1 + np.sin(2 * np.pi * 50 * times)) / 2,
        "cross": lambda: np.sin(2 * np.pi * turns * (1 + 0.25 * share)),
        "diamond": lambda: np.sin(2 * np.pi * turns * (1 - 0.2 * share)),
        "ring": lambda: np.sin(2 * np.pi * turns) * np.sin(2 * np.pi * 6.3 * turns),
    }
    assert forms.keys() == SHAPES.keys()
    # Without the edges every beep would click alike.
    edge = np.minimum(1, np.minimum(share, 1 - share) * 12)
    return forms[shape]() * edge
