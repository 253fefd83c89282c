"""The sample at each row of each step: a pure function of (seed, step, row), in constant
memory.

What is drawn are units (`vlp.data.units`) of G rows: a sample, one of its captions, or G samples of
one origin, which stand next to each other in their batch. Units of all steps are numbered: draw =
step · B/G + position. Without weights an epoch is one pseudo-random permutation of all N units of
all sources, cut into whole batches; what remains at its end is left out (other units each epoch).
With weights every source runs through permutations of its own, one after another, and the draws are
dealt to the sources by their shares (`vlp.data.deal`). A source whose share of a batch is a whole
number of draws has exactly that many in every batch: 8 of 256 for 1/32. With `one_source` whole
batches are dealt. With `replacement` a draw
is any unit (of its source, with weights), independent of all others.

Where shards are fetched whole (`Source.window`), a permutation keeps to a window of them at a time
(`Windows`), and with lanes (`vlp.data.lanes`) each part of a batch to windows of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from vlp.data.deal import Deal
from vlp.data.lanes import draws_at
from vlp.data.permutation import Windows, permute, permute_each, uniform
from vlp.data.sources import Source
from vlp.data.units import per_shard, units_of
from vlp.seeds import derive
from vlp.types import Sample

_TRIED_AT_ONCE = 64  # stand-ins that are computed together, for each row of a batch
_SMALLEST_ROUNDED = 1e-6  # of the weights, which are fractions of denominators up to 10⁶


class Rows(NamedTuple):
    """What stands in some rows of a step."""

    samples: np.ndarray  # sample ids, int64 [rows]
    # Which caption of its sample, int64 [rows]; None where captions are not drawn by themselves.
    captions: np.ndarray | None


class _Draws(NamedTuple):
    """Some draws of a step: what each of them takes."""

    sources: np.ndarray  # int64 [n]
    units: np.ndarray  # of its source, int64 [n]
    rounds: np.ndarray  # which pass over the source the draw belongs to, int64 [n]


class Begin(NamedTuple):
    """Where batches of one size begin: the step, and how many units were drawn before it, those
    that the ends of epochs left out included.
    """

    step: int
    draw: int


class Mixture:
    """Several sources as one numbered collection: sample_id counts through the sources in order.

    Drawn are single samples, or with `together` = G > 1 groups of G of one origin, or with
    `every_caption` captions.
    """

    def __init__(
        self,
        sources: list[Source],
        weights: list[float | None],
        *,
        seed: int,
        shuffle: bool = True,
        together: int = 1,
        every_caption: bool = False,
        replacement: bool = False,
        lanes: int = 1,
        one_source: bool = False,
    ) -> None:
        weighted = [weight is not None for weight in weights]
        if any(weighted) and not all(weighted):
            raise ValueError(
                f"weights are {weights}: give every source a weight, or none "
                "(every sample once an epoch)"
            )

        self.sources = sources
        self.seed = seed
        self.shuffle = shuffle
        self.together = together
        self.every_caption = every_caption
        self.replacement = replacement
        self.one_source = one_source
        # Fractions deal exactly: with floats a source's share of a batch would drift by a draw.
        self.shares: list[Fraction] | None = None
        if all(weighted):
            stated = [weight for weight in weights if weight is not None]
            self.shares = [_share(weight) for weight in stated]

        # Sample ids: where each source begins.
        self.firsts = np.cumsum([0, *map(len, sources)])
        self.n_samples = int(self.firsts[-1])
        self.units = [units_of(source, together, every_caption, shuffle) for source in sources]
        # Here, where the source is known by its number: at the first step it would be too late.
        self._check()
        self.n_units = sum(map(len, self.units))

        # Units: where each source begins, and how many each stream of `_order` has.
        n_of_sources = list(map(len, self.units))
        self._first_units = np.cumsum([0, *n_of_sources])[:-1]
        self._stream_sizes = np.array([self.n_units, *n_of_sources])
        self._deals: dict[int, Deal] = {}
        self.lay_out(lanes)
        self._begin = Begin(0, 0)

    def lay_out(self, lanes: int) -> None:
        """Let batches have so many lanes from here on."""
        self.lanes = lanes
        self._shards = self._shards_of_streams()
        self._windows: dict[int, Windows] = {}

    def read(self, sample_id: int) -> Sample:
        """The sample with this number; raises OSError or ValueError where it cannot be read."""
        s = self.source_of(sample_id)
        # A source numbers its own samples only.
        sample = self.sources[s][sample_id - int(self.firsts[s])]
        return replace(sample, sample_id=sample_id)

    def source_of(self, sample_id: int) -> int:
        """The position of the source that a sample belongs to."""
        return int(np.searchsorted(self.firsts, sample_id, side="right")) - 1

    def steps_per_epoch(self, size: int) -> int:
        """Batches of `size` rows that an epoch gives; 0 where one cannot be filled."""
        n = size // self.together
        if self.one_source and min(map(len, self.units)) < n:
            return 0
        return self.n_units // n

    def begin(self, begin: Begin) -> None:
        """Let batches of another size follow those before step `begin.step`."""
        if self.one_source and begin.draw:
            raise ValueError(
                "data.one_source counts batches, which have one size in all of a run; leave batch "
                "out of the stages"
            )
        self._begin = begin

    def end(self, step: int, size: int) -> Begin:
        """Where batches of another size go on after those of `size` rows before `step`, so that no
        unit of an epoch is drawn twice or passed over.
        """
        n = size // self.together
        if step == self._begin.step:
            return self._begin
        # Behind the last batch, not at the next one: a smaller batch may still fit into the epoch.
        return Begin(step, self._first_draw(step - 1, n) + n)

    def identity(self) -> dict[str, Any]:
        """What the order depends on besides sources, weights, seed and shuffle; JSON-able. A
        resumed run compares it.
        """
        drawing: dict[str, Any] = {"together": self.together, "replacement": self.replacement}
        if self.one_source:
            drawing["one_source"] = True
        windows = [source.window for source in self.sources]
        if any(windows):
            drawing |= {"lanes": self.lanes, "windows": windows}
        return drawing

    def batch(self, step: int, size: int) -> np.ndarray:
        """Sample ids [size] of one step's global batch, int64; size is a multiple of G."""
        return self.rows(step, size, range(size)).samples

    def rows(self, step: int, size: int, rows: range) -> Rows:
        """What stands in some consecutive rows of a step of `size` rows; costs as much as there are
        of them, however large the step is.
        """
        # A draw fills `together` rows, and the rows may begin and end within one.
        first = rows.start // self.together
        n = -(-rows.stop // self.together) - first
        draws = self._draws(step, size // self.together, first, n)

        sample = np.empty((n, self.together), np.int64)
        caption = np.empty((n, self.together), np.int64)
        for s in np.unique(draws.sources).tolist():
            here = draws.sources == s
            key = derive(self.seed, "unit", s)
            in_source, numbers = self.units[s].rows(draws.units[here], key, draws.rounds[here])
            sample[here] = self.firsts[s] + in_source
            caption[here] = numbers

        skipped = rows.start - first * self.together
        wanted = slice(skipped, skipped + len(rows))
        captions = caption.ravel()[wanted] if self.every_caption else None
        return Rows(sample.ravel()[wanted], captions)

    def replacements(self, sample_id: int, step: int, row: int, batch: np.ndarray) -> Iterator[int]:
        """Stand-ins for a sample that cannot be read: others of its origin, then of its source, not
        in the batch while there are such.

        Rows of one batch try different stand-ins (those at positions row, row + B, … of a
        permutation), so that ranks need not know of each other's losses to avoid using one twice.
        """
        s = self.source_of(sample_id)
        first = int(self.firsts[s])
        n = self.sources[s].reserve or len(self.sources[s])
        in_source = sample_id - first
        key = derive(self.seed, "replace", step, s)
        present = set(batch.tolist())

        of_origin = [first + int(i) for i in self.units[s].others(in_source)]
        absent = [candidate for candidate in of_origin if candidate not in present]
        # Rows of one unit try different ones, as those of the batch do below.
        yield from absent[row % self.together :: self.together]

        # Where stand-ins are looked for: the first sample, how many, and which of them in the
        # order of trying.
        ranges = [(first, n, _tried(row, len(batch), n))]
        # A shard that is fetched for one sample costs as much as for all of them.
        if self.lanes > 1 and self.sources[s].window:
            ranges = [*self._in_shard_at_hand(s, row, batch), *ranges]

        for start, n_samples, positions in ranges:
            for candidate in (start + permute(n_samples, key, positions)).tolist():
                if candidate not in present:
                    yield candidate

        # A source hardly larger than the batch: share stand-ins with other rows, at last repeat.
        for may_be_present in (False, True):
            for i in range(n):
                candidate = first + int(permute(n, key, np.array([i]))[0])
                if (candidate in present) == may_be_present and candidate != sample_id:
                    yield candidate

    def _in_shard_at_hand(
        self, s: int, row: int, batch: np.ndarray
    ) -> list[tuple[int, int, np.ndarray]]:
        """Stand-ins of source s in the row's own shard or, where that is lost, in the shard of the
        nearest row that has another; none where all are lost.
        """
        source, first = self.sources[s], int(self.firsts[s])
        rows = np.flatnonzero((batch >= first) & (batch < self.firsts[s + 1]))
        shard_ends = np.cumsum(source.runs)
        shards = np.searchsorted(shard_ends, batch[rows] - first, side="right")

        distinct, samples = np.unique(shards, return_index=True)
        lost = [source.is_lost(int(batch[rows[i]]) - first) for i in samples.tolist()]
        is_lost = np.isin(shards, distinct[lost])
        if is_lost.all():
            return []
        nearest = int(np.argmin(np.where(is_lost, len(batch), np.abs(rows - row))))
        shard = int(shards[nearest])
        n = int(source.runs[shard])

        # Rows of lost shards try from the other end of the order, where no row of the shard's own
        # comes to.
        place = int(np.searchsorted(rows, row))
        alike = is_lost if is_lost[place] else shards == shard
        positions = _tried(int(alike[:place].sum()), int(alike.sum()), n)
        if is_lost[place]:
            positions = n - 1 - positions
        return [(first + int(shard_ends[shard]) - n, n, positions)]

    def _check(self) -> None:
        """Raise ValueError for sources that cannot give what is drawn from them."""
        if self.one_source and self.shares is None and len(self.sources) > 1:
            raise ValueError(
                "data.one_source chooses the source of a batch by the weights; give every source "
                "a weight, such as its number of samples"
            )
        for s, (source, units) in enumerate(zip(self.sources, self.units)):
            if not len(source):
                raise ValueError(f"source {s} holds no samples; leave it out, or fill it")
            if not len(units):
                raise ValueError(
                    f"data.together is {self.together}, but no origin in source {s} has as many "
                    "samples; variations of one origin follow one another and share the "
                    '"origin" of their JSON. Set together lower, or leave it out'
                )

            # A stream cannot jump, and whole shards cannot be fetched for one sample each.
            mixed_freely = self.shares is None and len(self.sources) > 1
            if source.reserve and (self.replacement or mixed_freely):
                raise ValueError(
                    f"source {s} is a stream, read in its own order: give every source a weight, "
                    "and leave data.replacement out"
                )
            if source.window and self.replacement:
                raise ValueError(
                    "data.replacement draws from all of a source at any time, but source "
                    f"{s} fetches whole shards in turn; copy it to a local disk (source shards), "
                    "or leave replacement out"
                )

    def _shards_of_streams(self) -> list[tuple[np.ndarray | None, int]]:
        """(units of each shard, shards in a window) of each stream that `_order` permutes; None
        where any order costs the same. Stream 0 is all sources together, stream s + 1 is source s.
        """
        width = max(source.window for source in self.sources)
        if not width:
            return [(None, 0)] * (1 + len(self.sources))

        # One source with windows makes all of them stand in runs, so that it is not read apart.
        runs = [per_shard(source, units) for source, units in zip(self.sources, self.units)]
        together = np.concatenate(runs) if self.shares is None else None
        streams = [(together, self.width(width))]

        for source, own_runs in zip(self.sources, runs):
            streams.append((own_runs if source.window else None, self.width(source.window)))
        return streams

    def width(self, window: int) -> int:
        """Shards in the window of a lane, where all lanes together read `window` at a time."""
        return -(-window // self.lanes)

    def _draws(self, step: int, n_of_step: int, first: int, n: int) -> _Draws:
        """The n draws from number `first` on of a step of `n_of_step`."""
        first_draw = self._first_draw(step, n_of_step)
        positions = first + np.arange(n)
        if self.shares is None:
            # Lanes are counted from the epoch's first draw on, and no step has draws of two epochs.
            epoch, place = divmod(first_draw, self.n_units)
            places = draws_at(positions, place, n_of_step, self.lanes)
            all_together = np.zeros(n, np.int64)
            numbers, rounds = self._order(all_together, epoch * self.n_units + places)
            sources = np.searchsorted(self._first_units, numbers, side="right") - 1
            return _Draws(sources, numbers - self._first_units[sources], rounds)

        if self.one_source:
            # Batches are dealt as single draws are, each as so many draws of its source.
            (source,), (n_before,) = Deal(self.shares, 1)(first_draw // n_of_step, 1)
            of_batch = np.full(n, source)
            units, rounds = self._order(of_batch + 1, n_before * n_of_step + positions)
            return _Draws(of_batch, units, rounds)

        # Made once for a size of batch: its fractions cost more than dealing some rows.
        if n_of_step not in self._deals:
            self._deals[n_of_step] = Deal(self.shares, n_of_step)
        draws = draws_at(positions, first_draw, n_of_step, self.lanes)
        sources, count = self._deals[n_of_step].in_lanes(draws, self.lanes)
        units, rounds = self._order(sources + 1, count)
        return _Draws(sources, units, rounds)

    def _first_draw(self, step: int, n: int) -> int:
        """The number of a step's first draw, of n a step; without weights epochs count N units."""
        steps = step - self._begin.step
        if self.shares is not None:
            return self._begin.draw + steps * n

        # An epoch is cut into whole batches: what remains at its end is left out.
        epoch, done = divmod(self._begin.draw, self.n_units)
        left_of_epoch = (self.n_units - done) // n
        if steps < left_of_epoch:
            return self._begin.draw + steps * n
        epochs, step_of_epoch = divmod(steps - left_of_epoch, self.n_units // n)
        return (epoch + 1 + epochs) * self.n_units + step_of_epoch * n

    def _order(self, stream: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Element count[i] of the endless sequence of units of stream[i], and the round of each:
        its epoch, else itself.
        """
        if self.replacement:
            number = np.empty_like(count)
            for s in np.unique(stream).tolist():
                here = stream == s
                key = derive(self.seed, "draw", s)
                number[here] = uniform(self._stream_sizes[s], key, count[here])
            return number, count

        epoch, place = np.divmod(count, self._stream_sizes[stream])
        return self._permuted(stream, epoch, place), epoch

    def _permuted(self, stream: np.ndarray, epoch: np.ndarray, place: np.ndarray) -> np.ndarray:
        """Element place[i] of the order of stream[i] in epoch[i]."""
        number = place.copy()
        pairs, which = np.unique(np.stack([stream, epoch]), axis=1, return_inverse=True)
        which = which.reshape(-1)  # numpy 2.0 keeps two dimensions

        # Those whose elements are computed alike are computed together.
        together: list[tuple[int, int, int]] = []  # the pair, and size and key of its permutation
        for pair, (s, e) in enumerate(pairs.T.tolist()):
            cannot_jump = self.sources[max(0, s - 1)].reserve
            if not self.shuffle or cannot_jump:
                continue

            key = derive(self.seed, "order", s, e)
            if self._shards[s][0] is None:
                together.append((pair, int(self._stream_sizes[s]), key))
            else:
                here = which == pair
                number[here] = self._windowed(s, key)(place[here])

        if together:
            permuted, sizes, keys = zip(*together)
            here = np.isin(which, permuted)
            own_pair = np.searchsorted(permuted, which[here])
            number[here] = permute_each(sizes, keys, own_pair, place[here])
        return number

    def _windowed(self, stream: int, key: int) -> Windows:
        """The permutation of a stream whose shards are fetched whole, kept while its epoch runs."""
        if key not in self._windows:
            if len(self._windows) > 2 * len(self._shards):  # epochs that are over
                self._windows.clear()
            runs, width = self._shards[stream]
            assert runs is not None
            self._windows[key] = Windows(runs, width, key, self.lanes)
        return self._windows[key]


def _tried(place: int, n_rows: int, n: int) -> np.ndarray:
    """The positions of n that one of `n_rows` rows tries, which no other of them does."""
    return np.arange(place, min(n, place + _TRIED_AT_ONCE * n_rows), n_rows)


def _share(weight: float) -> Fraction:
    """A weight as a fraction of few digits, which deals faster."""
    if weight < _SMALLEST_ROUNDED:  # rounded, it would be another share, or none
        return Fraction(str(weight))
    return Fraction(weight).limit_denominator(10**6)
