"""Decides from a scene's objects alone whether a sentence is true of it: a grammar of its own, no
code of the generator.

`truth` answers True, False, or None for what is no sentence of this small language (a word-order
shuffle, mostly).
"""

from __future__ import annotations

import re
from typing import Any

NUMBERS = dict(zip("one two three four five six seven eight nine ten".split(), range(1, 11)))
SINGULAR = {
    s + "s": s for s in ("circle", "square", "triangle", "star", "heart", "diamond", "ring")
} | {"crosses": "cross"}
# more than there are: false, not unknown
COLOR = "red|orange|yellow|green|blue|purple|white|black|pink|brown|gray|grey|teal|tan"
NOUN = "|".join([*SINGULAR, *SINGULAR.values()])
NUMBER = "an|a|" + "|".join(NUMBERS) + r"|\d+"
GROUP = rf"(?:(?:{NUMBER}) )?(?:(?:small|large) )?(?:{COLOR}) (?:{NOUN})\b"
GROUND = rf"(?P<texture>plain|striped|checkered|dotted|speckled) (?P<ground>{COLOR})"
PLACES = {
    "to the left of": "left",
    "left of": "left",
    "to the right of": "right",
    "right of": "right",
    "above": "above",
    "below": "below",
    "on the left": "left",
    "on the right": "right",
    "at the top": "above",
    "at the bottom": "below",
}
RELATION = "|".join(p for p in PLACES if p.endswith("of") or " " not in p)
PLACE = "|".join(p for p in PLACES if p.startswith(("on", "at")))
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}

LEADS = [r"there (?P<verb>is|are) ", r"a (?:picture|drawing) (?:of|with) ", ""]
TAILS = [rf" on a {GROUND} background", " can be seen", ""]
FRAMES = [
    (rf"on a {GROUND} background there (?P<verb>is|are) ", ""),
    (rf"the background is {GROUND} and in front of it there (?P<verb>is|are) ", ""),
    (rf"the background is {GROUND}, with ", ""),
    (rf"a picture with a {GROUND} background, which shows ", ""),
    *[(lead, tail) for lead in LEADS for tail in TAILS],
]
BODIES = [
    rf"(?P<a>{GROUP})",
    rf"(?P<a>{GROUP}) and (?P<z>{GROUP})",
    rf"(?P<a>{GROUP}) (?P<rel>{RELATION}) (?P<z>{GROUP})",
    rf"(?P<a>{GROUP}) (?P<at_a>{PLACE}) and (?P<z>{GROUP}) (?P<at_z>{PLACE})",
]
SENTENCES = [re.compile(head + body + tail) for head, tail in FRAMES for body in BODIES]


def truth(sentence: str, scene: dict[str, Any]) -> bool | None:
    """Whether the sentence holds of scene["objects"] and scene["background"]; None if it is no
    sentence.
    """
    for pattern in SENTENCES:
        if match := pattern.fullmatch(sentence):
            found = match.groupdict()
            answers: list[bool | None] = [_ground(found, scene)]
            members = [
                _members(found[name], scene, answers) for name in ("a", "z") if found.get(name)
            ]
            if found.get("verb"):
                answers.append((found["verb"] == "is") == (len(members[0]) == 1) or None)
            if found.get("rel"):
                answers.append(_lies(*members, PLACES[found["rel"]]))
            if found.get("at_a"):
                place = PLACES[found["at_a"]]
                answers.append(PLACES[found["at_z"]] == OPPOSITE[place] and _lies(*members, place))
            return False if False in answers else None if None in answers else True
    return None


def _ground(found: dict[str, str | None], scene: dict[str, Any]) -> bool:
    ground = scene["background"]
    return found.get("ground") is None or (found["ground"], found["texture"]) == (
        ground["color"],
        ground["texture"],
    )


def _members(text: str, scene: dict[str, Any], answers: list[bool | None]) -> list[dict[str, Any]]:
    """The objects that a group's words fit; appends whether number and grammar are right."""
    words = text.split()
    noun, color = words[-1], words[-2]
    size = next((w for w in words if w in ("small", "large")), None)
    kind = (SINGULAR.get(noun, noun), color)
    fitting = [
        o
        for o in scene["objects"]
        if (o["shape"], o["color"]) == kind and size in (None, o["size"])
    ]
    plural = noun in SINGULAR
    first = words[0]
    if first in ("a", "an"):
        answers.append(
            None if plural or (first == "an") != (words[1][0] in "aeiou") else len(fitting) == 1
        )
    elif first in NUMBERS or first.isdigit():
        n = NUMBERS.get(first) or int(first)
        answers.append(None if plural != (n != 1) else len(fitting) == n)
    else:
        answers.append(None if not plural else len(fitting) > 1)
    return fitting


def _lies(a: list[dict[str, Any]], z: list[dict[str, Any]], place: str) -> bool:
    """Whether every object of `a` lies beyond every object of `z` on the side `place`, edge to
    edge.
    """
    axis = "x" if place in ("left", "right") else "y"
    if place in ("right", "below"):
        a, z = z, a
    return bool(a and z) and max(o[axis] + o["diameter"] / 2 for o in a) < min(
        o[axis] - o["diameter"] / 2 for o in z
    )
