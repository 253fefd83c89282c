"""Objectives over patches and tokens as loops over their equations, for test_family.py."""

from __future__ import annotations

import math

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


def contrast(d: Inputs, live: list[int], of_images: dict, of_texts: dict) -> Tensor:
    """InfoNCE on scores of the samples that take part."""
    total = 0
    for i in live:
        rows = [d["scale"] * of_images[i, j] for j in live]
        columns = [d["scale"] * of_texts[j, i] for j in live]
        positives = d["scale"] * (of_images[i, i] + of_texts[i, i])
        total = total + log_sum(rows) + log_sum(columns) - positives
    return total / (2 * len(live))


def filip(apart: bool = False, keep: float = 1.0) -> Loop:
    def loop(d: Inputs) -> Tensor:
        patches = {i: patches_of(d, i) for i in CANDIDATES}
        words = {i: tokens_of(d, i) for i in CANDIDATES}
        live = [i for i in CANDIDATES if patches[i] and words[i]]
        if keep < 1:
            patches, words = best(patches, words, keep), best(words, patches, keep)

        of_images, of_texts = {}, {}
        for i in live:
            for j in live:
                scores = torch.stack([torch.stack([v @ w for w in words[j]]) for v in patches[i]])
                a, b = scores.max(1).values.mean(), scores.max(0).values.mean()
                of_images[i, j] = a if apart else (a + b) / 2
                of_texts[i, j] = b if apart else (a + b) / 2
        return contrast(d, live, of_images, of_texts)

    return loop


def best(places: dict, others: dict, share: float) -> dict:
    """Of each sample the share of places with the highest maximum over all of the other side."""
    candidates = [other for rows in others.values() for other in rows]

    def highest(place: Tensor) -> float:
        return max((place @ other).item() for other in candidates)

    return {
        i: sorted(rows, key=highest, reverse=True)[: math.ceil(share * len(rows))]
        for i, rows in places.items()
    }


def mil(gamma: float) -> Loop:
    def loop(d: Inputs) -> Tensor:
        patches = {i: patches_of(d, i) for i in CANDIDATES}
        sentences = {
            i: [d["captions"][i, k] for k in range(K) if d["captions_valid"][i, k]]
            for i in CANDIDATES
        }
        live = [i for i in CANDIDATES if patches[i] and sentences[i]]
        scores = {}
        for i in live:
            for j in live:
                of_sentences = [
                    log_sum([gamma * (patch @ sentence) for patch in patches[i]]) / gamma
                    for sentence in sentences[j]
                ]
                scores[i, j] = sum(of_sentences) / len(of_sentences)
        return contrast(d, live, scores, scores)

    return loop


def prior(patch_weight: float = 1.0) -> Loop:
    def loop(d: Inputs) -> Tensor:
        total, n = 0, 0
        for i in CANDIDATES:
            live = [k for k in range(K) if d["captions_valid"][i, k]]
            if not live:
                continue
            text, seen = d["captions"][i], d["attended_captions"][i]
            z = {(k, m): d["region_scale"] * (text[k] @ seen[m]) for k in live for m in live}
            for k in live:
                rows, columns = [z[k, m] for m in live], [z[m, k] for m in live]
                of_sentence = log_sum(rows) + log_sum(columns) - 2 * z[k, k]
                total = total + of_sentence / (2 * len(live))
            total, n = total + patch_weight * d["patch_distances"][i], n + 1
        return total / n

    return loop


CASES = [
    ("fsc", {}, fsc(2, 0.02)),
    ("fsc", {"attention": "softmax", "focal": 0, "smoothing": 0}, fsc(0, 0, "softmax")),
    ("filip", {}, filip()),
    ("filip", {"scores": "apart"}, filip(apart=True)),
    ("mil", {}, mil(10)),
    ("prior", {}, prior()),
    ("prior", {"patch_weight": 0}, prior(0)),
]
