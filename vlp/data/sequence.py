"""How a run's sequence of samples is drawn, what it depends on, and what it leaves out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

from vlp.config import Data
from vlp.data.mix import Mixture
from vlp.data.sources import Source
from vlp.schema import plain

_FINGERPRINTS = "2:"  # before a digest of fingerprints that are made of the shards' digests


def drawing(
    data: Data, sources: Sequence[Source], rows: int, mixture: Callable[..., Mixture]
) -> dict[str, Any]:
    """How `mixture` is to draw, as far as it differs from whole epochs of single samples."""
    if rows % data.together:
        # The nearest size below, for a larger one may not fit into memory.
        near = max(data.together, rows // data.together * data.together)
        raise ValueError(
            f"data.together is {data.together}, which does not divide a rank's {rows} rows: "
            f"a group would cross to another rank; use a train.batch of {near} a rank"
        )

    options: dict[str, Any] = {}
    if data.together > 1:
        options["together"] = data.together
    if data.captions.choose == "all" and not data.captions.n_beside:
        options["every_caption"] = True
    if data.replacement:
        options["replacement"] = True
    if data.one_source:
        options["one_source"] = True
    lanes = _lanes(data, sources)
    if lanes > 1 and (data.lanes != "auto" or mixture is Mixture):
        options["lanes"] = lanes

    # A selection is a mixture of its own, which knows none of these.
    if options and mixture is not Mixture:
        raise ValueError(
            "a selection decides which samples a step holds; leave out data.together, "
            "data.replacement, data.one_source, data.lanes and captions.choose: all"
        )
    return options


def _lanes(data: Data, sources: Sequence[Source]) -> int:
    """The lanes of each batch (`vlp.data.lanes`): `data.lanes`, or as many as the widest window has
    shards. ValueError for lanes that no shards could be dealt to.
    """
    widest = max(source.window for source in sources)
    needless = ""
    if not widest:
        needless = "no source fetches its shards (name: remote)"
    elif not data.shuffle:
        needless = "data.shuffle is false: samples stay in the order of the data"
    elif data.one_source:
        needless = "data.one_source is true: a batch reads the shards of one source"
    elif any(source.reserve for source in sources):
        needless = "a source is a stream, which is read in its own order"

    if data.lanes == "auto":
        return 1 if needless else widest
    if needless and data.lanes > 1:
        raise ValueError(f"data.lanes is {data.lanes}, but {needless}; leave it out")
    return data.lanes


def too_few(mixture: Mixture, batch: int, together: int, batch_key: str) -> str:
    """What to say of data that do not fill one batch."""
    held = f"{mixture.n_samples} samples"
    if together > 1:
        held = f"{mixture.n_units} groups of {together}"
    if mixture.one_source:
        sizes = [len(units) for units in mixture.units]
        smallest = sizes.index(min(sizes))
        held = f"source {smallest} has {sizes[smallest]}, and data.one_source fills it from one"
    return f"a batch of {batch} is larger than the data ({held}); set {batch_key} lower"


def n_left_out(mixture: Mixture) -> int:
    """Samples that no batch will hold: unusable ones, and those of origins that are too small."""
    unusable = sum(source.n_left_out for source in mixture.sources)
    return unusable + sum(units.n_left_out for units in mixture.units)


def problems(mixture: Mixture) -> list[str]:
    """Sentences on what the sources left out or found odd."""
    sentences: list[str] = []
    for source in mixture.sources:
        sentences += source.problems()

    for s, units in enumerate(mixture.units):
        if units.n_left_out:
            sentences.append(
                f"source {s}: {units.n_left_out} samples of origins with fewer than "
                f"data.together = {mixture.together}"
            )
    return sentences


def identity(
    mixture: Mixture, data: Data, batch: int | list[list[int]], seed: int
) -> dict[str, Any]:
    """What the sequence of samples depends on, besides the step. `batch`: rows of all ranks, or
    the sizes with their first steps.
    """
    weights: list[str | None] = [None] * len(mixture.sources)
    if mixture.shares is not None:
        weights = [str(share) for share in mixture.shares]

    return {
        "samples": mixture.n_samples,
        "batch": batch,
        "seed": seed,
        "shuffle": data.shuffle,
        "weights": weights,
        "sources": sources_digest(mixture.sources),
        "captions": _short_digest(json.dumps(plain(data.captions))),
        **mixture.identity(),
    }


def comparable(
    mixture: Mixture, data: Data, identity: dict[str, Any], saved: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """An `identity`, and that of a checkpoint, `saved`, in one form, also of earlier versions.

    What the configuration leaves open, `mixture` does from here on as the saved run did.
    """
    identity, saved = dict(identity), dict(saved)
    before = str(saved.get("sources"))
    identity["sources"] = sources_digest(mixture.sources, like=before)

    if "lanes" in identity:
        # Before there were lanes, every batch was of one window, whose size was not kept.
        saved.setdefault("lanes", 1)
        saved.setdefault("windows", identity["windows"])
        if data.lanes == "auto":
            mixture.lay_out(saved["lanes"])
            identity["lanes"] = saved["lanes"]
    return identity, saved


def differences(identity: dict[str, Any], saved: dict[str, Any], step: int) -> list[str]:
    """In words, in what two comparable identities differ at `step`."""
    sentences = [
        f"{name} was {saved.get(name)!r}, is {identity.get(name)!r}"
        for name in identity | saved
        if saved.get(name) != identity.get(name)
    ]
    if saved.get("batch") != identity["batch"]:
        sentences.append(
            f"to go on with another batch from step {step} on, keep the one it had up "
            "to there as a stage, stages=[{duration: …}, {duration: …, batch: …}]"
        )
    return sentences


def sources_digest(sources: Sequence[Source], like: str | None = None) -> str:
    """A digest of the sources' fingerprints, of the kind that `like` is: a checkpoint's, which may
    be of the version before.
    """
    # Without a number: of all samples' columns, which a start does not read any more.
    if like is not None and not like.startswith(_FINGERPRINTS):
        return _short_digest("".join(source.earlier_fingerprint() for source in sources))
    return _FINGERPRINTS + _short_digest("".join(source.fingerprint() for source in sources))


def _short_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def of_another_version(differences: list[str]) -> str:
    """What to do where the files are the same, and another version of vlp reads them otherwise."""
    if not any(line.startswith("samples was") for line in differences):
        return ""
    return (
        ". Where neither files nor options changed, an earlier vlp left samples out whose captions "
        "are found now (CHANGELOG): that version continues the run"
    )
