"""Captions that are dropped or merged, with all that belongs to them.

To a caption belong its entry of `clip_scores` and the wrong captions that were made from it
(`vlp.data.wrong_captions`), each with its mask, its kind and its score. What was given for the
picture stays whatever its captions become. Malformed lists go, counted, once captions change.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

from vlp.data.captions import MAX_TEXT_BYTES
from vlp.data.members import Picture
from vlp.data.wrong_captions import GIVEN, LISTS, read
from vlp.data_tools._english.words import bare

if TYPE_CHECKING:
    from vlp.data.members import Content

# Lists with an entry for each wrong caption, and the entry of one for which nothing was written
# (None: there is none).
BESIDE: dict[str, dict[str, Any]] = {
    "negatives": {
        "negatives_valid": True,
        "negative_kinds": "given",
        "negative_scores": None,
        "negative_keys": None,
    },
    "counterfactuals": {},
}
MOST_CAPTIONS = 255  # of a sample: the index counts no further
MOST_BYTES = MAX_TEXT_BYTES // 4  # of the JSON of a merged sample


class Wrong(NamedTuple):
    """A wrong caption with what the JSON says of it."""

    text: str
    made_from: str | None  # a caption; None: given
    beside: dict[str, Any]  # its entries of the lists BESIDE
    picture: Picture | None = None  # an image that it is true of


def keep_captions(sample: Content, kept: list[int], counts: Counter[str]) -> None:
    """Leave the captions of these numbers and what belongs to them; wrong captions that name none
    stay.
    """
    captions = [sample.captions[i] for i in kept]
    scores = sample.meta.get("clip_scores")
    if isinstance(scores, list) and len(scores) == len(sample.captions):
        sample.meta["clip_scores"] = [scores[i] for i in kept]

    # Before `captions` changes: the numbers in the lists count the captions that are there now.
    for name in LISTS:
        if sample.meta.get(f"{name}_of") is None:
            continue
        wrong_captions = _wrong_captions(sample, name, counts)
        stay = [wrong for wrong in wrong_captions if wrong.made_from in (None, *captions)]
        _write(sample.meta, _lists(name, stay, captions, counts))
        if name == "negatives":
            sample.negative_images = _pictures(stay)

    sample.captions = tuple(captions)
    if "captions" in sample.meta:
        sample.meta["captions"] = captions


def settle(sample: Content, counts: Counter[str]) -> None:
    """Let numbers count the sample's captions: its JSON may hold blank ones, which are none."""
    written = sample.meta.get("captions")
    if isinstance(written, list) and len(written) != len(sample.captions):
        keep_captions(sample, list(range(len(sample.captions))), counts)


def merge(sample: Content, other: Content, counts: Counter[str]) -> bool:
    """Give a sample the captions of another of the same picture; whether all of them fit in.

    What belongs to the captions comes with them. Picture, key and all other fields are the sample's
    own; `merged_keys` names the others.
    """
    captions = list(dict.fromkeys([*sample.captions, *other.captions]))
    parts = [sample, other]

    # Into a copy: a sample that would grow too large stays as it is.
    meta = dict(sample.meta)
    pictures: dict[int, Picture] = {}
    merged_counts: Counter[str] = Counter()
    for name in LISTS:
        wrong_captions = _joined(name, parts, captions, merged_counts)
        if wrong_captions is not None:
            _write(meta, _lists(name, wrong_captions, captions, merged_counts))
        if wrong_captions is not None and name == "negatives":
            pictures = _pictures(wrong_captions)
    _write(meta, _joined_scores(parts, captions, merged_counts))
    meta["captions"] = captions
    meta["merged_keys"] = [*sample.meta.get("merged_keys", []), other.key]
    if len(captions) > MOST_CAPTIONS or len(json.dumps(meta)) > MOST_BYTES:
        return False

    n_new = len(captions) - len(sample.captions)
    merged_counts["merged: captions that the earlier sample did not have"] = n_new
    counts.update(merged_counts)
    sample.meta, sample.captions, sample.negative_images = meta, tuple(captions), pictures
    return True


def _write(meta: dict[str, Any], lists: dict[str, Any]) -> None:
    """Put lists into a sample's JSON, and take those out that are None; an empty one says nothing
    new.
    """
    for name, values in lists.items():
        if values is None:
            meta.pop(name, None)
        elif values or name in meta:
            meta[name] = values


def _pictures(wrong_captions: list[Wrong]) -> dict[int, Picture]:
    """The images of wrong captions by their places."""
    places = enumerate(wrong_captions)
    return {place: wrong.picture for place, wrong in places if wrong.picture is not None}


def _wrong_captions(sample: Content, name: str, counts: Counter[str]) -> list[Wrong]:
    """The wrong captions of a sample; where nothing says whose, they are its only caption's, else
    given.
    """
    wrong = read(sample.meta, name, sample.captions)
    if wrong.problem:
        counts[f"{name} dropped: {name}_of is malformed"] += 1
    made_from = wrong.made_from
    # Files of others have no `_of`; of a picture with one caption it is plain whose they are.
    if sample.meta.get(f"{name}_of") is None and len(sample.captions) == 1:
        made_from = [sample.captions[0]] * len(made_from)

    beside: list[dict[str, Any]] = [{} for _ in wrong.texts]
    for list_name in BESIDE[name]:
        values = sample.meta.get(list_name)
        if isinstance(values, list) and len(values) == len(beside):
            for entries, value in zip(beside, values):
                entries[list_name] = value
    images = sample.negative_images if name == "negatives" else {}
    pictures = [images.get(place) for place in range(len(beside))]
    return [Wrong(*row) for row in zip(wrong.texts, made_from, beside, pictures)]


def _lists(
    name: str, wrong_captions: list[Wrong], captions: list[str], counts: Counter[str]
) -> dict[str, Any]:
    """The lists that say this of a sample's wrong captions; None for one that it must not have."""
    # Backwards, so that a caption that stands twice is known by its first number.
    number: dict[str | None, int] = {None: GIVEN}
    for i, caption in reversed(list(enumerate(captions))):
        number[caption] = i

    lists: dict[str, Any] = {
        name: [wrong.text for wrong in wrong_captions],
        f"{name}_of": [number[wrong.made_from] for wrong in wrong_captions],
    }
    for list_name, missing in BESIDE[name].items():
        n_written = sum(list_name in wrong.beside for wrong in wrong_captions)
        is_whole = n_written == len(wrong_captions) or (n_written and missing is not None)
        lists[list_name] = None
        if is_whole:
            lists[list_name] = [wrong.beside.get(list_name, missing) for wrong in wrong_captions]
        elif n_written:
            counts[f"{list_name} dropped: not all copies have them"] += 1
    return lists


def _joined(
    name: str, parts: list[Content], captions: list[str], counts: Counter[str]
) -> list[Wrong] | None:
    """The wrong captions of all parts, each once; None where no part has any."""
    if not any(part.meta.get(name) for part in parts):
        return None

    # The same wrong caption of the same caption is one; one that the copy calls true is none.
    joined: dict[tuple[str, str | None], Wrong] = {}
    true = {bare(caption) for caption in captions}
    wrong_captions = [_wrong_captions(part, name, counts) for part in parts]
    for wrong in itertools.chain.from_iterable(wrong_captions):
        if bare(wrong.text) in true:
            counts[f"{name} dropped: a copy's caption says them"] += 1
        else:
            first = joined.setdefault((wrong.text, wrong.made_from), wrong)
            if first.picture is None:
                joined[wrong.text, wrong.made_from] = first._replace(picture=wrong.picture)
    return list(joined.values())


def _joined_scores(
    parts: list[Content], captions: list[str], counts: Counter[str]
) -> dict[str, Any]:
    """`clip_scores` of all captions, where all parts have one for each of theirs."""
    scores: dict[str, Any] = {}
    for part in parts:
        values = part.meta.get("clip_scores")
        if isinstance(values, list) and len(values) == len(part.captions):
            scores |= dict(zip(part.captions, values))

    if not scores:
        return {}

    # Scores of some captions only would be read as those of the first ones.
    if scores.keys() < set(captions):
        counts["clip_scores dropped: not all copies have them"] += 1
        return {"clip_scores": None}
    return {"clip_scores": [scores[caption] for caption in captions]}
