"""`vlp data negatives`: shards → the same shards with hard-negative captions in every sample's
JSON.

Written fields, all of one length: at most K for each caption, in the order of the captions, after
those that were given.
    negatives        captions that are false of the picture
    negatives_valid  true for each of them: what is not valid is not written, and the loader pads to
                     K and masks
    negative_kinds   how each was made: swap_attribute, swap_noun, replace_attribute, replace_noun,
                     replace_number, replace_relation, order_*, masked, rewritten, or what --from
                     says ("given" where it says nothing)
    negatives_of     the number of the caption that each was made from, beside which alone it is
                     used; −1 where it was given for the picture: such a one is used beside every
                     caption, and counts for each of them
of: it becomes the sample's KEY.negative.jpg, which the form `triplet` of the term hard_negatives
needs.

Rules need no model and come from word lists (words.yaml). What is equal to a caption of the sample,
or says of it what another of its captions says too, is dropped and counted. Of a long caption the
first 1,200 characters are changed, which is more than text towers read.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlp.data.wrong_captions import GIVEN
from vlp.data_tools._run import work

if TYPE_CHECKING:
    from vlp.data.members import Content
    from vlp.data_tools._run.shards import Changed
    from vlp.data_tools.negatives.lexicon import Lexicon
    from vlp.data_tools.negatives.rules import Negative

HELP = "add hard-negative captions by rule, from a file, or by a language model"
EXAMPLE = """vlp data negatives data/train --to data/train_negatives --k 4
  vlp data negatives data/train --print 50
  vlp data negatives data/scenes/train --words scenes --to data/scenes/train_negatives
  vlp data negatives data/train --to data/llm --kinds none --from negatives.jsonl
"""
KINDS = (
    "swap_attribute",
    "swap_noun",
    "replace_attribute",
    "replace_noun",
    "replace_number",
    "replace_relation",
    "order",
)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vlp data negatives`."""
    add = parser.add_argument
    add("source", help="shards: a folder, a tar, or a pattern with braces; several joined by ::")
    add(
        "--to",
        metavar="DIR",
        help="folder for the new shards; a call with the same options goes on where one stopped",
    )
    add(
        "--k",
        type=int,
        default=4,
        metavar="K",
        help="most negatives a caption (default: %(default)s)",
    )
    add(
        "--kinds",
        default=",".join(KINDS),
        metavar="NAMES",
        help="rules, joined by commas, or none (default: %(default)s)",
    )
    add(
        "--words",
        metavar="FILE",
        help="other word lists (see data_tools/negatives/words.yaml); "
        "scenes: the words of `vlp data scenes`",
    )
    add(
        "--from",
        dest="given",
        metavar="FILE.jsonl",
        help='given negatives: {"key": …, "negatives": […], "kinds": […], '
        '"image": PATH of the first\'s} a line',
    )
    add(
        "--rewriter",
        metavar="MODEL",
        help="masked or causal language model of transformers (name or folder) for more negatives",
    )
    add(
        "--prompt",
        default="Rewrite the caption so that it is wrong in one detail.\n"
        "Caption: {}\nWrong caption:",
        help="what a causal rewriter continues; {} is the caption",
    )
    add("--seed", type=int, default=0, help="default: %(default)s")
    add(
        "--print",
        type=int,
        default=0,
        metavar="N",
        dest="n_print",
        help="print N negatives to judge; without --to, write nothing",
    )
    work.arguments(parser)


@work.alone
def run(args: argparse.Namespace) -> int:
    """Write the shards and print what was made, what was dropped and why."""
    from vlp.data.paths import expand
    from vlp.data_tools._run.shards import claim, transform

    if not args.to and not args.n_print:
        raise ValueError(
            "nothing to do: name --to DIR to write shards, or --print N to look at negatives"
        )
    sources, pool = expand(args.source), work.pool(args)
    change = _change(args)
    if args.n_print:
        print(work.printable(_examples(sources, change, args.n_print)))
    if not args.to:
        return 0

    folder = Path(args.to)
    claim(folder, "negatives", sources, change.settings())
    if args.rewriter:
        pool = replace(pool, processes=1)  # the model takes all cores
    results = transform(sources, folder, "negatives", change, pool)
    counts = work.total(results)

    # A mistyped key would go unnoticed; how many are left over is known once all shards are done.
    if change.given and work.all_done(results):
        counts["given: keys without a sample"] = len(change.given) - counts["given: keys used"]
    print(work.report(counts, f"{folder}:"))
    return 0
    return 0


def _change(args: argparse.Namespace) -> AddNegatives:
    from vlp.data_tools.negatives.lexicon import Lexicon
    from vlp.schema import did_you_mean

    kinds = () if args.kinds == "none" else tuple(args.kinds.split(","))
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"no rule {kind!r}{did_you_mean(kind, KINDS)}")
    if args.k < 1:
        raise ValueError(f"--k {args.k} must be at least 1")
    if "{}" not in args.prompt:
        raise ValueError(f"--prompt {args.prompt!r} lacks the {{}} that stands for the caption")

    given, images = read_given(Path(args.given)) if args.given else ({}, {})
    if not (kinds or given or args.rewriter):
        raise ValueError(
            "no source of negatives: leave --kinds at its default, or give --from or --rewriter"
        )
    return AddNegatives(
        k=args.k,
        kinds=kinds,
        seed=args.seed,
        lexicon=Lexicon.load(args.words),
        given=given,
        images=images,
        rewriter=args.rewriter,
        prompt=args.prompt,
    )


def read_given(path: Path) -> tuple[dict[str, list[tuple[str, str]]], dict[str, Path]]:
    """Key → (negative, kind) pairs, and key → image of the first of them, of a table (JSONL, CSV
    with lists in JSON, …).

    Raises ValueError with the line of the first mistake.
    """
    from vlp.data import tables

    result: dict[str, list[tuple[str, str]]] = {}
    images: dict[str, Path] = {}
    table = tables.read(path)
    if table.problems:
        raise ValueError(table.problems[0])

    for (number, _), row in zip(table.rows, table.records(texts=("key", "image"))):
        place = table.place(number)
        if not _is_given(row):
            expected = (
                '{"key": "000000012", "negatives": ["…"], "kinds": ["…"], "image": "…"} '
                "(kinds and image may be left out)"
            )
            raise ValueError(f"{place}: found {json.dumps(row)[:100]}, expected {expected}")

        key, texts = row["key"], row["negatives"]
        kinds = row.get("kinds", ["given"] * len(texts))
        if "image" in row:
            is_first = bool(texts) and key not in result
            images[key] = _image_of(row, path, number, place, is_first)
        result.setdefault(key, []).extend(zip(texts, kinds))
    if not result:
        raise ValueError(f"{path} holds no negatives")
    return result, images


def _is_given(row: dict[str, Any]) -> bool:
    """Whether a row has a key, as many negatives as kinds, and no image but a name."""
    texts = row.get("negatives")
    if not isinstance(row.get("key"), str) or not isinstance(texts, list):
        return False
    kinds = row.get("kinds", ["given"] * len(texts))
    if not isinstance(kinds, list) or len(kinds) != len(texts):
        return False
    if not all(isinstance(text, str) for text in texts + kinds):
        return False
    return isinstance(row.get("image", ""), str)


def _image_of(row: dict[str, Any], path: Path, number: int, place: str, is_first: bool) -> Path:
    """The image of a row's first negative; raises ValueError where it cannot be used as that."""
    from vlp.data.members import IMAGE_TYPES

    # A table from elsewhere must not pull any file of this machine into shards.
    image = path.parent / row["image"]
    if not image.resolve().is_relative_to(path.parent.resolve()):
        raise ValueError(
            f"{path}:{number}: the image {row['image']!r} leads out of the folder of this file; "
            "copy it there"
        )

    is_image = image.is_file() and image.suffix.lower()[1:] in IMAGE_TYPES
    if not is_image or not is_first:
        types = ", ".join(sorted(IMAGE_TYPES))
        expected = f"a {types} file beside the first negatives of {row['key']!r}"
        raise ValueError(f"{place}: found the image {str(image)!r}, expected {expected}")
    return image


@dataclass
class AddNegatives:
    """The change of a shard's samples (see `vlp.data_tools._run.shards.Change`)."""

    k: int
    kinds: tuple[str, ...]
    seed: int
    lexicon: Lexicon
    given: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    images: dict[str, Path] = field(default_factory=dict)  # of the first given negative
    rewriter: str | None = None
    prompt: str = "{}"

    def settings(self) -> dict[str, Any]:
        """What the output depends on, besides the input."""
        given = None
        if self.given:
            # Images by name and size, so that they may move, with their file, between two calls.
            images = {key: [path.name, path.stat().st_size] for key, path in self.images.items()}
            given = _digest(json.dumps([self.given, images], sort_keys=True))
        return {
            "k_a_caption": self.k,
            "kinds": self.kinds,
            "seed": self.seed,
            "words": _digest(repr(self.lexicon.entries)),
            "given": given,
            "rewriter": self.rewriter,
            "prompt": self.prompt if self.rewriter else None,
        }

    def __call__(
        self, samples: Iterable[Content], shard: int, counts: Counter[str]
    ) -> Iterator[Changed]:
        from vlp.data_tools._run.shards import Changed

        for sample in samples:
            yield Changed(sample, list(sample.captions), self.fields(sample, counts))

    def fields(self, sample: Content, counts: Counter[str]) -> dict[str, Any]:
        """The sample's JSON with its negatives."""
        captions = list(sample.captions)
        chosen = self.choose(sample.key, captions, counts)
        if sample.meta.get("negatives"):
            counts["samples whose earlier negatives were replaced"] += 1
        self._picture(sample, chosen, counts)

        # The scores are of the earlier negatives, and go with them.
        meta = {name: value for name, value in sample.meta.items() if name != "negative_scores"}
        meta |= {
            "negatives": [negative.text for negative, _ in chosen],
            "negatives_valid": [True] * len(chosen),
            "negative_kinds": [negative.kind for negative, _ in chosen],
            "negatives_of": [number for _, number in chosen],
        }

        counts["samples with negatives" if chosen else "samples without negatives"] += 1
        counts.update(f"negatives written: {negative.kind}" for negative, _ in chosen)
        return meta

    def _picture(
        self, sample: Content, chosen: list[tuple[Negative, int]], counts: Counter[str]
    ) -> None:
        """Give the sample the image of its first negative; one of an earlier first negative goes
        with that.
        """
        sample.negative_image, sample.negative_image_type = b"", ""
        image = self.images.get(sample.key)
        if image is None:
            return

        # The image shows the first given negative and no other.
        first = self.given[sample.key][0][0].strip()
        stays = bool(chosen) and chosen[0][1] == GIVEN and chosen[0][0].text == first
        if stays:
            sample.negative_image = image.read_bytes()
            sample.negative_image_type = image.suffix.lower()[1:]
            counts["negative images written"] += 1
        else:
            counts["dropped: negative images whose caption was dropped"] += 1

    def choose(
        self, key: str, captions: list[str], counts: Counter[str]
    ) -> list[tuple[Negative, int]]:
        """(negative, number of its caption) pairs, at most K that belong to a caption.

        The given ones come first and belong to every caption; then come each caption's own, its
        kinds in turn.
        """
        from vlp.data_tools.negatives.rules import head

        # By the sample's key, so that neither processes nor the order of shards change a choice.
        rng = random.Random(f"{self.seed}/{key}")
        heads = [head(caption) for caption in captions]
        candidates = self._candidates(key, heads, rng, counts)
        pool = self._valid(candidates, heads, counts)

        chosen = [(negative, number) for negative, number in pool if number == GIVEN][: self.k]
        n_left = self.k - len(chosen)
        for i, caption in enumerate(captions):
            tail = caption[len(heads[i]) :]
            of_caption = [negative for negative, number in pool if number == i]
            for negative in _in_turn(of_caption, rng)[:n_left]:
                chosen.append((replace(negative, text=negative.text + tail), i))
        return chosen

    def _candidates(
        self, key: str, captions: list[str], rng: random.Random, counts: Counter[str]
    ) -> list[tuple[Negative, int]]:
        from vlp.data_tools.negatives.rules import Negative, propose

        given = self.given.get(key, [])
        if given:
            counts["given: keys used"] += 1
        candidates = [(Negative(kind, text.strip()), GIVEN) for text, kind in given]

        for i, caption in enumerate(captions):
            if caption in captions[:i]:
                continue  # said twice: what is made from it belongs to both
            passed: Counter[str] = Counter()
            negatives = propose(caption, self.lexicon, rng, self.kinds, passed)
            if self.rewriter:
                negatives += _rewriter(self.rewriter, self.prompt)(caption, rng)
            candidates += [(negative, i) for negative in negatives]

            counts["captions read"] += 1
            kinds = {negative.kind for negative in negatives}
            counts.update(f"captions with {kind}" for kind in kinds)
            counts.update({f"passed over: {reason}": n for reason, n in passed.items()})
            if not negatives:
                counts["captions without negatives"] += 1
        return candidates

    def _valid(
        self, candidates: list[tuple[Negative, int]], captions: list[str], counts: Counter[str]
    ) -> list[tuple[Negative, int]]:
        from vlp.data_tools._english.words import bare

        kept: list[tuple[Negative, int]] = []
        true = {bare(caption) for caption in captions}
        seen: set[tuple[str, int]] = set()  # text, number of its caption
        for i, group in itertools.groupby(candidates, key=lambda candidate: candidate[1]):
            # One text of all other captions: they are searched for every new word.
            others = " \n ".join(caption for j, caption in enumerate(captions) if j != i).lower()
            for negative, _ in group:
                text = bare(negative.text)
                if not text:
                    reason = "empty"
                elif text in true:
                    reason = "equal to a caption"
                elif any(_says(others, word) for word in negative.new_words):
                    reason = "says what another caption of the picture says"
                elif not seen.isdisjoint({(text, i), (text, GIVEN)}):
                    reason = "repeated"
                else:
                    seen.add((text, i))
                    kept.append((negative, i))
                    continue
                counts[f"dropped: {reason}"] += 1
        return kept


def _says(captions: str, word: str) -> bool:
    """Whether a word stands in captions; the plain search first, because it is much the faster."""
    return word in captions and re.search(rf"\b{re.escape(word)}\b", captions) is not None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _in_turn(negatives: list[Negative], rng: random.Random) -> list[Negative]:
    """All of them in random order, the kinds in turn."""
    kinds: dict[str, list[Negative]] = {}
    for negative in negatives:
        kind = "order" if negative.kind.startswith("order") else negative.kind
        kinds.setdefault(kind, []).append(negative)
    queues = [rng.sample(queue, len(queue)) for queue in kinds.values()]
    rng.shuffle(queues)

    result: list[Negative] = []
    while any(queues):
        result += [queue.pop() for queue in queues if queue]
    return result


def _rewriter(name: str, prompt: str) -> Any:
    from vlp.data_tools.negatives.rewriter import load

    return load(name, prompt)


def _examples(sources: list[Path], change: AddNegatives, n: int) -> str:
    """`n` random negatives below their captions."""
    from vlp.data_tools._run.shards import samples

    rng = random.Random(change.seed)
    counts: Counter[str] = Counter()
    examples: list[tuple[str, Negative]] = []
    for path in sources:
        for sample in samples(path, counts):
            captions = list(sample.captions)
            for negative, number in change.choose(sample.key, captions, counts):
                # What was given for the picture stands below its first caption.
                caption = captions[max(number, 0)] if captions else ""
                examples.append((caption, negative))

    chosen = rng.sample(examples, min(n, len(examples)))
    width = max((len(negative.kind) for _, negative in chosen), default=0)
    lines = [
        f"{'':{width}}  {caption}\n{negative.kind:{width}}  {negative.text}\n"
        for caption, negative in chosen
    ]
    return "\n".join(lines)
