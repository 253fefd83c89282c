"""`vlp data counting`: shards → shards of counting pairs, for the term `counting` (arXiv
2302.12066).

Kept are samples with a caption that counts something from two to ten, in words or digits; each
keeps that one caption, so that picture, caption and counterfactuals belong together, and the
negatives that are not of other captions. Written fields:
    counterfactuals     the caption with other numbers, in random order
    counterfactuals_of  0 for each of them: the number of the caption that it was made from, beside
                        which alone it is used
    number              the number in the caption
    all_captions        the captions that the sample came with

A caption's number must count a plural noun exactly: no measure, range, bound, name or part of a
compound. With --detector, the picture must show as many objects of its most frequent class as the
caption says.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from vlp.data_tools._run import work

if TYPE_CHECKING:
    from vlp.data.members import Content
    from vlp.data_tools._run.shards import Changed

HELP = "select captions that count and add counterfactuals with other numbers"
EXAMPLE = """vlp data counting data/train --to data/counting --balance equal
  vlp data counting data/train --to data/counting --detector PekingU/rtdetr_r50vd --threshold 0.5
  vlp data counting data/train --print 50
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vlp data counting`."""
    add = parser.add_argument
    work.shards_arguments(parser, required=False)

    # What is written, and how much of it.
    add(
        "--counterfactuals",
        type=int,
        default=8,
        metavar="C",
        help="1 to 8 a sample (default: %(default)s)",
    )
    add(
        "--balance",
        default="none",
        metavar="HOW",
        help="none, equal (as many of each number as of the rarest), or the most",
    )

    # A model that must agree.
    add(
        "--detector",
        metavar="MODEL",
        help="object detector of transformers (name or folder) that must agree with the caption",
    )
    add(
        "--threshold",
        type=float,
        default=0.5,
        help="score from which a detected object counts (default: %(default)s)",
    )

    # How they are drawn and looked at.
    add("--seed", type=int, default=0, help="default: %(default)s")
    add(
        "--print",
        type=int,
        default=0,
        metavar="N",
        dest="n_print",
        help="print N captions to judge; without --to, write nothing",
    )
    work.arguments(parser)


@work.alone
def run(args: argparse.Namespace) -> int:
    """Survey the captions, balance, write the shards, and print what was kept, what was dropped and
    why.
    """
    from vlp.data.paths import expand
    from vlp.data.stored import destination
    from vlp.data_tools._run.carried import LEFT_BEHIND
    from vlp.data_tools._run.shards import claim, jobs, transform

    _check(args)
    sources, pool = expand(args.source), work.pool(args)
    detector = Detector(args.detector, args.threshold) if args.detector else None
    if args.n_print:
        print(work.printable(_examples(sources, detector, args.n_print, args.seed)))
    if not args.to:
        return 0

    folder = destination(args.to)
    settings = {"counterfactuals": args.counterfactuals, "balance": args.balance, "seed": args.seed}
    settings |= {"detector": args.detector, "threshold": args.threshold if args.detector else None}
    claim(folder, "counting", sources, settings)

    # What is balanced are the numbers of all shards, so all are surveyed before one is written.
    survey = partial(_survey, detector=detector)
    survey_pool = pool.of_model("auto") if detector else pool
    surveyed = work.carry_out("survey", jobs(sources, folder, "survey"), survey, survey_pool)
    if not work.all_done(surveyed):
        return 0
    counts = work.total(surveyed)
    # JSON made lists of the tuples.
    kept: list[Kept] = [[tuple(entry) for entry in result["kept"]] for result in surveyed]
    chosen = balance(kept, args.balance, args.seed)
    n_kept = sum(len(entries) for entries in kept)
    n_chosen = sum(len(keys) for keys in chosen)
    if not n_chosen:
        print(work.report(counts, f"{folder}:"), file=sys.stderr)
        raise ValueError(
            f"no caption in {args.source} counts anything from two to ten; "
            "the reasons are listed above"
        )

    change = MakePairs(chosen, args.counterfactuals, args.seed)
    written = work.total(transform(sources, folder, "counting", change, pool))

    # "samples read" and the like are counted by the survey already.
    for name, n in written.items():
        if name.startswith(("number", "samples written", LEFT_BEHIND)):
            counts[name] += n
    counts["dropped: beyond the balance"] = n_kept - n_chosen
    print(work.report(counts, f"{folder}:"))
    return 0


def _check(args: argparse.Namespace) -> None:
    if not args.to and not args.n_print:
        raise ValueError(
            "nothing to do: name --to DIR to write shards, or --print N to look at captions"
        )

    # Checked now, because a survey with a detector may take hours.
    if not 1 <= args.counterfactuals <= 8:
        raise ValueError(
            f"--counterfactuals is {args.counterfactuals}; "
            "there are 1 to 8 other numbers from two to ten"
        )
    is_number = args.balance.isdigit() and int(args.balance) > 0
    if args.balance not in ("none", "equal") and not is_number:
        raise ValueError(
            f"--balance is {args.balance!r}; expected none, equal, or a number of samples"
        )
    if not 0 < args.threshold < 1:
        raise ValueError(f"--threshold {args.threshold} must lie in (0, 1)")


class Detector(NamedTuple):
    """A model that must agree with a caption's number."""

    model: str
    threshold: float  # score from which an object counts


def select(
    sample: Content, detector: Detector | None, counts: Counter[str]
) -> tuple[int, int] | None:
    """(index of the first usable caption, its number), or None; `counts` learns why captions and
    samples are dropped.
    """
    from vlp.data_tools._english import numbers

    counting: list[tuple[int, int]] = []
    for i, caption in enumerate(sample.captions):
        exact, refused = numbers.counts(caption)
        counts["captions read"] += 1
        if not exact:
            counts.update(f"captions dropped: {reason}" for reason in set(refused))

        # "two dogs and three cats" would have to say which number is wrong.
        if len({count.value for count in exact}) > 1:
            counts["captions dropped: several numbers"] += 1
        elif exact:
            counting.append((i, exact[0].value))
        elif not refused:
            counts["captions dropped: no number from two to ten"] += 1
    counts["captions that count"] += len(counting)

    if not counting:
        counts["dropped: no caption counts"] += 1
        return None
    if len({number for _, number in counting}) > 1:
        counts["dropped: the captions' numbers differ"] += 1
        return None
    first = counting[0]
    if detector and not _detects(sample, first[1], detector, counts):
        return None
    return first


def _detects(sample: Content, number: int, detector: Detector, counts: Counter[str]) -> bool:
    """Whether the detector sees as many objects of the most frequent class; else it is counted."""
    from vlp.data_tools.counting.detector import most_frequent

    # The class does not matter: captions name things in other words than detectors.
    detected = most_frequent(sample.image, *detector)
    if detected is None:
        counts["dropped: no readable picture"] += 1
        return False

    label, n = detected
    if n == number:
        return True
    if label:
        counts["dropped: the detector counts another number"] += 1
    else:
        counts["dropped: the detector sees nothing"] += 1
    return False


Kept = list[tuple[str, int, int]]  # key, index of the caption, number


def _survey(job: tuple[int, Path], *, detector: Detector | None) -> work.Result:
    """What a shard offers; kept on disk, because a detector may take hours for it."""
    from vlp.data_tools._run.shards import samples

    _, path = job
    counts: Counter[str] = Counter()
    # The number as well, because balancing must not read the shards again.
    kept: Kept = []
    for sample in samples(path, counts):
        chosen = select(sample, detector, counts)
        if chosen is not None:
            kept.append((sample.key, *chosen))
    return {"kept": kept, "counts": counts}


def balance(surveyed: list[Kept], how: str, seed: int) -> list[dict[str, tuple[int, int]]]:
    """For every shard, key → (caption, number) of the samples that stay; which ones is random but
    fixed by the seed.
    """
    entries = []
    for shard, kept in enumerate(surveyed):
        entries += [(shard, *entry) for entry in kept]

    n_of_number = Counter(number for *_, number in entries)
    if how == "equal" and len(n_of_number) < 9:
        missing = [str(n) for n in range(2, 11) if n not in n_of_number]
        raise ValueError(
            f"--balance equal, but no caption counts {', '.join(missing)}; "
            "give the most of each number instead"
        )

    if how.isdigit():
        most = int(how)
    elif how == "equal":
        most = min(n_of_number.values(), default=0)
    else:
        most = len(entries)

    # By a hash of shard and key, so that the choice does not depend on who surveyed first.
    def place(entry: tuple[int, str, int, int]) -> float:
        shard, key, *_ = entry
        return random.Random(f"{seed}/{(shard, key)}").random()

    result: list[dict[str, tuple[int, int]]] = [{} for _ in surveyed]
    n_taken: Counter[int] = Counter()
    for shard, key, caption, number in sorted(entries, key=place):
        if n_taken[number] < most:
            n_taken[number] += 1
            result[shard][key] = (caption, number)
    return result


@dataclass
class MakePairs:
    """The change of a shard's samples (see `vlp.data_tools._run.shards.Change`)."""

    chosen: list[dict[str, tuple[int, int]]]  # a shard: key → (caption, number)
    n_counterfactuals: int
    seed: int

    def __call__(
        self, samples: Iterable[Content], shard: int, counts: Counter[str]
    ) -> Iterator[Changed]:
        from vlp.data_tools._belonging import keep_captions
        from vlp.data_tools._run.shards import Changed

        chosen = self.chosen[shard]
        for sample in samples:
            if sample.key not in chosen:
                continue
            i, number = chosen[sample.key]
            caption = sample.captions[i]
            rng = random.Random(f"{self.seed}/{sample.key}")
            texts = wrong_counts(caption, rng)[: self.n_counterfactuals]
            counts[f"number {number:2}"] += 1

            # All captions stay beside it, so that nothing of the input is lost.
            fields = {"counterfactuals": texts, "counterfactuals_of": [0] * len(texts)}
            fields |= {"number": number, "all_captions": list(sample.captions)}
            keep_captions(sample, [i], counts)
            yield Changed(sample, [caption], {**sample.meta, **fields})


def wrong_counts(caption: str, rng: random.Random) -> list[str]:
    """The caption with each of the eight other numbers, in random order; a number that stands twice
    changes twice.
    """
    from vlp.data_tools._english.numbers import counterfactuals, counts

    exact, _ = counts(caption)
    texts = counterfactuals(caption, exact)
    return rng.sample(texts, len(texts))


def _examples(sources: list[Path], detector: Detector | None, n: int, seed: int) -> str:
    """--print's captions, each with its number and one counterfactual below it."""
    from vlp.data_tools._run.shards import samples

    rng = random.Random(seed)
    examples = []
    for path in sources:
        for sample in samples(path, Counter()):
            chosen = select(sample, detector, Counter())
            if chosen is None:
                continue
            i, number = chosen
            caption = sample.captions[i]
            examples.append(f"{number:2}  {caption}\n    {wrong_counts(caption, rng)[0]}\n")
    return "\n".join(rng.sample(examples, min(n, len(examples))))
