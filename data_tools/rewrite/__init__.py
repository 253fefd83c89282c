"""`vlp data rewrite`: shards → the same shards with what a language model made of their captions.

Kinds are rows of a table (data_tools/rewrite/prompts.yaml, or --prompts FILE). Written fields:
    paraphrase, short, long, question    captions that are true of the picture, by kind; a source
                                         trains on them with `captions: [captions, paraphrase]`
    negatives, negatives_valid, negative_kinds, negatives_of
                                         wrong captions, as `vlp data negatives` writes them, with
                                         the kind of each: the five of DeGLA (arXiv 2504.16801)

An answer that is empty, equal to a caption of the sample, or said before is dropped and counted, of
true captions by kind. All answers, with the empty ones, lie in DIR/_answers/*.jsonl: a killed call
goes on from them, and --reuse takes them over into another call where model, prompt and caption are
the same.

Nothing vouches for what a model writes. Read some first: --print N.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from vlp.data_tools._run import work
from vlp.data_tools._writer import model

if TYPE_CHECKING:
    from vlp.data_tools.rewrite.change import Rewrite

HELP = "rewrite captions with a language model: other words, shorter, longer, wrong"
EXAMPLE = """vlp data rewrite data/train --model hf-user/llm --bf16 --to data/rewritten
  vlp data rewrite data/train --model models/llm --kinds paraphrase,long --n 2 --print 20
  vlp data rewrite data/train --model models/llm --kinds swap_nouns,replace_nouns --to data/wrong
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vlp data rewrite`."""
    add = parser.add_argument
    work.shards_arguments(parser, required=False)

    # What is written.
    add(
        "--model",
        required=True,
        metavar="NAME",
        help="causal or encoder-decoder language model of transformers (name or folder)",
    )
    add(
        "--kinds",
        default="paraphrase",
        metavar="NAMES",
        help="rows of the table of prompts, joined by commas (default: %(default)s)",
    )
    add(
        "--prompts",
        metavar="FILE.yaml",
        help="another table of prompts (see data_tools/rewrite/prompts.yaml)",
    )
    add(
        "--of",
        choices=["all", "first"],
        default="all",
        help="which captions of a sample are rewritten (default: %(default)s)",
    )

    # How words are drawn; LaCLIP's release (arXiv 2305.20088) draws at .9.
    add("--n", type=int, default=1, metavar="N", help="answers a caption and kind (default: 1)")
    add(
        "--temperature",
        type=float,
        default=0.9,
        metavar="T",
        help="0 takes the likeliest words, for one answer (default: %(default)s)",
    )
    add("--seed", type=int, default=0, help="default: %(default)s")
    model.arguments(parser)

    add(
        "--reuse",
        metavar="DIR",
        help="output of an earlier call whose answers are taken over where nothing differs",
    )
    add(
        "--print",
        type=int,
        default=0,
        metavar="N",
        dest="n_print",
        help="print what becomes of the first N samples; without --to, write nothing",
    )
    work.arguments(parser)


@work.alone
def run(args: argparse.Namespace) -> int:
    """Write the shards and print what was made, what was dropped and why."""
    from dataclasses import replace

    from vlp.data.paths import expand
    from vlp.data.stored import destination
    from vlp.data_tools._run.shards import claim, transform

    if not args.to and not args.n_print:
        raise ValueError(
            "nothing to do: name --to DIR to write shards, or --print N to look at answers"
        )
    sources, pool = expand(args.source), work.pool(args)
    pool = pool.of_model(args.device, alone=True)
    change = _change(args)
    if args.n_print:
        print(work.printable(_examples(sources, change, args.n_print)))
    if not args.to:
        return 0

    folder = destination(args.to)
    claim(folder, "rewrite", sources, change.settings())
    results = transform(sources, folder, "rewrite", replace(change, folder=folder), pool)
    print(work.report(work.total(results), f"{folder}:"))
    return 0


def _change(args: argparse.Namespace) -> Rewrite:
    from vlp.data.stored import source
    from vlp.data_tools._writer.answers import read_earlier
    from vlp.data_tools._writer.generate import Drawing, Generator
    from vlp.data_tools.rewrite.change import Rewrite
    from vlp.data_tools.rewrite.prompts import SHIPPED, read_prompts
    from vlp.schema import did_you_mean

    path = Path(args.prompts) if args.prompts else SHIPPED
    prompts = read_prompts(path)
    kinds = args.kinds.split(",")
    for kind in kinds:
        if kind not in prompts:
            raise ValueError(
                f"no kind {kind!r} in {path}{did_you_mean(kind, prompts)}; "
                f"it has {', '.join(prompts)}"
            )

    drawing = Drawing(args.n, args.temperature, args.seed)
    earlier = read_earlier(source(args.reuse)) if args.reuse else {}
    language_model = model.LanguageModel.of(args, args.model)
    Generator(language_model.load())  # a masked model is refused now
    return Rewrite(
        model=language_model,
        prompts=[prompts[kind] for kind in dict.fromkeys(kinds)],
        drawing=drawing,
        first_only=args.of == "first",
        earlier=earlier,
    )


def _examples(sources: list[Path], change: Rewrite, n: int) -> str:
    """What becomes of the first `n` samples: each caption, and below it what was written."""
    from collections import Counter
    from itertools import chain, islice

    from vlp.data_tools._run.shards import samples

    counts: Counter[str] = Counter()
    read = chain.from_iterable(samples(path, counts) for path in sources)
    lines: list[str] = []
    for sample, answers in change.answered(islice(read, n), 0, counts):
        for caption, of_kinds in answers.items():
            lines.append(f"{sample.key}  {caption}")
            for prompt, texts in zip(change.prompts, of_kinds):
                lines += [f"    {prompt.kind:18}  {text}" for text in texts]
    return "\n".join(lines)
