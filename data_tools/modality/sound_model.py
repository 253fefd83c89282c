"""Sounds as the embedding that an audio model of transformers gives the whole of each: CLAP's and
any other that says how it pools (get_audio_features, or a pooler).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from vlp.data.further_members import Member
from vlp.data.sounds import decoded, resampled
from vlp.data_tools.modality.sounds import Sounds


@dataclass(frozen=True)
class SoundModel:
    """A model by name or folder; each process loads it when it first needs it."""

    model: str
    name: str
    seconds: float
    device: str = "auto"

    @property
    def shape(self) -> tuple[int, int]:
        return 1, _width(self.model, self.device)

    def settings(self) -> dict[str, Any]:
        return {
            "kind": "sound model",
            "model": self.model,
            "name": self.name,
            "seconds": self.seconds,
            "width": self.shape[1],
        }

    def members(self, of_sample: list[Member]) -> list[Member]:
        return Sounds(self.name, self.seconds, 1, 16_000).members(of_sample)

    def rows(self, files: list[bytes]) -> np.ndarray:
        _, extractor = _load(self.model, self.device)
        rate, samples = decoded(files[0])
        longest = math.ceil(self.seconds * rate)
        at_rate = resampled(samples[:longest], rate, extractor.sampling_rate)
        return embedding(self.model, self.device, at_rate)


def embedding(model: str, device: str, samples: np.ndarray) -> np.ndarray:
    """[1, D] unit rows of a sound at the model's rate; ValueError where the model does not pool."""
    import torch

    loaded, extractor = _load(model, device)
    inputs = extractor(samples, sampling_rate=extractor.sampling_rate, return_tensors="pt")
    inputs = inputs.to(next(loaded.parameters()).device)
    with torch.no_grad():
        of_audio = getattr(loaded, "get_audio_features", None)
        output = loaded(**inputs) if of_audio is None else of_audio(**inputs)
    # A tensor before transformers 5.
    rows = output if isinstance(output, torch.Tensor) else getattr(output, "pooler_output", None)
    if rows is None:
        raise ValueError(
            f"{model} is a {type(loaded).__name__}, which does not say how it pools a sound; "
            "expected CLAP or a model with a pooler, such as AST"
        )
    return torch.nn.functional.normalize(rows.float(), dim=-1).cpu().numpy()


@cache
def _width(model: str, device: str) -> int:
    _, extractor = _load(model, device)
    return embedding(model, device, np.zeros(extractor.sampling_rate, np.float32)).shape[1]


@cache
def _load(model: str, device: str) -> tuple[Any, Any]:
    """(model, feature extractor); ValueError where transformers cannot load them."""
    from transformers import AutoFeatureExtractor, AutoModel

    from vlp.joining import local_device
    from vlp.pretrained import places
    from vlp.pretrained.configurations import reason

    # No Hub is asked about a mistyped path.
    try:
        place = places.locate(model)
    except ValueError as error:
        raise ValueError(f"no model of sounds at {model!r}: {error}") from None

    try:
        extractor = AutoFeatureExtractor.from_pretrained(place, trust_remote_code=False)
        loaded = AutoModel.from_pretrained(place, trust_remote_code=False)
    except Exception as error:  # transformers', safetensors' and torch's own kinds
        raise ValueError(f"transformers cannot load {model}: {reason(error)}") from error
    if not hasattr(extractor, "sampling_rate"):
        raise ValueError(
            f"{model} reads no sounds, but with a {type(extractor).__name__}; expected an audio "
            "model, such as CLAP or AST"
        )
    return loaded.to(local_device(device, shared=True)).eval(), extractor
