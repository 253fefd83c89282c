"""`vlp data cells`: a label for every sample of a configuration, K-means of a model's picture
features.

The labels are for `selection: {mcl: {labels: [FILE, …]}}` (arXiv 2402.11816), which draws every
batch from one cell. They belong to the samples that the configuration's `data.sources` name, in
that order: training on others is refused.

The centres come from --fit random samples; then every sample is given the nearest. Memory: the
features of the sample that is fitted (100,000 of D = 512: 200 MB), and 4 bytes a sample.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from vlp.data_tools import _encoder
from vlp.data_tools._run import work

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from vlp.data.mix import Mixture

HELP = "cluster the samples of a configuration by a model's features, for selection: {mcl: …}"
EXAMPLE = """vlp data cells mcl --model runs/mcl1 --to runs/mcl1/cells.safetensors
  vlp data cells runs/mcl1/config.yaml --model runs/mcl1 --clusters 20 --to cells/1.safetensors
"""
_ROUNDS = 100  # of Lloyd's algorithm, if it does not come to rest before


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vlp data cells`."""
    add = parser.add_argument
    add(
        "config",
        help="a YAML file, or the name of an installed configuration, whose `data` section names the samples",
    )
    add("--to", required=True, metavar="FILE", help="file to write, .safetensors")
    add("--clusters", type=int, default=10, metavar="K", help="default: %(default)s")
    add(
        "--fit",
        type=int,
        default=100_000,
        metavar="N",
        help="samples that the centres are fitted to (default: %(default)s)",
    )
    add("--seed", type=int, default=0, help="default: %(default)s")
    _encoder.arguments(parser, required=True)


def run(args: argparse.Namespace) -> int:
    """Fit, label, write, and print the sizes of the cells."""
    import numpy as np
    import torch

    from vlp import config
    from vlp.data.cells import write_labels
    from vlp.data.mix import Mixture, permute
    from vlp.seeds import derive

    data = config.load(config.find(args.config)).data
    sources = [plugin.module.open(plugin.options, data.captions) for plugin in data.sources]
    mixture, k = (
        Mixture(sources, [None] * len(sources), seed=args.seed, shuffle=False),
        args.clusters,
    )
    n = mixture.n_samples
    if not 2 <= k <= min(n, args.fit):
        raise ValueError(
            f"--clusters {k} must lie between 2 and the {min(n, args.fit)} samples that are fitted; set it lower"
        )
    model, counts = _encoder.Model.of(args), Counter[str]()
    assert model is not None  # --model is required
    fitted = np.sort(permute(n, derive(args.seed, "fit"), np.arange(min(n, args.fit))))
    rows = torch.cat(list(_features(model, mixture, fitted, counts)))
    centres = kmeans(
        rows[rows.any(1)], k, derive(args.seed, "kmeans")
    )  # rows of zeros: pictures that do not open
    every: Iterable[Tensor] = (
        [rows] if len(fitted) == n else _features(model, mixture, np.arange(n), Counter())
    )
    labels = torch.cat([nearest(part, centres) for part in every]).numpy()
    write_labels(
        Path(args.to),
        labels,
        k,
        mixture,
        model.settings() | {"seed": args.seed, "fit": len(fitted)},
    )
    counts |= {
        f"cell {cell:3d}": int(size) for cell, size in enumerate(np.bincount(labels, minlength=k))
    }
    print(
        work.report(
            counts,
            f"{args.to}: {n:,} samples in {k} cells; batches must not be larger than a cell, or small: merge",
        )
    )
    return 0


def kmeans(rows: Tensor, k: int, seed: int) -> Tensor:
    """Centres [k, D] of `rows` [n, D]: Lloyd's algorithm from a k-means++ start (Arthur &
    Vassilvitskii 2007).

    An empty cell takes the row that lies farthest from its centre. ValueError for fewer than k
    different rows.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    centres = rows[torch.randint(len(rows), (1,), generator=generator)]
    for found in range(1, k):
        distance = torch.relu(
            _distances(rows, centres).amin(1) - 1e-6
        )  # below: equal rows, but for rounding
        if not distance.any():
            raise ValueError(
                f"the pictures have only {found} different features; --clusters {k} must not be larger"
            )
        centres = torch.cat([centres, rows[torch.multinomial(distance, 1, generator=generator)]])
    before = None
    for _ in range(_ROUNDS):
        distance, cell = _distances(rows, centres).min(1)
        if before is not None and cell.equal(before):
            break
        before, sizes = cell, cell.bincount(minlength=k)
        centres = torch.zeros_like(centres).index_add_(0, cell, rows) / sizes.clamp(min=1)[:, None]
        empty = (sizes == 0).nonzero().flatten()
        centres[empty] = rows[distance.topk(len(empty)).indices]
    return centres


def nearest(rows: Tensor, centres: Tensor) -> Tensor:
    """The number of each row's nearest centre, [n] int64."""
    return _distances(rows, centres).argmin(1)


def _distances(rows: Tensor, centres: Tensor) -> Tensor:
    """Squared distances, [n, k]."""
    return (
        rows.square().sum(1, keepdim=True) - 2 * rows @ centres.T + centres.square().sum(1)
    ).clamp(min=0)


def _features(
    model: _encoder.Model, mixture: Mixture, ids: np.ndarray, counts: Counter[str]
) -> Iterator[Tensor]:
    return (rows for _, rows in model.batches((mixture.read(int(i)) for i in ids), counts))
