"""How many human captions get valid hard negatives by each rule, and how many count; fifty
negatives to judge.

python tests/benchmarks/negatives.py --publish          # reads the folder that VLP_DATA names
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from tests.benchmarks import report
from vlp.data_tools._english.numbers import counts
from vlp.data_tools.negatives import KINDS, AddNegatives
from vlp.data_tools.negatives.lexicon import Lexicon
from vlp.data_tools.negatives.rules import Negative


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", default=os.environ.get("VLP_DATA", str(report.ROOT.parent / "shared" / "data"))
    )
    parser.add_argument(
        "--print",
        type=int,
        default=50,
        dest="n_print",
        metavar="N",
        help="negatives to print (default: 50)",
    )
    report.add_arguments(parser)
    args = parser.parse_args()
    read = {
        name: [json.loads(line) for line in (Path(args.data) / f"{name}.jsonl").open()]
        for name in ("coco_open", "nlvr")
    }
    sentences = sorted({line["sentence"] for line in read["nlvr"]})
    groups = {
        "COCO": [line["captions"] for line in read["coco_open"]],
        "NLVR": [[sentence] for sentence in sentences],
    }
    made = {
        name: [negatives_of(captions, k) for k, captions in enumerate(lists)]
        for name, lists in groups.items()
    }
    for name, found in made.items():
        some = sample_of([item for sample in found for item in sample], args.n_print // len(made))
        print(f"\n{name}: {len(some)} negatives, of every kind as many")
        for caption, negative in some:
            print(f"  {negative.kind:22} {caption}\n  {'':22} {negative.text}")
    columns = {name: [item for sample in found for item in sample] for name, found in made.items()}
    rows = [
        {"kind": kind, **{f"{name}, %": share(items, kind) for name, items in columns.items()}}
        for kind in KINDS
    ]
    rows.append(
        {"kind": "any of them", **{f"{name}, %": share(items) for name, items in columns.items()}}
    )
    rows.append(
        {
            "kind": "any but order",
            **{f"{name}, %": share(items, *KINDS[:-1]) for name, items in columns.items()},
        }
    )
    counting = {
        f"{name}, %": 100 * sum(counted(caption) for caption, _ in items) / len(items)
        for name, items in columns.items()
    }
    rows.append({"kind": "counterfactual numbers (vlp data counting)", **counting})
    sizes = " and ".join(f"{len(items):,} captions of {name}" for name, items in columns.items())
    report.publish(
        "negatives",
        "Human captions that get hard negatives by rule",
        rows,
        args,
        f"Share of {sizes} (distinct sentences) with at least one valid negative: not equal to a "
        f"caption of its picture nor "
        "likely true of it. Rules and word lists as shipped, no model. The command prints fifty "
        "for a person to judge: one "
        "reader found one of them, the exchange of nouns in a compound (a computer laptop), to be "
        "no English, and none that was "
        "still true.",
    )


def negatives_of(captions: list[str], k: int) -> list[tuple[str, list[Negative]]]:
    """Each caption with all its negatives that are valid for its picture."""
    captions = list(dict.fromkeys(captions))
    change = AddNegatives(10_000, KINDS, seed=0, lexicon=Lexicon.load(None))
    chosen = change.choose(str(k), captions, Counter())
    return [
        (caption, [negative for negative, i in chosen if i == n])
        for n, caption in enumerate(captions)
    ]


def sample_of(items: list[tuple[str, list[Negative]]], n: int) -> list[tuple[str, Negative]]:
    """n negatives beside their captions, the kinds in turn."""
    rng, kinds = random.Random(0), {}
    for caption, negatives in items:
        for negative in negatives:
            kind = "order" if negative.kind.startswith("order") else negative.kind
            kinds.setdefault(kind, []).append((caption, negative))
    queues = [rng.sample(queue, len(queue)) for queue in kinds.values()]
    return [queues[i % len(queues)][i // len(queues)] for i in range(n)]


def share(items: list[tuple[str, list[Negative]]], *kinds: str) -> float:
    """Percentage of captions with a negative of these kinds, or of any."""
    wanted = tuple(kinds) or KINDS
    return (
        100
        * sum(any(n.kind.startswith(wanted) for n in negatives) for _, negatives in items)
        / len(items)
    )


def counted(caption: str) -> bool:
    return bool(counts(caption)[0])


if __name__ == "__main__":
    main()
