"""`vlp data concepts`: shards → the same shards with the concepts that their captions name (CatLIP,
arXiv 2404.15653).

A concept is a noun of WordNet (see `wordnet`). Those that enough samples name are numbered, the
commonest first, and a sample's JSON gets their numbers:

    concepts            its concepts, each once, in the captions' order; [] where none is named
    DIR/concepts.tsv    number, synset, its offset in WordNet, samples that name it

`objective: {distill: {form: concepts, loss: bce}}` learns them, and `model.heads.concepts` is how
many the table has. For held-out samples name the table of the training set: --vocabulary.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlp.data_tools._run import work

if TYPE_CHECKING:
    from vlp.data_tools.concepts.vocabulary import Vocabulary
    from vlp.data_tools.concepts.wordnet import Nouns

HELP = "write which nouns of WordNet captions name, as labels of pictures (CatLIP)"
EXAMPLE = """vlp data concepts data/train --to data/named
  vlp data concepts data/train --min-count 50 --wordnet nltk_data/corpora/wordnet --to data/named
  vlp data concepts data/val --vocabulary data/named/concepts.tsv --to data/named_val
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vlp data concepts`."""
    add = parser.add_argument
    work.shards_arguments(parser)
    add(
        "--wordnet",
        metavar="DIR",
        help="WordNet's database files, a folder or nltk's wordnet.zip (default: where Debian's "
        "wordnet-base or nltk's downloader puts them)",
    )
    add(
        "--no-lemmas",
        dest="lemmas",
        action="store_false",
        help='look words up as they are written: "cats" is no cat (published: it is)',
    )
    add(
        "--min-count",
        type=int,
        metavar="N",
        help="fewest samples that name a concept (default: 500)",
    )
    add("--top", type=int, metavar="N", help="at most so many concepts, the commonest")
    add(
        "--vocabulary",
        metavar="FILE",
        help="concepts.tsv of an earlier call, whose numbers are taken; nothing is counted",
    )
    work.arguments(parser)


@work.alone
def run(args: argparse.Namespace) -> int:
    """Count, number and write the concepts; print how many there are, and how many samples have
    one.
    """
    from vlp.data.paths import expand
    from vlp.data.stored import destination
    from vlp.data_tools._run.shards import claim, transform
    from vlp.data_tools.concepts import vocabulary, wordnet
    from vlp.data_tools.concepts.label import Label

    _check(args)
    known = vocabulary.read(args.vocabulary) if args.vocabulary else None
    nouns = wordnet.read(args.wordnet, args.lemmas)
    if known is not None:
        known.check(nouns)
    sources, pool, folder = expand(args.source), work.pool(args), destination(args.to)
    claim(folder, "concepts", sources, _settings(args, nouns, known))

    # Which concepts are common is known once all captions are read.
    if known is None:
        known = _counted(args, nouns, sources, folder, pool)
        if known is None:
            return 0
    known.write(folder / vocabulary.FILE)

    results = transform(sources, folder, "concepts", Label(nouns, known.numbers), pool)
    print(work.report(work.total(results), f"{folder}, with {vocabulary.FILE}:"))
    print(f"  {len(known.words):,} concepts: model.heads.concepts={len(known.words)}")
    return 0


MIN_COUNT = 500  # samples; CatLIP's, as far as it could be confirmed


def _check(args: argparse.Namespace) -> None:
    for option, value in (("--min-count", args.min_count), ("--top", args.top)):
        if value is None:
            continue
        if value < 1:
            raise ValueError(f"{option} is {value}; expected at least 1")
        if args.vocabulary:
            raise ValueError(
                f"{option} chooses concepts, and --vocabulary brings them; leave out one of the two"
            )


def _settings(args: argparse.Namespace, nouns: Nouns, known: Vocabulary | None) -> dict[str, Any]:
    """What the output depends on, besides the source: WordNet and the vocabulary by content."""
    return {
        "wordnet": nouns.digest(),
        "lemmas": args.lemmas,
        "min_count": None if known else args.min_count or MIN_COUNT,
        "top": args.top,
        "vocabulary": known.digest() if known else None,
    }


def _counted(
    args: argparse.Namespace, nouns: Nouns, sources: list[Path], folder: Path, pool: work.Pool
) -> Vocabulary | None:
    """The concepts that enough samples name; None while other machines count."""
    from vlp.data_tools._run.shards import jobs
    from vlp.data_tools.concepts.label import Count, named_file, totals
    from vlp.data_tools.concepts.vocabulary import Vocabulary

    counting = jobs(sources, folder, "named")
    results = work.carry_out("concepts of captions", counting, Count(folder, nouns), pool)
    if not work.all_done(results):
        return None

    counts = totals(named_file(folder, number) for number in range(len(sources)))
    return Vocabulary.of(counts, nouns, args.min_count or MIN_COUNT, args.top)
