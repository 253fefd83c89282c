"""(seed, split, index) → the exact scene: what is in the picture and where. Pure and independent of
Pillow.
"""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

from vlp.data_tools.scenes.words import (
    BACKGROUNDS,
    COUNTED,
    HELDOUT_COUNTS,
    HELDOUT_KINDS,
    KINDS,
    OPPOSITE,
    SIZES,
    TEXTURES,
    TRAINED_KINDS,
    heldout,
    side_of,
)

GAP = 0.02  # free space around every object, as a share of the picture's side
# Pairs show small numbers more often; single groups make up for it, so that training sees two to
# ten about equally often.
SINGLE_COUNTS = (4, 3, 5, 7, 8, 10, 11, 13, 14, 25)
ANGLES = (-12, -6, 0, 6, 12)  # degrees: few, so that masks are drawn once and pasted often

Group = dict[str, Any]  # count, size, color, shape


def sample(index: int, seed: int, split: str) -> dict[str, Any]:
    """Scene `index` of a split: {"background", "groups", "relation", "objects"}; see
    `vlp.data_tools.scenes`.
    """
    rng = random.Random(f"{seed}/{split}/{index}")

    # A draw that belongs to another split is drawn anew.
    while True:
        groups, relation = SPLITS[split](rng, index)
        color, texture = rng.choice(list(BACKGROUNDS)), rng.choice(TEXTURES)
        background: dict[str, Any] = {"color": color, "texture": texture}
        if _belongs(split, index, background, groups, relation):
            break

    background["offset"] = [round(rng.random(), 3), round(rng.random(), 3)]
    objects = _arrange(rng, groups, relation)
    return {
        "background": background,
        "groups": groups,
        "relation": relation,
        "objects": objects,
    }


def _belongs(
    split: str, index: int, background: dict[str, Any], groups: list[Group], relation: str | None
) -> bool:
    """Whether a scene may be shown in a split: novel combinations where they are wanted, and else
    the description's own side.
    """
    is_novel, wants = bool(heldout(groups)), wants_novel(split, index)
    if is_novel or wants:
        return is_novel and wants

    # Evaluation sets show what the test split could.
    side = split if split in ("train", "val") else "test"
    return side_of(background, groups, relation) == side


def wants_novel(split: str, index: int) -> bool:
    """Whether this scene shows a combination that training never does: all of `heldout`, every
    third of `counting`.
    """
    if split == "counting":
        return index // len(COUNTED) % 3 == 2
    return split in ("heldout", "novel_zeroshot")


def _group(rng: random.Random, count: int, kind: tuple[str, str], large_up_to: int) -> Group:
    size = rng.choice(list(SIZES)) if count <= large_up_to else "small"
    return {"count": count, "size": size, "color": kind[0], "shape": kind[1]}


def _single(rng: random.Random, index: int) -> tuple[list[Group], None]:
    count = rng.choices(range(1, 11), SINGLE_COUNTS)[0]
    return [_group(rng, count, rng.choice(KINDS), large_up_to=4)], None


def _pair(rng: random.Random, index: int) -> tuple[list[Group], str]:
    """Two groups of different kinds, ten objects at most."""
    first = rng.randint(1, 9)
    second = rng.randint(1, 10 - first)
    counts = rng.sample([first, second], 2)
    kinds = rng.sample(KINDS, 2)

    # A large group leaves room for one row or column of small objects.
    large_up_to = 0 if max(counts) > 4 else 2
    groups = [_group(rng, n, kind, large_up_to) for n, kind in zip(counts, kinds)]
    return groups, rng.choice(list(OPPOSITE))


def _mixed(rng: random.Random, index: int) -> tuple[list[Group], str | None]:
    draw = _single if rng.random() < 0.5 else _pair
    return draw(rng, index)


def _pair_of_two_kinds(rng: random.Random, index: int) -> tuple[list[Group], str]:
    """A pair whose colors and shapes both differ and may be exchanged without leaving what training
    shows.
    """
    while True:
        (a, b), relation = _pair(rng, index)
        if a["color"] == b["color"] or a["shape"] == b["shape"]:
            continue

        # The wrong captions must be of a kind that training shows, or they were told by that.
        exchanged = [{**a, "color": b["color"]}, {**b, "color": a["color"]}]
        exchanged += [{**a, "count": b["count"]}, {**b, "count": a["count"]}]
        if not heldout(exchanged):
            return [a, b], relation


def _classified(kinds: list[tuple[str, str]]) -> Any:
    """Single-kind scenes of several objects, the kinds in turn, so that every class has as many
    scenes.
    """

    def draw(rng: random.Random, index: int) -> tuple[list[Group], None]:
        kind = kinds[index % len(kinds)]
        return [_group(rng, rng.randint(2, 6), kind, large_up_to=4)], None

    return draw


def _counting(rng: random.Random, index: int) -> tuple[list[Group], None]:
    """Small objects of one kind, the numbers two to ten in turn; where a novel scene is due, by its
    count alone.
    """

    count = COUNTED[index % len(COUNTED)]
    novel = wants_novel("counting", index)
    kinds = [kind for kind in TRAINED_KINDS if ((count, kind[1]) in HELDOUT_COUNTS) == novel]

    # Small, so that the size of an object does not tell how many there are.
    return [_group(rng, count, rng.choice(kinds), large_up_to=0)], None


SPLITS = {
    "train": _mixed,
    "val": _mixed,
    "test": _mixed,
    "heldout": _mixed,
    "retrieval": _mixed,
    "zeroshot": _classified(TRAINED_KINDS),
    "novel_zeroshot": _classified(sorted(HELDOUT_KINDS)),
    "counting": _counting,
    "binding": _pair_of_two_kinds,
    "relations": _pair_of_two_kinds,
    "order": _pair_of_two_kinds,
}


def _arrange(rng: random.Random, groups: list[Group], relation: str | None) -> list[dict[str, Any]]:
    """Places every object: groups on their sides of a cut through the picture, objects in jittered
    cells of a grid.
    """
    diameters = [round(rng.uniform(*SIZES[group["size"]]), 4) for group in groups]

    # The areas first: everything is drawn from one random state, in this order.
    areas = _areas(rng, groups, diameters, relation)
    placed = []
    for group, diameter, area in zip(groups, diameters, areas):
        for x, y in _cells(rng, group["count"], diameter + GAP, area):
            placed.append(
                {
                    "shape": group["shape"],
                    "color": group["color"],
                    "size": group["size"],
                    "x": round(x, 4),
                    "y": round(y, 4),
                    "diameter": diameter,
                    "angle": rng.choice(ANGLES),
                }
            )
    return placed


def _areas(
    rng: random.Random, groups: list[Group], diameters: list[float], relation: str | None
) -> list[tuple[float, ...]]:
    """One rectangle (x, y, width, height) a group; the cut lies anywhere that leaves both groups
    enough room.
    """
    if relation is None:
        return [(0.0, 0.0, 1.0, 1.0)]

    # The depth that each group needs: its objects in full rows along the cut.
    needed = []
    for group, diameter in zip(groups, diameters):
        cell = diameter + GAP
        needed.append(math.ceil(group["count"] / int(1 / cell)) * cell)
    is_behind = relation in ("right", "below")  # the first group lies behind the cut
    if is_behind:
        needed.reverse()

    slack = 1 - sum(needed)
    cut = needed[0] + rng.uniform(0.2, 0.8) * slack
    spans = [(0.0, cut), (cut, 1 - cut)]
    if is_behind:
        spans.reverse()
    if relation in ("left", "right"):
        return [(start, 0.0, length, 1.0) for start, length in spans]
    return [(0.0, start, 1.0, length) for start, length in spans]


def _cells(
    rng: random.Random, count: int, cell: float, area: tuple[float, ...]
) -> list[tuple[float, float]]:
    """Centres of `count` objects, each in a cell of its own of a random grid that has enough of
    them.
    """
    x, y, width, height = area
    most_columns, most_rows = int(width / cell + 1e-6), int(height / cell + 1e-6)
    grids = [
        (columns, rows)
        for columns, rows in itertools.product(range(1, most_columns + 1), range(1, most_rows + 1))
        if columns * rows >= count
    ]
    columns, rows = rng.choice(grids)
    cell_width, cell_height = width / columns, height / rows

    # Anywhere in its cell where it touches no neighbour.
    centres = []
    for place in rng.sample(range(columns * rows), count):
        row, column = divmod(place, columns)
        across = rng.uniform(cell / 2, cell_width - cell / 2)
        down = rng.uniform(cell / 2, cell_height - cell / 2)
        centres.append((x + column * cell_width + across, y + row * cell_height + down))
    return centres
