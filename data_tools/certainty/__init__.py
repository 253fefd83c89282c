"""`vlp data certainty`: stored embeddings → an adapter that says how certain each embedding is
(ProbVLM, arXiv 2307.00398), and what that is worth.

The model that embedded stays as it is (vlp.models.certainty). A share of the pairs is held out; on
them R@1 is measured over the share of queries that is kept, the most certain first, and Spearman's
correlation of certainty and R@1 over ten bins, 1 where R@1 rises with certainty throughout.

    DIR/adapter.safetensors    of both sides; names the model
    DIR/certainty.json, .html  losses, R@1 over the share kept, by bin
"""

from __future__ import annotations

import argparse
from functools import partial

from vlp.data_tools._run import work

HELP = "train an adapter on stored embeddings that says how certain each is (ProbVLM)"
EXAMPLE = """vlp data certainty data/pairs --embeddings data/embedded --to models/certainty
  vlp data certainty data/pairs --embeddings data/embedded --epochs 30 --device cuda --to models/c
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vlp data certainty`."""
    add = parser.add_argument
    work.source_argument(parser)
    add("--to", required=True, metavar="DIR", help="folder to write; must not exist or be empty")
    add(
        "--embeddings",
        required=True,
        metavar="DIR",
        help="what `vlp data embed` wrote for SOURCE",
    )
    add("--epochs", type=int, default=10, metavar="N", help="default: %(default)s")
    add("--batch", type=int, default=64, metavar="B", help="pairs a step (default: %(default)s)")
    add("--lr", type=float, default=1e-4, help="Adam's, falling to 0 (default: %(default)s)")
    add("--hidden", type=int, default=256, help="width of its layers (default: %(default)s)")
    add("--layers", type=int, default=3, help="default: %(default)s")
    add("--dropout", type=float, default=0.1, metavar="P", help="default: %(default)s")
    add(
        "--held-out",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="of the pairs, on which it is measured (default: %(default)s)",
    )
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--device", default="auto", help="auto: a GPU where there is one (default: %(default)s)")
    work.ray_argument(parser)


@work.alone
def run(args: argparse.Namespace) -> int:
    """Train, measure and write; print R@1 over the share kept."""
    from vlp.data.paths import expand
    from vlp.data_tools.certainty import report
    from vlp.data_tools.certainty.fit import Training, fit
    from vlp.data_tools.mine.store import Store
    from vlp.models import certainty

    training = Training.of(args)
    folder = report.new_folder(args.to)
    pool = work.Pool(ray=work.on_cluster(args)).of_model(args.device)
    store = Store(expand(args.source), args.embeddings)

    # One job: every step goes on from the one before.
    for _, (adapters, measured) in pool.finished(partial(fit, training=training), [store]):
        folder.mkdir(parents=True, exist_ok=True)
        certainty.save(adapters, folder / "adapter.safetensors")
        report.write(folder, args.source, measured)
        print(report.text(folder, measured))
    return 0
