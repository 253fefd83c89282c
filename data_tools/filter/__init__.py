"""`vlp data filter`: shards → the same shards without the samples and captions that a rule refuses,
counted by reason.

Rules about the picture or the sample drop the sample. Rules about captions drop captions, and the
sample with its last one. A score keeps the cosine of every caption that stays, in the JSON's
`clip_scores`.

Of DiHT's rules (complexity, action, text; arXiv 2301.02280) --min-relations and --action are rough
stand-ins for English captions, without a parser (see _english/traits.py); text in the picture is
not looked for, because that takes a text detector.
"""

from __future__ import annotations

import argparse
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlp.data_tools import _encoder
from vlp.data_tools._run import work
from vlp.data_tools.filter.conditions import refuse, refuse_unknown
from vlp.data_tools.filter.repeats import hash_of, too_common
from vlp.data_tools.filter.rules import Rules, rules_of

if TYPE_CHECKING:
    import numpy as np

    from vlp.data.members import Content
    from vlp.data_tools._encoder import Model
    from vlp.data_tools._run.shards import Changed

HELP = "keep what rules, a list or a model's score let pass; count the rest by reason"
EXAMPLE = """vlp data filter data/raw --to data/clean --min-side 200 --max-aspect 3
  vlp data filter data/raw --to data/clean --min-words 3 --languages en
  vlp data filter data/raw --to data/clean --max-repeats 10 --processes 8
  vlp data filter data/raw --to data/clean --keep "similarity > 0.28" --drop "punsafe >= 0.5"
  vlp data filter data/raw --to data/clean --drop "license in by-nc,unknown"
  vlp data filter data/raw --to data/clean --reject "https?://|©" --processes 8
  vlp data filter data/raw --to data/top --model ViT-B-32:laion2b_s34b_b79k --min-score 0.28
  vlp data filter data/pool --to data/subset --uids subset.npy      (DataComp's lists)
  vlp data filter data/raw --to data/cat --min-relations 1 --action
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vlp data filter`."""
    add = parser.add_argument
    add("source", help="shards: a folder, a tar, or a pattern with braces; several joined by ::")
    add(
        "--to",
        required=True,
        metavar="DIR",
        help="folder for the new shards; the same call goes on where one stopped",
    )

    # Rules about the picture.
    add("--min-side", type=int, default=0, metavar="PX", help="least length of the shorter side")
    add(
        "--max-aspect",
        type=float,
        default=0.0,
        metavar="R",
        help="most length of the longer side, in shorter ones",
    )

    # Rules about the sample's JSON.
    add(
        "--keep",
        action="append",
        default=[],
        metavar="RULE",
        help="keep what fulfils it: 'FIELD < NUMBER' (<= > >=), 'FIELD == VALUE' (!=), "
        "'FIELD in A,B', 'FIELD present' (absent), FIELD being one of the sample's JSON; "
        "a sample without that value is dropped; may be repeated",
    )
    add(
        "--drop",
        action="append",
        default=[],
        metavar="RULE",
        help="drop what fulfils it; a sample without that value stays; may be repeated",
    )
    add(
        "--uids",
        metavar="FILE",
        help="keep only these: .npy of DataComp (pairs of 64-bit halves), "
        ".txt with a uid or key a line",
    )

    # Rules about captions.
    add("--min-words", type=int, default=0, metavar="N", help="fewest words of a caption")
    add("--max-words", type=int, default=0, metavar="N", help="most words of a caption")
    add(
        "--match",
        default="",
        metavar="REGEX",
        help="what a caption must hold, with Python's syntax, searched anywhere",
    )
    add("--reject", default="", metavar="REGEX", help="what no caption may hold")
    add(
        "--max-repeats",
        type=int,
        default=0,
        metavar="N",
        help="most samples with one caption; takes 32 bytes a caption of memory",
    )

    # What a caption is like, by rough guesses.
    add(
        "--languages",
        default="",
        metavar="CODES",
        help="such as en,de; guessed by script and stop words, which is rough",
    )
    add(
        "--unclear",
        choices=("keep", "drop"),
        default="keep",
        help="captions whose language cannot be told, such as names and numbers "
        "(default: %(default)s)",
    )
    add(
        "--min-relations",
        type=int,
        default=0,
        metavar="N",
        help="fewest relations of things in a caption (DiHT's complexity)",
    )
    add("--action", action="store_true", help="a caption must say that something happens (DiHT)")

    # A model's score.
    add(
        "--min-score",
        type=float,
        metavar="X",
        help="least cosine of picture and caption under --model",
    )
    _encoder.arguments(parser)
    work.arguments(parser)


@work.alone
def run(args: argparse.Namespace) -> int:
    """Write the shards; print what stays and why the rest does not."""
    from vlp.data.paths import expand
    from vlp.data.stored import destination
    from vlp.data_tools._run.shards import claim, transform

    rules = rules_of(args)
    sources, pool, folder = expand(args.source), work.pool(args), destination(args.to)
    model = _encoder.Model.of(args)

    # A misspelled field would drop every sample, or none: it is refused before anything is written.
    refuse_unknown(rules.keep + rules.drop, _metas(sources))

    settings = asdict(rules)
    settings["uids"] = _digest(args.uids) if args.uids else ""  # its content, not its place
    settings |= model.settings() if model else {}
    claim(folder, "filter", sources, settings)

    # How often a caption occurs is known only once all shards are read.
    repeated = None
    if rules.max_repeats:
        repeated = too_common(sources, folder, rules.max_repeats, pool)
        if repeated is None:
            return 0

    # Every shard by itself, now that all that is shared is known.

    results = transform(sources, folder, "filter", Filter(rules, model, repeated), pool)
    counts = work.total(results)
    print(work.report(counts, f"{folder}:"))
    if work.all_done(results) and not counts["samples written"]:
        raise ValueError(f"no sample of {args.source} is left; the reasons are listed above")
    return 0


def _metas(sources: list[Path]) -> Iterator[dict[str, Any]]:
    """The JSON of all samples, one by one."""
    from vlp.data_tools._run.shards import samples

    for path in sources:
        yield from (sample.meta for sample in samples(path, Counter()))


@dataclass(frozen=True)
class Filter:
    """The change of a shard's samples (see `vlp.data_tools._run.shards.Change`)."""

    rules: Rules
    model: Model | None = None
    # sorted hashes of captions that too many samples have
    repeated: np.ndarray | None = field(default=None, repr=False)

    def __call__(
        self, samples: Iterable[Content], shard: int, counts: Counter[str]
    ) -> Iterator[Changed]:
        from vlp.data_tools._run.shards import Changed

        # Lazily: a shard's samples are held one at a time, or as many as a batch.
        passed = (sample for sample in samples if self._passes(sample, counts))
        if self.model:
            yield from self._scored(self.model, passed, counts)
            return
        for sample in passed:
            yield Changed(sample, list(sample.captions), sample.meta)

    def _passes(self, sample: Content, counts: Counter[str]) -> bool:
        """Whether a sample stays before its score; its captions become those that do."""
        reason = self.rules.refuse_sample(sample)
        reason = reason or refuse(sample.meta, self.rules.keep, self.rules.drop, counts)
        if reason:
            counts[f"dropped: {reason}"] += 1
            return False
        if not self.rules.about_captions():
            return True

        # A caption's own reason before the one that needs the other samples.
        reasons = [
            self.rules.refuse_caption(caption) or self._too_common(caption)
            for caption in sample.captions
        ]
        self._count_unclear(sample.captions, reasons, counts)
        return _keep(sample, reasons, counts)

    def _count_unclear(
        self, captions: tuple[str, ...], reasons: list[str], counts: Counter[str]
    ) -> None:
        """Say how many captions stay although their language may be none that is wanted."""
        from vlp.data_tools._english.traits import is_in

        if not self.rules.languages:
            return
        kept = [caption for caption, reason in zip(captions, reasons) if not reason]
        unclear = [caption for caption in kept if is_in(caption, self.rules.languages) is None]
        if unclear:  # else the report would show a line of 0
            name = "captions kept: language unclear (--unclear drop refuses them)"
            counts[name] += len(unclear)

    def _too_common(self, caption: str) -> str:
        import numpy as np

        # Most often there is nothing to look up.
        if self.repeated is None or not len(self.repeated):
            return ""
        hashed = hash_of(caption)
        place = np.searchsorted(self.repeated, hashed)
        is_repeated = place < len(self.repeated) and self.repeated[place] == hashed
        return f"in more than {self.rules.max_repeats} samples" if is_repeated else ""

    def _scored(
        self, model: Model, samples: Iterable[Content], counts: Counter[str]
    ) -> Iterator[Changed]:
        from vlp.data_tools._run.shards import Changed

        for batch, images in model.batches(samples, counts):
            # All captions of a batch in one pass, whoever has them.
            captions = list(chain.from_iterable(sample.captions for sample in batch))
            texts = model.encoder().encode_texts(captions).cpu()
            rows_of_samples = texts.split([len(sample.captions) for sample in batch])

            for sample, image, rows in zip(batch, images, rows_of_samples):
                if not image.any():
                    counts["dropped: no readable picture"] += 1
                    continue
                scores = [round(score, 4) for score in (rows @ image).tolist()]

                # In steps of .05, so that the report shows where a threshold would cut.
                counts.update(
                    f"captions with a score from {score // 0.05 * 0.05:+.2f}" for score in scores
                )

                reasons = [self._too_unlike(score) for score in scores]
                if _keep(sample, reasons, counts):
                    kept = [score for score, reason in zip(scores, reasons) if not reason]
                    meta = {**sample.meta, "clip_scores": kept}
                    yield Changed(sample, list(sample.captions), meta)

    def _too_unlike(self, score: float) -> str:
        assert self.rules.min_score is not None  # it goes together with the model
        return f"score below {self.rules.min_score:g}" if score < self.rules.min_score else ""


def _keep(sample: Content, reasons: list[str], counts: Counter[str]) -> bool:
    """Leave the captions without a reason to drop them; whether there is one."""
    from vlp.data_tools._belonging import keep_captions

    # What belongs to a caption that goes, such as its negatives, goes with it.
    counts.update(f"captions dropped: {reason}" for reason in reasons if reason)
    keep_captions(sample, [i for i, reason in enumerate(reasons) if not reason], counts)
    if not sample.captions:
        counts["dropped: no caption left" if reasons else "dropped: no caption"] += 1
    return bool(sample.captions)


def _digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
