"""Objectives over patches and tokens as loops over their equations, for test_family.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.losses.family_data import CANDIDATES, K
from tests.losses.one_file_loops import Inputs, Loop, log_sum


def patches_of(d: Inputs, i: int) -> list[Tensor]:
    places = range(d["image_tokens"].shape[1])
    valid = d.get("image_tokens_valid")
    return [d["image_tokens"][i, m] for m in places if valid is None or valid[i, m]]


def tokens_of(d: Inputs, i: int) -> list[Tensor]:
    places = range(d["text_tokens"].shape[1])
    return [d["text_tokens"][i, m] for m in places if d["text_tokens_valid"][i, m]]


def negative_tokens_of(d: Inputs, i: int, k: int) -> list[Tensor]:
    places = range(d["negative_tokens"].shape[2])
    return [d["negative_tokens"][i, k, m] for m in places if d["negative_tokens_valid"][i, k, m]]


def attended(word: Tensor, patches: list[Tensor], attention: str) -> Tensor:
    """What a token sees of a picture, a unit row."""
    similarities = torch.stack([(word @ patch).detach() for patch in patches])
    least, most = min(similarities), max(similarities)
    shares = (similarities - least) / (most - least) if most > least else similarities * 0 + 1
    weights = shares.softmax(0) if attention == "softmax" else shares / sum(shares)
    return F.normalize(sum(a * patch for a, patch in zip(weights, patches)), dim=0)


def fsc(gamma: float, smoothing: float, attention: str = "minmax") -> Loop:
    def loop(d: Inputs) -> Tensor:
        total, n = 0, 0
        for i in CANDIDATES:
            texts = [negative_tokens_of(d, i, k) for k in range(K) if d["negatives_valid"][i, k]]
            texts = [tokens_of(d, i), *(words for words in texts if words)]
            patches = patches_of(d, i)
            if len(texts) == 1 or not texts[0] or not patches:
                continue

            scores = [
                log_sum([d["scale"] * (w @ attended(w, patches, attention)) for w in words])
                for words in texts
            ]
            for k, score in enumerate(scores):
                log_p = score - log_sum(scores)
                y = (1 - smoothing) * (k == 0) + smoothing / len(scores)
                total = total - y * (1 - torch.exp(log_p)) ** gamma * log_p
            n += 1
        return total / n

    return loop


CASES = [
    ("fsc", {}, fsc(2, 0.02)),
    ("fsc", {"attention": "softmax", "focal": 0, "smoothing": 0}, fsc(0, 0, "softmax")),
]
