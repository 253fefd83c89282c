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
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vlp.data_tools import _encoder
from vlp.data_tools._run import work
from vlp.data_tools.filter.change import Filter
from vlp.data_tools.filter.conditions import refuse_unknown
from vlp.data_tools.filter.options import arguments
from vlp.data_tools.filter.repeats import too_common
from vlp.data_tools.filter.rules import rules_of

__all__ = ["EXAMPLE", "HELP", "arguments", "run"]

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


@work.alone
def run(args: argparse.Namespace) -> int:
    """Write the shards; print what stays and why the rest does not."""
    from vlp.data.paths import expand
    from vlp.data_tools._run.shards import claim, transform

    rules = rules_of(args)
    sources, pool, folder = expand(args.source), work.pool(args), Path(args.to)
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


def _digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
