"""Centres of cells in a tree, so that the cells near a row are found in time ∝ the tree's depth.

A node's rows are divided by K-means (FAISS) among at most BRANCHES children, and theirs again,
until a node has few enough rows: it is a cell. A row goes down from the root along the `beam` nodes
of each level whose centres are nearest to it, and ends in several cells. The tree is that of Nistér
and Stewénius, "Scalable Recognition with a Vocabulary Tree" (CVPR 2006), who follow one path.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

BRANCHES = 32
_FITTED = 64  # rows a child that its centre is fitted to, at most
_ROUNDS = 10  # of K-means
_AT_ONCE = 1 << 14  # rows that are divided among a node's children at once

Gathered = Callable[[np.ndarray], np.ndarray]  # of numbers that rise, rows [n, D] float16


class Tree:
    """Nodes level by level from the root on; the children of a node follow one another."""

    def __init__(self, centres: np.ndarray, children: np.ndarray) -> None:
        """`centres` [N, D] float32: unit rows, zeros of the root; `children` [N, 2] int64: the
        first child of each node and the end, equal where the node is a cell.
        """
        self.centres = centres
        self.children = np.array(children)
        first, end = self.children.T
        self.has_children = first < end
        n_divided = np.concatenate([[0], np.cumsum(self.has_children)])
        self.has_grandchildren = n_divided[end] > n_divided[first]

    @cached_property
    def cells(self) -> np.ndarray:
        """The number of each node's cell, int64 [N]; of no meaning where it has children."""
        return np.cumsum(~self.has_children) - 1

    @property
    def n_cells(self) -> int:
        return int((~self.has_children).sum())

    @property
    def most_children(self) -> int:
        """The children of the node that has the most; one at least."""
        return max(1, int((self.children[:, 1] - self.children[:, 0]).max()))


def fitted(numbers: np.ndarray, gathered: Gathered, rows_a_cell: float, cosine: float) -> Tree:
    """The tree whose cells have at most twice `rows_a_cell` of the rows of some numbers, which
    rise. Where the mean cosine is `cosine` or more, all are copies: a cell may have any number.
    """
    width = gathered(numbers[:0]).shape[1]
    centres = [np.zeros((1, width), np.float32)]
    children: list[tuple[int, int]] = []
    n_nodes = 1
    # Level by level: the nodes whose number is known wait for theirs to be divided.
    waiting = [numbers]
    while waiting:
        next_level: list[np.ndarray] = []
        for of_node in waiting:
            of_children = _divided(of_node, gathered, rows_a_cell, cosine)
            if of_children is not None:
                centres.append(of_children[0])
                next_level += of_children[1]
            n_children = 0 if of_children is None else len(of_children[0])
            children.append((n_nodes, n_nodes + n_children))
            n_nodes += n_children
        waiting = next_level
    return Tree(np.concatenate(centres), np.array(children, np.int64))


def _divided(
    numbers: np.ndarray, gathered: Gathered, rows_a_cell: float, cosine: float
) -> tuple[np.ndarray, list[np.ndarray]] | None:
    """(the centres of a node's children, the numbers of the rows of each); None for a cell."""
    from vlp.eval.search.nearest import import_faiss

    n_children = _n_children(len(numbers) / rows_a_cell)
    if n_children < 2:
        return None
    places = np.linspace(0, len(numbers) - 1, min(len(numbers), _FITTED * n_children))
    rows = gathered(numbers[places.astype(np.int64)]).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    # The square of the mean row is the mean cosine of all pairs.
    if np.square(rows.mean(0)).sum() >= cosine:
        return None

    kmeans = import_faiss().Kmeans(
        rows.shape[1], n_children, niter=_ROUNDS, spherical=True, seed=1, min_points_per_centroid=1
    )
    kmeans.train(rows)
    centres = _merged(kmeans.centroids, rows, cosine)
    nearest = np.empty(len(numbers), np.int64)
    for start in range(0, len(numbers), _AT_ONCE):
        block = slice(start, start + _AT_ONCE)
        nearest[block] = (gathered(numbers[block]).astype(np.float32) @ centres.T).argmax(1)

    # Equal rows cannot be divided.
    used = np.unique(nearest)
    if len(used) == 1:
        return None
    return centres[used], [numbers[nearest == child] for child in used]


def _merged(centres: np.ndarray, rows: np.ndarray, cosine: float) -> np.ndarray:
    """The centres of children, those in one whose rows are copies of each other on average: cells
    far apart within a crowd would each keep one of it.
    """
    nearest = (rows @ centres.T).argmax(1)
    used, of_rows = np.unique(nearest, return_inverse=True)
    means = np.stack([rows[of_rows == child].mean(0) for child in range(len(used))])
    are_copies = means @ means.T >= cosine

    # Each goes to the first child before it that it fits and that stays itself.
    into = np.arange(len(used))
    for child in range(len(used)):
        stay = np.flatnonzero(are_copies[child, :child] & (into[:child] == np.arange(child)))
        into[child] = stay[0] if len(stay) else child
    sums = np.stack([rows[into[of_rows] == child].sum(0) for child in np.unique(into)])
    return sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)


def _n_children(n_cells: float) -> int:
    """How many children a node of so many cells has: as many on each of the fewest levels."""
    if n_cells < 2:
        return 1
    n_levels = np.ceil(np.log(n_cells) / np.log(BRANCHES) - 1e-9)
    return int(np.ceil(n_cells ** (1 / n_levels) - 1e-9))


class Descent:
    """The way of rows down a tree, on a device."""

    def __init__(self, tree: Tree, beam: int, device: str) -> None:
        import torch

        self.tree = tree
        self.beam = beam
        self.centres = torch.from_numpy(np.array(tree.centres)).to(device)

    def cells(self, rows: Tensor, n_cells: int) -> np.ndarray:
        """The cells [m, ≤ n_cells] in which unit rows [m, D] end, the nearest first; -1: none."""
        nodes = np.zeros((len(rows), 1), np.int64)
        scores = rows.new_zeros((len(rows), 1))
        while (self.tree.has_children[nodes] & (nodes >= 0)).any():
            # On the last level no more are asked for than are wanted, which takes half the time.
            goes_on = (self.tree.has_grandchildren[nodes] & (nodes >= 0)).any()
            nodes, scores = self._one_level_down(
                rows, nodes, scores, self.beam if goes_on else n_cells
            )
        nodes = nodes[:, :n_cells]
        return np.where(nodes >= 0, self.tree.cells[nodes], -1)

    def _one_level_down(
        self, rows: Tensor, nodes: np.ndarray, scores: Tensor, most: int
    ) -> tuple[np.ndarray, Tensor]:
        """The nearest of the children of `nodes` [m, w], and of those nodes that are cells."""
        import torch

        n_columns = self.tree.most_children
        candidates = self._scored(rows, nodes, scores).view(len(rows), -1)
        best = candidates.topk(min(most, candidates.shape[1]), 1)
        places = best.indices.cpu().numpy()

        parents = np.take_along_axis(nodes, places // n_columns, 1)
        of_parents = self.tree.children[parents, 0] + places % n_columns
        nearest = np.where(self.tree.has_children[parents], of_parents, parents)
        nearest[(best.values == -torch.inf).cpu().numpy()] = -1
        return nearest, best.values

    def _scored(self, rows: Tensor, nodes: np.ndarray, scores: Tensor) -> Tensor:
        """The scores of all children of each of `nodes` [m, w], [m · w, most_children]; a cell has
        its own score in the first place, and -inf is of no child.
        """
        import torch

        tree, width = self.tree, nodes.shape[1]
        # One product for all rows that have come to a node.
        order = np.argsort(nodes, axis=None, kind="stable")
        in_order = nodes.ravel()[order]
        scored = rows.new_full((nodes.size, tree.most_children), -torch.inf)
        starts = np.flatnonzero(np.diff(in_order, prepend=-2))
        for start, stop in zip(starts.tolist(), [*starts[1:].tolist(), nodes.size]):
            node, places = int(in_order[start]), order[start:stop]
            if node >= 0 and tree.has_children[node]:
                first, end = tree.children[node].tolist()
                of_node = rows[torch.from_numpy(places // width).to(rows.device)]
                scored[start:stop, : end - first] = of_node @ self.centres[first:end].T
            elif node >= 0:
                scored[start:stop, 0] = scores.flatten()[torch.from_numpy(places).to(rows.device)]

        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return scored.index_select(0, torch.from_numpy(back).to(rows.device))
