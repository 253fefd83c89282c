"""`vlp data filter`: shards → the same shards without the samples and captions that a rule refuses,
counted by reason.

Rules about the picture or the sample drop the sample. Rules about captions drop captions, and the
sample with its last one. A score keeps the cosine of every caption that stays, in the JSON's
`clip_scores`; a head's score of the stored embedding is in the JSON under the head's name. A share
(--top) is of all samples of SOURCE, whatever the other rules say of them: what several rules keep
is what each of them keeps.

Of DiHT's rules (complexity, action, text; arXiv 2301.02280) --min-relations and --action are rough
stand-ins for English captions, without a parser (see _english/traits.py); --ocr reads the text in
the picture by a reader that the user names.
"""

from __future__ import annotations

import argparse
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from vlp.data_tools import _encoder
from vlp.data_tools._run import work
from vlp.data_tools.filter.alike import Alike
from vlp.data_tools.filter.change import Filter
from vlp.data_tools.filter.conditions import parse, refuse_unknown
from vlp.data_tools.filter.options import arguments
from vlp.data_tools.filter.repeats import too_common
from vlp.data_tools.filter.rules import Rules, rules_of
from vlp.data_tools.filter.scores import CLIP_SCORES, Stored, Survey, Top, surveyed
from vlp.data_tools.filter.spotting import Spotter, runs_model

__all__ = ["EXAMPLE", "HELP", "arguments", "run"]

HELP = "keep what rules, a list or a model's score let pass; count the rest by reason"
EXAMPLE = """vlp data filter data/raw --to data/clean --min-side 200 --max-aspect 3
  vlp data filter data/raw --to data/clean --min-words 3 --languages en
  vlp data filter data/raw --to data/clean --max-repeats 10 --processes 8
  vlp data filter data/raw --to data/clean --min-side 200 --ray
  vlp data filter data/raw --to data/clean --keep "similarity > 0.28" --drop "punsafe >= 0.5"
  vlp data filter data/raw --to data/clean --drop "license in by-nc,unknown"
  vlp data filter data/raw --to data/clean --reject "https?://|©" --processes 8
  vlp data filter data/raw --to data/top --model ViT-B-32:laion2b_s34b_b79k --min-score 0.28
  vlp data filter data/pool --to data/subset --uids subset.npy      (DataComp's lists)
  vlp data filter data/raw --to data/cat --min-relations 1 --action --ocr rapidocr --max-overlap 0.5
  vlp data filter data/raw --to data/top30 --top similarity=30%
  vlp data filter data/raw --to data/fine --embeddings data/embedded \\
      --head aesthetic=sa_0_4_vit_l_14_linear.pth --keep "aesthetic >= 5"
"""


@work.alone
def run(args: argparse.Namespace) -> int:
    """Write the shards; print what stays and why the rest does not."""
    from vlp.data.paths import expand
    from vlp.data.stored import destination
    from vlp.data_tools._run.shards import claim, transform

    rules = rules_of(args)
    tops = tuple(Top.of(text) for text in args.top)
    _refuse_idle(args, rules)
    sources, pool, folder = expand(args.source), work.pool(args), destination(args.to)
    without_heads = args.like is not None or args.cells is not None
    stored = Stored.of(args.embeddings, args.head, sources, without_heads=without_heads)
    alike = Alike.of(args, stored, len(sources))
    _refuse_fields_nobody_has(rules, tops, stored, args, sources)
    # The dear ones last, so that no weights are read for a command with a mistake in it.
    model_pool = pool.of_model(args.device) if args.model or runs_model(args.ocr) else pool
    spotter = Spotter.of(args.ocr, args.device, args.max_overlap, args.ocr_field)
    model = _encoder.Model.of(args)

    settings = rules.settings()
    settings["uids"] = _digest(args.uids) if args.uids else ""  # its content, not its place
    # Said only where they are asked for, so that folders from before there were any go on.
    settings |= {"top": args.top} if tops else {}
    for part in (stored, alike, spotter, model):
        settings |= part.settings() if part else {}
    claim(folder, "filter", sources, settings)

    # How often a caption occurs is known only once all shards are read.
    repeated = None
    if rules.max_repeats:
        repeated = too_common(sources, folder, rules.max_repeats, pool)
        if repeated is None:
            return 0

    # So is which scores are among the highest.
    shares = None
    if tops:
        asked = model if _asks_cosines(tops) else None
        survey = Survey(folder, tops, stored, asked)
        shares = surveyed(survey, sources, model_pool if asked else pool)
        if shares is None:
            return 0
        print(shares.lines())

    # And which cells of pictures are wanted.
    chosen = None
    if alike:
        chosen = alike.decide(folder, pool)
        if chosen is None:
            return 0

    # Every shard by itself, now that all that is shared is known.
    change = Filter(rules, model, repeated, stored, shares, chosen, spotter)
    results = transform(sources, folder, "filter", change, model_pool)
    counts = work.total(results)
    print(work.report(counts, f"{folder}:"))
    if work.all_done(results) and not counts["samples written"]:
        raise ValueError(f"no sample of {args.source} is left; the reasons are listed above")
    return 0


def _refuse_idle(args: argparse.Namespace, rules: Rules) -> None:
    """Raise ValueError for options that would do nothing together."""
    asks_model = args.min_score is not None or _asks_cosines(map(Top.of, args.top))
    if args.min_score is not None and not args.model:
        raise ValueError(
            "--min-score X and --model REF go together: "
            "one is the least cosine, the other says whose"
        )
    if args.model and not asks_model:
        raise ValueError(
            "--min-score X and --model REF go together, or --top clip_scores=SHARE and --model "
            "REF: one says what stays, the other whose cosine it is"
        )
    of_scores = (args.top, args.head, args.embeddings, args.like, args.cells)
    of_pictures = (args.ocr, args.ocr_field, args.max_overlap)
    if rules == Rules() and of_pictures == (None, "", None) and not any(of_scores):
        raise ValueError(
            "no rule is given, such as --min-side 200 or --min-words 3; "
            "`vlp data filter --help` lists them"
        )


def _asks_cosines(tops: Iterable[Top]) -> bool:
    return any(top.field == CLIP_SCORES for top in tops)


def _refuse_fields_nobody_has(
    rules: Rules,
    tops: tuple[Top, ...],
    stored: Stored | None,
    args: argparse.Namespace,
    sources: list[Path],
) -> None:
    """Raise ValueError for a misspelled field, which would drop every sample, or none."""
    made = stored.names() if stored else set()
    asked = [parse(text) for text in (*rules.keep, *rules.drop)]
    asked = [one for one in asked if one.field not in made]
    # A model's cosines come to those that are there already.
    made |= {CLIP_SCORES} if args.model else set()
    asked_tops = [top for top in tops if top.field not in made]
    kept_in = Spotter(args.ocr).kept_in if args.ocr else ""
    asked += [parse(f"{kept_in} present")] if kept_in else []
    refuse_unknown([*asked, *asked_tops], _metas(sources))


def _metas(sources: list[Path]) -> Iterator[dict[str, Any]]:
    """The JSON of all samples, one by one."""
    from vlp.data_tools._run.shards import samples

    for path in sources:
        yield from (sample.meta for sample in samples(path, Counter()))


def _digest(path: str) -> str:
    from vlp.data.stored import source

    with open(source(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
