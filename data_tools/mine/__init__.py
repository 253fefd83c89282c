"""`vlp data mine`: shards → the same shards with each sample's nearest other samples as negatives,
or in an order in which neighbours stand together.

Neighbours are searched by the cosine of stored embeddings (`vlp data embed`): --from image --find
text finds, for each picture, the captions that fit it nearly as well as its own. What may be true
of the picture is left out, in this order, and counted by reason: the same key or origin, a caption
of the sample, a score too near its own (--max-ratio, or --margin), another wording (--same), the
nearest --skip. From the next --window are taken --k: the first, or drawn by the seed and the key.

Written fields, as `vlp data negatives` writes them:
    negatives, negatives_valid, negatives_of, negative_kinds ("mined")
    negative_scores, positive_score    cosines, or what --judge says; then `score` is the positive's
    negative_keys                      of the samples that the negatives are captions of
    KEY.negative.jpg, KEY.negative.1.jpg, …    with --images, their pictures

--judge cross-encoder:MODEL (a head for image-text matching) or mllm:MODEL (asked whether the
caption describes the picture, as UniME-V2 asks), or a function of one's own, package.module:
function (pictures and captions to numbers), drops what it scores above the sample's own pair less
--delta: that may be true. An answer that is neither yes nor no drops the neighbour, counted.

--order G writes no negatives but a new order: each run of G samples holds neighbours and has an
"origin" of its own, so that `data.together: G` makes batches of them.

Memory: embeddings are mapped from their files; a search holds 1,024 × (D + 8,192) numbers. Exact
search takes n²·D multiplications: a million samples of 512 are 5e14. Above a million samples FAISS
searches an index where it is installed (pip install 'vlp[mine]'), in 4·D bytes a sample.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import TYPE_CHECKING

from vlp.data_tools._run import work
from vlp.data_tools.mine import options

if TYPE_CHECKING:
    from collections import Counter

    from vlp.data_tools.mine.store import Store

HELP = "find each sample's nearest others by stored embeddings: negatives, images, an order"
EXAMPLE = """vlp data mine data/train --embeddings data/train_embedded --to data/mined
  vlp data mine data/train --embeddings data/train_embedded --k 5 --images --to data/mined
  vlp data mine data/train --embeddings data/emb --judge mllm:models/vlm --to data/judged
  vlp data mine data/train --embeddings data/emb --from image --find image --order 2 --to data/pairs
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vlp data mine`."""
    add = parser.add_argument
    work.source_argument(parser)
    add(
        "--embeddings",
        required=True,
        metavar="DIR",
        help="what `vlp data embed` wrote for these shards",
    )
    add(
        "--to",
        required=True,
        metavar="DIR",
        help="folder for the new shards; the same call goes on where one stopped",
    )
    options.search_arguments(parser)
    options.rule_arguments(parser)

    # What is written.
    add(
        "--images",
        action="store_true",
        help="pack the neighbours' pictures beside their captions",
    )
    add(
        "--order",
        type=int,
        default=0,
        metavar="G",
        help="write the samples in groups of G neighbours instead of negatives",
    )
    work.arguments(parser)


@work.alone
def run(args: argparse.Namespace) -> int:
    """Survey, search, decide, write, and print what was left out and why."""
    from vlp.data.paths import expand
    from vlp.data.stored import destination
    from vlp.data_tools._run.shards import claim, jobs, transform
    from vlp.data_tools.mine.decide import Decide
    from vlp.data_tools.mine.order import write_order
    from vlp.data_tools.mine.search import INDEX_FILE, build_index
    from vlp.data_tools.mine.store import Store, survey
    from vlp.data_tools.mine.write import AddMined

    sources, pool, folder = expand(args.source), work.pool(args), destination(args.to)
    # An exact search multiplies matrices on the device of a model.
    model_pool = pool.of_model(args.device)
    rules = options.rules(args)
    store = Store(sources, args.embeddings)
    _check(args, store)
    judge = options.judge(args)
    search = options.search(args, store, folder)
    claim(folder, "mine", sources, options.settings(args, search, judge))

    # A neighbour may lie anywhere: all shards are surveyed and searched before one is written.
    surveyed = work.carry_out(
        "survey", jobs(sources, folder, "survey"), partial(survey, folder=folder), pool
    )
    if not work.all_done(surveyed):
        return 0

    # An index is built once, before processes share the search.
    searches = jobs(sources, folder, "neighbours")
    if not all(job.mark.exists() for job in searches):
        build_index(search)
    search_pool = model_pool if search.method == "exact" else pool
    searched = work.carry_out("search", searches, search, search_pool)
    if not work.all_done(searched):
        return 0
    (folder / INDEX_FILE).unlink(missing_ok=True)

    if args.order:
        results, counts = write_order(store, folder, rules, args.order, pool)
        print(work.report(work.total(results) | counts, f"{folder}: groups of {args.order}"))
        return 0

    decide = Decide(store, folder, rules, args.find, judge, args.delta)
    judge_pool = model_pool if judge else pool
    decided = work.carry_out("choose", jobs(sources, folder, "chosen"), decide, judge_pool)
    change = AddMined(store, folder, args.images, judge is not None)
    results = transform(sources, folder, "mine", change, pool)
    counts = work.total(decided) | work.total(results) | _without(searched)
    print(work.report(counts, f"{folder}:"))
    return 0


def _check(args: argparse.Namespace, store: Store) -> None:
    """Raise ValueError for embeddings that are none, or not of these samples and their model."""
    from vlp import stored_embeddings
    from vlp.config import Captions
    from vlp.data.sources.shards import Options, opened

    if store.n < 2:
        raise ValueError(f"{args.source} holds {store.n} usable samples; expected at least 2")
    if not any(store.rows(shard, args.find).any() for shard in range(len(store.paths))):
        raise ValueError(
            f"{args.embeddings} holds no {args.find} embedding but zeros: no sample has what was "
            "embedded"
        )

    # By content: a few samples are embedded again, where the model is on this machine.
    shards = Options(args.source, embeddings=args.embeddings)
    captions = Captions(choose="first", missing="drop")
    stored_embeddings.check_with_teacher(opened(store.paths, shards, captions))


def _without(searched: list[work.Result]) -> Counter[str]:
    """The counts of the search that are of samples without neighbours."""
    from collections import Counter

    counts = work.total(searched)
    return Counter({name: n for name, n in counts.items() if name.startswith("samples without")})
