"""A scene → true sentences about it, and false ones that differ by as little as possible."""

from __future__ import annotations

import random
from typing import Any

from vlp.data_tools._english.shuffles import shuffles
from vlp.data_tools.scenes.words import COUNTED, NUMBERS, OPPOSITE, SHAPES

BESIDE = {
    "left": ["to the left of", "left of"],
    "right": ["to the right of", "right of"],
    "above": ["above"],
    "below": ["below"],
}
PLACE = {
    "left": "on the left",
    "right": "on the right",
    "above": "at the top",
    "below": "at the bottom",
}

# {g} a group with its number, {k} without, {b} the background, {is} agrees with the group
ONE_GROUP = {
    "short": ["{g}", "{g}", "{k}"],
    "plain": [
        "a picture of {g}",
        "there {is} {g}",
        "a picture of {k}",
        "a drawing with {g}",
        "{g} can be seen",
    ],
    "ground": [
        "{g} on a {b} background",
        "a picture of {g} on a {b} background",
        "a drawing of {k} on a {b} background",
    ],
    "long": [
        "on a {b} background there {is} {g}",
        "the background is {b} and in front of it there {is} {g}",
    ],
}
# {a} and {z}: the groups; {rel}: how {a} lies to {z}; {at_a}, {at_z}: where each lies
TWO_GROUPS = {
    "short": ["{a} and {z}", "{z} and {a}"],
    "plain": ["{a} {rel} {z}", "there {is} {a} {rel} {z}"],
    "converse": ["{z} {converse} {a}", "{a} {at_a} and {z} {at_z}"],
    "ground": ["{a} {rel} {z} on a {b} background", "{z} {converse} {a} on a {b} background"],
    "long": [
        "on a {b} background there {is} {a} {at_a} and {z} {at_z}",
        "a picture with a {b} background, which shows {a} {rel} {z}",
    ],
}
FULL = {  # templates of the retrieval set: everything that tells two pictures apart
    1: [
        "{g} on a {b} background",
        "on a {b} background there {is} {g}",
        "the background is {b} and in front of it there {is} {g}",
    ],
    2: [
        "{a} {rel} {z} on a {b} background",
        "on a {b} background there {is} {a} {at_a} and {z} {at_z}",
        "the background is {b}, with {z} {converse} {a}",
    ],
}


def phrase(group: dict[str, Any], *, sized: bool = False, digits: bool = False) -> str:
    """A group in words with its exact number: "an orange star", "four small red circles", "4 red
    circles".
    """
    n = group["count"]
    shape = group["shape"] if n == 1 else SHAPES[group["shape"]]
    words = f"{group['color']} {shape}"
    if sized:
        words = f"{group['size']} {words}"

    if n == 1:
        article = "an" if words[0] in "aeiou" else "a"
        return f"{article} {words}"
    return f"{n if digits else NUMBERS[n]} {words}"


def captions(scene: dict[str, Any], rng: random.Random, *, full: bool = False) -> list[str]:
    """Different true captions of a scene: five from short to long, or with `full` three that leave
    nothing out.
    """
    groups = scene["groups"]
    if full:
        return [_fill(template, scene, rng, sized=True) for template in FULL[len(groups)]]

    templates = ONE_GROUP if len(groups) == 1 else TWO_GROUPS
    chosen = [rng.choice(choices) for choices in templates.values()]

    # A picture of one group is also described by its kind alone, whatever the number.
    if len(groups) == 1:
        chosen.append("there {is} {k}" if "a picture of" in chosen[1] else "a picture of {k}")

    return [
        _fill(template, scene, rng, sized=rng.random() < 0.5, digits=rng.random() < 0.1)
        for template in chosen
    ]


def _fill(
    template: str,
    scene: dict[str, Any],
    rng: random.Random,
    *,
    sized: bool = False,
    digits: bool = False,
) -> str:
    groups, relation = scene["groups"], scene["relation"]
    texts = [phrase(group, sized=sized, digits=digits) for group in groups]
    first = groups[0]
    is_one = first["count"] == 1
    values = {
        "b": "{texture} {color}".format(**scene["background"]),
        "is": "is" if is_one else "are",
        "g": texts[0],
        "k": texts[0] if is_one else f"{first['color']} {SHAPES[first['shape']]}",
    }
    if not relation:
        return template.format(**values)

    # Both wordings are drawn whether the template has them or not, so that the random state after
    # a caption does not depend on its template.
    opposite = OPPOSITE[relation]
    values |= {
        "a": texts[0],
        "z": texts[1],
        "rel": rng.choice(BESIDE[relation]),
        "converse": rng.choice(BESIDE[opposite]),
        "at_a": PLACE[relation],
        "at_z": PLACE[opposite],
    }
    return template.format(**values)


def with_negatives(
    scene: dict[str, Any], kind: str, rng: random.Random
) -> tuple[str, list[tuple[str, str]]]:
    """A caption for the proof set `kind` and its (wrong caption, how it is wrong) pairs, none of
    them true of the scene.
    """
    proofs = {
        "counting": _counting,
        "binding": _binding,
        "relations": _relations,
        "order": _order,
    }
    return proofs[kind](scene, rng)


def _counting(scene: dict[str, Any], rng: random.Random) -> tuple[str, list[tuple[str, str]]]:
    template = rng.choice(["{g}", "a picture of {g}", "there are {g}", "{g} on a {b} background"])
    group = scene["groups"][0]
    right = _fill(template, scene, rng)

    others = [{**scene, "groups": [{**group, "count": n}]} for n in COUNTED if n != group["count"]]
    return right, [(_fill(template, other, rng), "replace_number") for other in others]


def _binding(scene: dict[str, Any], rng: random.Random) -> tuple[str, list[tuple[str, str]]]:
    """The groups exchange one property; the same words stand in both captions (but for plurals and
    articles).
    """
    template = rng.choice(["{a} and {z}", "a picture of {a} and {z}", "there {is} {a} and {z}"])
    a, z = scene["groups"]
    exchanged = [name for name in ("color", "count", "size") if a[name] != z[name]]

    # Each caption draws its own wording, the wrong ones too: no wording gives the right one away.
    def describe(groups: list[dict[str, Any]]) -> str:
        return _fill(template, {**scene, "groups": groups}, rng, sized="size" in exchanged)

    swaps = [
        (describe([{**a, name: z[name]}, {**z, name: a[name]}]), f"swap_{name}")
        for name in exchanged
    ]
    # The wrong ones first: the random state is drawn in this order.
    return describe([a, z]), swaps


def _relations(scene: dict[str, Any], rng: random.Random) -> tuple[str, list[tuple[str, str]]]:
    a, z = (phrase(group) for group in scene["groups"])
    relation = scene["relation"]
    lead = rng.choice(["", "a picture of "])
    if rng.random() < 0.5:  # said from the other side
        a, z, relation = z, a, OPPOSITE[relation]

    # "to the left of" beside "to the right of", "left of" beside "right of".
    which = rng.randrange(len(BESIDE[relation]))
    there, back = BESIDE[relation][which], BESIDE[OPPOSITE[relation]][which]
    right = f"{lead}{a} {there} {z}"
    replaced = f"{lead}{a} {back} {z}"
    swapped = f"{lead}{z} {there} {a}"
    return right, [(replaced, "replace_relation"), (swapped, "swap_groups")]


def _order(scene: dict[str, Any], rng: random.Random) -> tuple[str, list[tuple[str, str]]]:
    # Exchanging the groups of "A and B", or the halves of "there are A above B", would give another
    # true caption.
    template = rng.choice(["{a} {rel} {z}", "a picture of {a} {rel} {z}"])
    right = _fill(template, scene, rng)
    return right, [(text, kind) for kind, text in shuffles(right, rng).items()]
