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
from itertools import chain
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
    groups = read_captions(Path(args.data))
    negatives = {
        name: [negatives_of(captions, k) for k, captions in enumerate(lists)]
        for name, lists in groups.items()
    }
    columns = {name: list(chain.from_iterable(pictures)) for name, pictures in negatives.items()}

    # For a person to judge, the kinds in turn, so that none hides behind a frequent one.
    for name, items in columns.items():
        examples = sample_of(items, args.n_print // len(columns))
        print(f"\n{name}: {len(examples)} negatives, of every kind as many")
        for caption, negative in examples:
            print(f"  {negative.kind:22} {caption}\n  {'':22} {negative.text}")

    shares = [(kind, (kind,)) for kind in KINDS]
    shares += [("any of them", ()), ("any but order", KINDS[:-1])]
    rows = [
        {"kind": title, **{f"{name}, %": share(items, *kinds) for name, items in columns.items()}}
        for title, kinds in shares
    ]
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
        "caption of its picture nor likely true of it. Rules and word lists as shipped, no model. "
        "The command prints fifty for a person to judge: one reader found one of them, the "
        "exchange of nouns in a compound (a computer laptop), to be no English, and none that was "
        "still true.",
    )


def read_captions(folder: Path) -> dict[str, list[list[str]]]:
    """The captions of each picture of COCO, and each distinct sentence of NLVR by itself."""
    lines = {}
    for name in ("coco_open", "nlvr"):
        with (folder / f"{name}.jsonl").open() as file:
            lines[name] = [json.loads(line) for line in file]
    sentences = sorted({line["sentence"] for line in lines["nlvr"]})
    return {
        "COCO": [line["captions"] for line in lines["coco_open"]],
        "NLVR": [[sentence] for sentence in sentences],
    }


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
    rng = random.Random(0)
    of_kind: dict[str, list[tuple[str, Negative]]] = {}
    for caption, negatives in items:
        for negative in negatives:
            kind = "order" if negative.kind.startswith("order") else negative.kind
            of_kind.setdefault(kind, []).append((caption, negative))

    queues = [rng.sample(queue, len(queue)) for queue in of_kind.values()]
    return [queues[i % len(queues)][i // len(queues)] for i in range(n)]


def share(items: list[tuple[str, list[Negative]]], *kinds: str) -> float:
    """Percentage of captions with a negative of these kinds, or of any."""
    wanted = tuple(kinds) or KINDS
    n_with = 0
    for _, negatives in items:
        if any(negative.kind.startswith(wanted) for negative in negatives):
            n_with += 1
    return 100 * n_with / len(items)


def counted(caption: str) -> bool:
    return bool(counts(caption)[0])


if __name__ == "__main__":
    main()
