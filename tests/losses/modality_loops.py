"""Objectives over more than two modalities as loops over their equations, for test_family.py."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from tests.losses.one_file_loops import Inputs, Loop
from vlp.losses._draws import draws
from vlp.seeds import derive


def complete(d: Inputs) -> list[int]:
    """The samples that have all modalities."""
    samples = range(len(d["text"]))
    if "others" not in d or "others_valid" not in d:
        return list(samples)
    return [i for i in samples if d["others_valid"][:, i].all()]


def modalities_of(d: Inputs) -> list[Tensor]:
    return [d["text"], d["image"], *d.get("others", ())]


def gram(smoothing: float = 0.0, epsilon: float = 1e-6) -> Loop:
    """From the determinant of every Gram matrix, [n, n, k, k] of them."""

    def volume(vectors: list[Tensor]) -> Tensor:
        rows = torch.stack(vectors)
        return torch.linalg.det(rows @ rows.T).clamp(min=epsilon).sqrt()

    def loop(d: Inputs) -> Tensor:
        text, *columns = modalities_of(d)
        kept, total = complete(d), 0 * d["text"].sum()
        z = {
            (i, j): -d["scale"] * volume([text[i], *(rows[j] for rows in columns)])
            for i, j in itertools.product(kept, repeat=2)
        }
        for i in kept:
            for scores in ([z[i, j] for j in kept], [z[j, i] for j in kept]):
                log_p = torch.stack(scores).log_softmax(0)
                own = log_p[kept.index(i)]
                total = total - ((1 - smoothing) * own + smoothing * log_p.mean())
        return total / (2 * max(len(kept), 1))

    return loop


def permutation(kept: list[int], n: int, modality: int, step: int) -> dict[int, int]:
    """Whose row stands at the place of each complete sample."""
    keys = next(draws(torch.arange(n), derive(0, "symile", modality, step), 1))[:, 0]
    return dict(zip(kept, sorted(kept, key=lambda i: keys[i].item()), strict=True))


def symile(negatives: str = "n", step: int = 0) -> Loop:
    def loop(d: Inputs) -> Tensor:
        modalities, kept = modalities_of(d), complete(d)
        n, total = len(d["text"]), 0 * d["text"].sum()
        order = [permutation(kept, n, m, step) for m in range(len(modalities))]
        for a, anchor in enumerate(modalities):
            rest = [m for m in range(len(modalities)) if m != a]
            if negatives == "n":
                tuples = [[order[m][j] for m in rest] for j in kept]
            else:
                tuples = [list(places) for places in itertools.product(kept, repeat=len(rest))]

            for i in kept:
                candidates = [[i] * len(rest)]
                candidates += [places for places in tuples if set(places) != {i}]
                scores = []
                for places in candidates:
                    product = anchor[i]
                    for m, place in zip(rest, places):
                        product = product * modalities[m][place]
                    scores.append(d["scale"] * product.sum())
                total = total - torch.stack(scores).log_softmax(0)[0]
        return total / (max(len(kept), 1) * len(modalities))

    return loop


def modality_pairs(chosen: list[tuple[int, int]]) -> Loop:
    """Pairs by the places of the modalities: image, text, and further ones."""

    def loop(d: Inputs) -> Tensor:
        rows, total = [d["image"], d["text"], *d["others"]], 0
        everywhere = torch.ones(len(d["text"]), dtype=torch.bool)
        present = [everywhere, everywhere, *d["others_valid"]]
        for a, b in chosen:
            kept = [i for i in range(len(d["text"])) if present[a][i] and present[b][i]]
            z = d["scale"] * (rows[a][kept] @ rows[b][kept].T)
            log_p = z.log_softmax(1).diagonal() + z.log_softmax(0).diagonal()
            total = total - log_p.sum() / (2 * len(kept))
        return total

    return loop


def translation(match: str = "contrast", distance: str = "l2", cycle: float = 1.0) -> Loop:
    """Text to image, and to each further modality, and back."""
    norms = {
        "l2": lambda gap: (gap**2).sum().sqrt(),
        "squared": lambda gap: (gap**2).sum(),
        "l1": lambda gap: gap.abs().sum(),
    }

    def loop(d: Inputs) -> Tensor:
        n, total = len(d["text"]), 0
        rows, present = [d["text"], d["image"]], torch.ones(2, n, dtype=torch.bool)
        if "others" in d:
            rows, present = [*rows, *d["others"]], torch.cat([present, d["others_valid"]])
        for place in range(2 * (len(rows) - 1)):
            source, target = (0, 1 + place // 2)[:: 1 if place % 2 == 0 else -1]
            of_source = [i for i in range(n) if present[source][i]]
            kept = [i for i in of_source if present[target][i]]
            there, back = d["translated"][place], d["cycled"][place]

            for i in of_source:
                way_back = norms[distance](back[i] - rows[source][i])
                total = total + cycle * way_back / (2 * len(of_source))
            for i in kept:
                if match == "distance":
                    way = norms[distance](there[i] - rows[target][i])
                else:
                    by_row = d["scale"] * (rows[target][kept] @ there[i])
                    by_column = d["scale"] * (there[kept] @ rows[target][i])
                    own = d["scale"] * (there[i] @ rows[target][i])
                    way = (by_row.logsumexp(0) + by_column.logsumexp(0)) / 2 - own
                total = total + way / (2 * len(kept))
        return total

    return loop


CASES = [
    ("translation", {}, translation()),
    ("translation", {"distance": "squared", "cycle": 0.3}, translation("contrast", "squared", 0.3)),
    (
        "translation",
        {"match": "distance", "distance": "l1"},
        translation("distance", "l1"),
    ),
    ("modality_pairs", {}, modality_pairs(list(itertools.combinations(range(4), 2)))),
    ("modality_pairs", {"pairs": [["0", "text"], ["1", "0"]]}, modality_pairs([(2, 1), (3, 2)])),
    ("gram", {}, gram()),
    ("gram", {"label_smoothing": 0.1, "epsilon": 1e-3}, gram(0.1, 1e-3)),
    ("symile", {}, symile()),
    ("symile", {"negatives": "n_squared"}, symile("n_squared")),
]
