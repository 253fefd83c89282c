"""Captions a second that a language model rewrites: one at a time, as the rewriter of `vlp data
negatives` once did, and in batches.

python tests/benchmarks/rewrite.py                      # a small model with random weights
python tests/benchmarks/rewrite.py --model models/llm --device cuda --bf16
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from tests.benchmarks import report
from tests.data_tools.language import WORDS, write_models
from vlp.data_tools._writer.answers import Answers
from vlp.data_tools._writer.generate import Drawing, Question
from vlp.data_tools._writer.model import LanguageModel

BATCHES = (1, 8, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="default: random weights, --width and --layers")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--width", type=int, default=256, help="default: 256")
    parser.add_argument("--layers", type=int, default=4, help="default: 4")
    parser.add_argument("--captions", type=int, default=128, help="default: 128")
    report.add_arguments(parser)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        ref = args.model
        if not ref:
            write_models(Path(folder), width=args.width, layers=args.layers)
            ref = f"{folder}/causal"
        rates = {batch: rate(args, ref, batch) for batch in BATCHES}

    rows = [
        {"batch": batch, "captions/s": speed, "beside one at a time": speed / rates[1]}
        for batch, speed in rates.items()
    ]
    report.publish(
        "rewrite",
        "Captions that a language model rewrites",
        rows,
        args,
        f"{args.captions} captions of 4 to 12 words, each answered in at most twice as many; "
        f"{args.model or f'GPT-2 of width {args.width} and {args.layers} layers, random weights'}.",
    )


def rate(args: argparse.Namespace, ref: str, batch: int) -> float:
    """Captions a second, without loading and the first batch."""
    model = LanguageModel(ref, args.device, batch, args.bf16)
    answers = Answers(model, Drawing())
    answers.ask(questions(batch, "in"))

    asked = questions(args.captions, "the")
    start = time.perf_counter()
    answers.ask(asked)
    return len(asked) / (time.perf_counter() - start)


def questions(n: int, first: str) -> list[Question]:
    """Captions of 4 to 12 words, no two alike."""
    words = WORDS[5:]
    captions = []
    for i in range(n):
        length = 3 + i % 9
        rest = [words[(i * 7 + k * k) % len(words)] for k in range(length)]
        captions.append(" ".join([first, *rest, str(i)]))
    return [Question(f"say in other words : {text} :", text) for text in captions]


if __name__ == "__main__":
    main()
