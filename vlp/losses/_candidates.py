"""What each candidate of a row is, decided inside a tile: its positive, a negative, or neither.

A `Rule` names entries of a tile from scores and values of its own; it has no gradient. Numbers of
labels stay whole numbers, so that any are compared exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vlp.losses._candidate_options import Candidates
from vlp.losses._inputs import Inputs
from vlp.pairwise import Pairs, Reduction, Tile, in_students_dtype

# (entries that the rule names of each row, and of each column), [m, n] bool
Named = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Rule:
    """A function of the term's cosines and of a tile of the rule's own scores and values."""

    names: Callable[[Tensor, Tile], Named]
    left: tuple[Tensor, ...] = ()  # [b, D']
    right: tuple[Tensor, ...] = ()  # [c, D']
    row_values: tuple[Tensor, ...] = ()  # [b]
    column_values: tuple[Tensor, ...] = ()  # [c]

    @property
    def transposed(self) -> Rule:
        """The same of columns against rows. (Every rule asks the same of both.)"""
        return replace(
            self,
            left=self.right,
            right=self.left,
            row_values=self.column_values,
            column_values=self.row_values,
        )


def same(numbers: Tensor) -> Rule:
    """Rows and columns of one number."""
    return Rule(_same, row_values=(numbers,), column_values=(numbers,))


def same_as_key(numbers: Tensor, of_keys: Tensor, holds_key: Tensor) -> Rule:
    """Rows and keys of one number, where there is a key."""
    return Rule(_same, row_values=(numbers,), column_values=(of_keys, holds_key))


def _same(cosines: Tensor, tile: Tile) -> Named:
    numbers, *taking_part = tile.column_values
    equal = tile.row_values[0].unsqueeze(1) == numbers.unsqueeze(0)
    for holds_key in taking_part:
        equal = equal & holds_key.unsqueeze(0)
    return equal, equal


def beyond(cosine: Tensor, margin: float, columns: Tensor | None) -> Rule:
    """Entries more than `margin` above the positive of their row, and of their column."""

    def names(cosines: Tensor, tile: Tile) -> Named:
        by_row = cosines > tile.row_values[0].unsqueeze(1) + margin
        # A queue's keys have no positive.
        if not tile.column_values:
            return by_row, by_row
        return by_row, cosines > tile.column_values[0].unsqueeze(0) + margin

    return Rule(names, row_values=(cosine,), column_values=() if columns is None else (columns,))


def alike(left: Tensor, right: Tensor, above: float) -> Rule:
    """Entries whose rows of another model have a cosine of `above` or more."""

    def names(cosines: Tensor, tile: Tile) -> Named:
        close = tile.scores[0] >= above
        return close, close

    return Rule(names, left=(left,), right=(right,))


def absent(holds_key: Tensor) -> Rule:
    """Columns that hold nothing."""

    def names(cosines: Tensor, tile: Tile) -> Named:
        empty = (~tile.column_values[0]).unsqueeze(0).expand_as(cosines)
        return empty, empty

    return Rule(names, column_values=(holds_key,))


def below(by_row: Tensor, by_column: Tensor | None = None) -> Rule:
    """Entries under a threshold of their row, and under one of their column."""

    def names(cosines: Tensor, tile: Tile) -> Named:
        rows = cosines < tile.row_values[0].unsqueeze(1)
        if not tile.column_values:
            return rows, rows
        return rows, cosines < tile.column_values[0].unsqueeze(0)

    return Rule(
        names, row_values=(by_row,), column_values=() if by_column is None else (by_column,)
    )


@dataclass(frozen=True)
class Masks:
    """What the entries of a tile are, [m, n] bool each."""

    further: Tensor  # positives but the row's own pair
    kept: Named  # negatives that no rule ignores, of rows and of columns
    hard: Named  # those of them that are compared with


@dataclass(frozen=True)
class Chosen:
    """The rules of a call: who is a positive, who is ignored, who is too easy."""

    positives: Rule | None = None
    ignored: tuple[Rule, ...] = ()
    easy: Rule | None = None

    @property
    def rules(self) -> tuple[Rule, ...]:
        """All rules, in the order in which a tile carries their tensors."""
        ends = tuple(rule for rule in (self.positives, self.easy) if rule is not None)
        return (*ends, *self.ignored)

    @property
    def transposed(self) -> Chosen:
        """The rules of columns against rows, without those of the hardest."""
        positives = None if self.positives is None else self.positives.transposed
        return Chosen(positives, tuple(rule.transposed for rule in self.ignored))

    def reduce(
        self,
        pairs: Pairs,
        function: Callable[[Tile, Masks], tuple[Tensor, ...]],
        left: Tensor,  # [b, D]
        right: Tensor,  # [c, D]
        *,
        rows: tuple[str, ...],
        columns: tuple[str, ...] = (),
        row_values: Sequence[Tensor] = (),
        column_values: Sequence[Tensor] = (),
        shared: Sequence[Tensor] = (),
        paired: bool = True,
    ) -> tuple[Tensor, ...]:
        """`Pairs.reduce` of a tile function that is told what the entries are."""

        def masked(tile: Tile) -> tuple[Tensor, ...]:
            own, masks = self._masks(tile, len(row_values), len(column_values))
            return function(own, masks)

        return pairs.reduce(
            Reduction(masked, rows=rows, columns=columns),
            [left, *self._all("left")],
            [right, *self._all("right")],
            row_values=[*row_values, *self._all("row_values")],
            column_values=[*column_values, *self._all("column_values")],
            shared=shared,
            paired=paired,
        )

    def threshold(
        self, pairs: Pairs, left: Tensor, right: Tensor, k: int, *, paired: bool = True
    ) -> Tensor:
        """[b] cosines that the k hardest kept negatives of a row lie above, and no other does.

        Midway between the k-th and the next, so that rounding decides nothing; −∞ where there is no
        next. Of equal scores around the k-th all are above, or none but they.
        """

        def scores(tile: Tile) -> Tensor:
            own, masks = self._masks(tile, 0, 0)
            return own.scores[0].masked_fill(~masks.kept[0], -torch.inf)

        best = pairs.highest(
            scores,
            [left, *self._all("left")],
            [right, *self._all("right")],
            k + 1,
            row_values=self._all("row_values"),
            column_values=self._all("column_values"),
            paired=paired,
        )
        return (best[:, -2] + best[:, -1]) / 2

    def _all(self, name: str) -> list[Tensor]:
        return [tensor for rule in self.rules for tensor in getattr(rule, name)]

    def _masks(self, tile: Tile, n_row_values: int, n_column_values: int) -> tuple[Tile, Masks]:
        """(the tile of the term's own scores and values, what its entries are)."""
        cosines = tile.scores[0].detach()
        own, rest = _split(tile, 1, n_row_values, n_column_values)

        # Each rule takes its tensors off the front, in the order in which they were given.
        named: dict[int, Named] = {}
        for rule in self.rules:
            sizes = len(rule.left), len(rule.row_values), len(rule.column_values)
            of_rule, rest = _split(rest, *sizes)
            named[id(rule)] = rule.names(cosines, of_rule)

        pair = tile.positive
        positives = pair if self.positives is None else named[id(self.positives)][0] | pair

        # A positive is set apart first: no rule can take it away.
        kept = []
        for side in (0, 1):
            negatives = ~positives
            for rule in self.ignored:
                negatives = negatives & ~named[id(rule)][side]
            kept.append(negatives)

        hard = kept
        if self.easy is not None:
            hard = [mask & ~too_easy for mask, too_easy in zip(kept, named[id(self.easy)])]
        return own, Masks(positives & ~pair, (kept[0], kept[1]), (hard[0], hard[1]))


def _split(tile: Tile, n_scores: int, n_rows: int, n_columns: int) -> tuple[Tile, Tile]:
    """(the first scores and values of a tile, the others)."""

    def part(scores: slice, rows: slice, columns: slice) -> Tile:
        return replace(
            tile,
            scores=tile.scores[scores],
            row_values=tile.row_values[rows],
            column_values=tile.column_values[columns],
        )

    first = part(slice(n_scores), slice(n_rows), slice(n_columns))
    rest = part(slice(n_scores, None), slice(n_rows, None), slice(n_columns, None))
    return first, rest


def of_batch(inputs: Inputs, pairs: Pairs, options: Candidates) -> Chosen:
    """The rules of images against texts of the batch."""
    positives = same(inputs.label) if options.positives != "none" else None
    ignore, rules = options.ignore, []
    if ignore.same_label:
        rules.append(same(inputs.label))
    if ignore.cluster:
        rules.append(same(inputs.cluster))
    if ignore.margin is not None:
        cosine = cosines_of(inputs)
        rules.append(beyond(cosine, ignore.margin, cosine))
    if ignore.teacher is not None:
        rules.append(alike(*_teachers_rows(inputs, ignore.teacher.of), ignore.teacher.above))

    chosen = Chosen(positives, tuple(rules))
    if options.hardest is None:
        return chosen
    by_row = chosen.threshold(pairs, inputs.image, inputs.text, options.hardest)
    by_column = chosen.transposed.threshold(pairs, inputs.text, inputs.image, options.hardest)
    return replace(chosen, easy=below(by_row, by_column))


def cosines_of(inputs: Inputs) -> Tensor:
    """s_ii, [b], without gradient."""
    wide: Any = inputs.wide()
    return (wide.image * wide.text).sum(1).detach()


def _teachers_rows(inputs: Inputs, of: str) -> tuple[Tensor, Tensor]:
    """The rows and columns that a teacher compares, without gradient."""
    rows = {
        "image": (inputs.teacher_image, inputs.teacher_image),
        "text": (inputs.teacher_text, inputs.teacher_text),
        "cross": (inputs.teacher_image, inputs.teacher_text),
    }
    left, right = (in_students_dtype(inputs.image, side.detach()) for side in rows[of])
    return left, right
