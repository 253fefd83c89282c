"""`vlp data negatives`: shards → the same shards with hard-negative captions in every sample's
JSON.

Written fields, all of one length: at most K for each caption, in the order of the captions, after
those that were given.
    negatives        captions that are false of the picture
    negatives_valid  true for each of them: what is not valid is not written, and the loader pads to
                     K and masks
    negative_kinds   how each was made: swap_attribute, swap_noun, replace_attribute, replace_noun,
                     replace_number, replace_relation, order_*, swap_time, masked, rewritten, or
                     what --from says ("given" where it says nothing)
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
import random
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from vlp.data.wrong_captions import GIVEN as GIVEN
from vlp.data_tools._run import work
from vlp.data_tools._writer import model
from vlp.data_tools.negatives.change import AddNegatives
from vlp.data_tools.negatives.given import read_given

if TYPE_CHECKING:
    from vlp.data.members import Content as Content
    from vlp.data_tools._run.shards import Changed as Changed
    from vlp.data_tools.negatives.lexicon import Lexicon as Lexicon
    from vlp.data_tools.negatives.rewriter import Rewriter
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
    "swap_time",
)
# Of captions of sounds and videos: asked for by name.
USUAL_KINDS = KINDS[:-1]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vlp data negatives`."""
    add = parser.add_argument
    work.shards_arguments(parser, required=False)

    # Negatives by rule.
    add(
        "--k",
        type=int,
        default=4,
        metavar="K",
        help="most negatives a caption (default: %(default)s)",
    )
    add(
        "--kinds",
        default=",".join(USUAL_KINDS),
        metavar="NAMES",
        help="rules, joined by commas, or none; swap_time exchanges before and after in captions "
        "of sounds and videos (default: %(default)s)",
    )
    add(
        "--words",
        metavar="FILE",
        help="other word lists (see data_tools/negatives/words.yaml); "
        "scenes: the words of `vlp data scenes`",
    )

    # Negatives from elsewhere.
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
        help="masked, causal or encoder-decoder language model of transformers (name or folder) "
        "for more negatives; it reads many captions at once",
    )
    add(
        "--prompt",
        default="Rewrite the caption so that it is wrong in one detail.\n"
        "Caption: {}\nWrong caption:",
        help="what a causal or encoder-decoder rewriter answers; {} is the caption",
    )
    model.arguments(parser)

    # How they are drawn and looked at.
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
    from vlp.data.stored import destination
    from vlp.data_tools._run.shards import claim, transform

    if not args.to and not args.n_print:
        raise ValueError(
            "nothing to do: name --to DIR to write shards, or --print N to look at negatives"
        )
    sources, pool = expand(args.source), work.pool(args)
    if args.rewriter:
        pool = pool.of_model(args.device, alone=True)
    change = _change(args)
    if args.n_print:
        print(work.printable(_examples(sources, change, args.n_print)))
    if not args.to:
        return 0

    folder = destination(args.to)
    claim(folder, "negatives", sources, change.settings())
    results = transform(sources, folder, "negatives", change, pool)
    counts = work.total(results)

    # A mistyped key would go unnoticed; how many are left over is known once all shards are done.
    if change.given and work.all_done(results):
        counts["given: keys without a sample"] = len(change.given) - counts["given: keys used"]
    print(work.report(counts, f"{folder}:"))
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

    # Read whole: a mistake in the last line must show before the first shard.
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
        rewriter=_rewriter(args) if args.rewriter else None,
    )


def _rewriter(args: argparse.Namespace) -> Rewriter:
    from vlp.data.stored import destination
    from vlp.data_tools.negatives.rewriter import Rewriter

    folder = destination(args.to) if args.to else None
    return Rewriter(model.LanguageModel.of(args, args.rewriter), args.prompt, folder)


def _examples(sources: list[Path], change: AddNegatives, n: int) -> str:
    """`n` random negatives below their captions."""
    from vlp.data_tools._run.shards import samples

    rng = random.Random(change.seed)
    counts: Counter[str] = Counter()
    examples: list[tuple[str, Negative]] = []
    for shard, path in enumerate(sources):
        for sample, chosen in change.chosen(samples(path, counts), shard, counts):
            captions = list(sample.captions)
            for negative, number in chosen:
                # What was given for the picture stands below its first caption.
                caption = captions[max(number, 0)] if captions else ""
                examples.append((caption, negative))

    shown = rng.sample(examples, min(n, len(examples)))
    width = max((len(negative.kind) for _, negative in shown), default=0)
    lines = [
        f"{'':{width}}  {caption}\n{negative.kind:{width}}  {negative.text}\n"
        for caption, negative in shown
    ]
    return "\n".join(lines)
