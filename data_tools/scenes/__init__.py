"""Rendered scenes: the embedded data set, and the test bed for counting, attribute binding,
relations and word order.

One to ten objects in one or two groups (8 shapes × 8 colors × 2 sizes) on textured backgrounds,
with true captions of several lengths. A scene is a pure function of (seed, split, index). `write`
fills a folder:

    train/ val/ test/      shards (vlp.data.format) that training could show, in disjoint
                           descriptions (see side_of)
    heldout/               shards in which every scene has a combination that training never shows
    zeroshot/              clip_benchmark's layout: 56 classes of color and shape that training
                           shows
    novel_zeroshot/        the same with all 64 classes, pictures of the 8 color-shape combinations
                           that training lacks
    retrieval/             clip_benchmark's layout: three captions a picture, each true of this
                           picture alone
    counting/ binding/ relations/ order/    shards whose JSON has "negatives": captions that are
                           false of the picture

A sample's JSON: {"scene": {"background", "groups", "relation", "objects"}, "captions", "heldout",
"seed", "split", "index"}; an object has shape, color, size, x, y (centre), diameter (shares of the
side, y downwards) and angle (degrees); `relation` says how the first group lies to the second:
left, right, above, below; `heldout` names the combinations that training never shows. Proof sets
add "caption", "negatives", "negative_kinds", "negatives_valid" and "kind". With --sounds the scene
lies beside it as a sound, KEY.wav (vlp.data_tools.scenes.sound).
"""

from __future__ import annotations

import argparse
import time

from vlp.data.stored import destination
from vlp.data_tools._run import work
from vlp.data_tools.scenes.folder import write
from vlp.data_tools.scenes.render import PROOFS, Scene, generate

__all__ = ["EXAMPLE", "HELP", "PROOFS", "Scene", "arguments", "generate", "run", "write"]

HELP = "render scenes with captions: training shards and evaluation sets"
EXAMPLE = """vlp data scenes --to data/scenes --train 20000 --val 1000 --size 64 --seed 0
  vlp data scenes --to data/heard --train 20000 --sounds
  vlp data scenes --to data/scenes --train 10000000 --ray
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vlp data scenes`."""
    add = parser.add_argument
    add("--to", required=True, metavar="DIR", help="folder to fill")

    # How many, of each set.
    add(
        "--train",
        type=int,
        default=20_000,
        metavar="N",
        help="training scenes (default: %(default)s)",
    )
    add(
        "--val",
        type=int,
        default=1000,
        metavar="N",
        help="validation scenes (default: %(default)s)",
    )
    add(
        "--test",
        type=int,
        default=1000,
        metavar="N",
        help="scenes of test/ and heldout/ (default: %(default)s)",
    )
    add(
        "--zeroshot",
        type=int,
        default=560,
        metavar="N",
        help="zero-shot pictures (default: %(default)s)",
    )
    add(
        "--retrieval",
        type=int,
        default=300,
        metavar="N",
        help="retrieval pictures (default: %(default)s)",
    )
    add(
        "--proofs",
        type=int,
        default=540,
        metavar="N",
        help="items of each proof set (default: %(default)s)",
    )

    # How they are drawn.
    add(
        "--size",
        type=int,
        default=64,
        metavar="PX",
        help="side of the pictures (default: %(default)s)",
    )
    add("--sounds", action="store_true", help="each scene as a sound as well, KEY.wav")
    add("--seed", type=int, default=0, help="another seed, other scenes (default: %(default)s)")
    add(
        "--processes",
        type=int,
        metavar="N",
        help="default: one a core; the result is the same for any number",
    )
    work.ray_argument(parser)


@work.alone
def run(args: argparse.Namespace) -> int:
    """Fill the folder and print what it holds and how fast it was made."""
    on_ray = work.on_cluster(args)
    start = time.perf_counter()
    n_scenes = write(
        args.to,
        n_train=args.train,
        n_val=args.val,
        n_test=args.test,
        n_zeroshot=args.zeroshot,
        n_retrieval=args.retrieval,
        n_proofs=args.proofs,
        size=args.size,
        seed=args.seed,
        processes=args.processes,
        ray=on_ray,
        sounds=args.sounds,
    )
    seconds = time.perf_counter() - start

    for split, n in n_scenes.items():
        print(f"{destination(args.to) / split}: {n} scenes")
    total = sum(n_scenes.values())
    print(f"{total} scenes in {seconds:.1f} s: {total / seconds:.0f} scenes/s")
    return 0
