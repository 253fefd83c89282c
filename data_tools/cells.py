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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vlp.data.stored import destination_file
from vlp.data_tools import _encoder
from vlp.data_tools._run import work

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from vlp.config.data import Data
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
        help="a YAML file, or the name of an installed configuration, "
        "whose `data` section names the samples",
    )
    add(
        "--to",
        required=True,
        type=destination_file,
        metavar="FILE",
        help="file to write, .safetensors",
    )
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
    work.ray_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Fit, label, write, and print the sizes of the cells."""
    from vlp import config

    pool = work.Pool(ray=work.on_cluster(args)).of_model(args.device)
    data = config.load(config.find(args.config)).data
    model = _encoder.Model.named(args)

    # One job: the centres are of samples from everywhere.
    label = Label(args.clusters, args.fit, args.seed, model, args.to)
    for _, report in pool.finished(label, [data]):
        print(report)
    return 0


@dataclass(frozen=True)
class Label:
    """The whole work on the samples of a configuration."""

    clusters: int
    fit: int
    seed: int
    model: _encoder.Model
    to: Path

    def __call__(self, data: Data) -> str:
        import numpy as np
        import torch

        from vlp.data.cells import write_labels
        from vlp.data.mix import Mixture
        from vlp.data.permutation import permute
        from vlp.seeds import derive

        sources = [plugin.module.open(plugin.options, data.captions) for plugin in data.sources]
        mixture = Mixture(sources, [None] * len(sources), seed=self.seed, shuffle=False)
        n, k = mixture.n_samples, self.clusters
        n_fitted = min(n, self.fit)
        if not 2 <= k <= n_fitted:
            raise ValueError(
                f"--clusters {k} must lie between 2 and the {n_fitted} samples that are fitted; "
                "set it lower"
            )

        # In the order of the shards, because samples are read one after the other.
        counts: Counter[str] = Counter()
        fitted = np.sort(permute(n, derive(self.seed, "fit"), np.arange(n_fitted)))
        rows = torch.cat(list(_features(self.model, mixture, fitted, counts)))
        opened = rows[rows.any(1)]  # rows of zeros: pictures that do not open
        centres = kmeans(opened, k, derive(self.seed, "kmeans"))

        # Where all samples were fitted, their features are there already.
        parts: Iterable[Tensor] = [rows]
        if n_fitted < n:
            parts = _features(self.model, mixture, np.arange(n), Counter())
        labels = torch.cat([nearest(part, centres) for part in parts]).numpy()
        settings = self.model.settings() | {"seed": self.seed, "fit": n_fitted}
        write_labels(self.to, labels, k, mixture, settings)

        for cell, size in enumerate(np.bincount(labels, minlength=k).tolist()):
            if size:
                counts[f"cell {cell:3d}"] = size
        title = f"{self.to}: {n:,} samples in {k} cells; "
        title += "batches must not be larger than a cell, or small: merge"
        return work.report(counts, title)


def kmeans(rows: Tensor, k: int, seed: int) -> Tensor:
    """Centres [k, D] of `rows` [n, D]: Lloyd's algorithm from a k-means++ start (Arthur &
    Vassilvitskii 2007).

    An empty cell takes the row that lies farthest from its centre. ValueError for fewer than k
    different rows.
    """
    import torch

    # k-means++: each further centre is drawn in proportion to its squared distance to the nearest.
    generator = torch.Generator().manual_seed(seed)
    centres = rows[torch.randint(len(rows), (1,), generator=generator)]
    for n_centres in range(1, k):
        distance = _distances(rows, centres).amin(1)
        distance = torch.relu(distance - 1e-6)  # equal rows differ by rounding
        if not distance.any():
            raise ValueError(
                f"the pictures have only {n_centres} different features; "
                f"--clusters {k} must not be larger"
            )
        drawn = torch.multinomial(distance, 1, generator=generator)
        centres = torch.cat([centres, rows[drawn]])

    before = None
    for _ in range(_ROUNDS):
        distance, cell = _distances(rows, centres).min(1)
        if before is not None and cell.equal(before):
            break
        before = cell
        sizes = cell.bincount(minlength=k)
        centres = torch.zeros_like(centres).index_add_(0, cell, rows) / sizes.clamp(min=1)[:, None]

        # Lloyd's algorithm alone would leave an empty cell at zero for good.
        empty = (sizes == 0).nonzero().flatten()
        centres[empty] = rows[distance.topk(len(empty)).indices]
    return centres


def nearest(rows: Tensor, centres: Tensor) -> Tensor:
    """The number of each row's nearest centre, [n] int64."""
    return _distances(rows, centres).argmin(1)


def _distances(rows: Tensor, centres: Tensor) -> Tensor:
    """Squared distances, [n, k]."""
    row_squares = rows.square().sum(1, keepdim=True)
    centre_squares = centres.square().sum(1)
    squared = row_squares - 2 * rows @ centres.T + centre_squares
    return squared.clamp(min=0)  # rounding may bring it below


def _features(
    model: _encoder.Model, mixture: Mixture, ids: np.ndarray, counts: Counter[str]
) -> Iterator[Tensor]:
    samples = (mixture.read(int(i)) for i in ids)
    return (rows for _, rows in model.batches(samples, counts))
