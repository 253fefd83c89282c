"""What the source `shards` knows of its samples: of all of them by their kinds, in columns shard by
shard.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from vlp.data.captions import TEXT_FILE, Choice, Form
from vlp.data.rows import CLASS, CONTINUES, LABELS, PICTURED, ROW, Kind, Shard
from vlp.data.summary import FIELDS, ROW_COLUMNS, kind_numbers

# A row without its digest: what runs compare since before there were digests.
_COMPARED = [field for field in FIELDS if field[0] != "digest"]


@dataclass(frozen=True)
class Kinds:
    """What follows from the kinds of all samples, without reading a row."""

    names: Counter[str]  # how many samples have a text under each name
    stand_ins: Counter[str]  # how many have their captions under another usual name
    n_several: int  # samples whose text file has several lines, which are one caption
    n: np.ndarray  # usable samples of each shard, int64
    n_without: np.ndarray  # samples of each shard that are left out for want of a text, int64
    left_out: dict[int, frozenset[int]]  # the numbers of the kinds left out, of shards with such
    one_text_each: bool  # every usable sample has exactly one
    some_without: bool  # a usable sample has its class name only
    labels: frozenset[str]
    pictured: bool
    n_negatives: int
    n_counterfactuals: int


def kinds_of(shards: Sequence[Shard], choice: Choice, with_class: bool) -> Kinds:
    """Of all samples of some shards. `with_class`: a sample without a text, but of a class, is
    usable.
    """
    names: Counter[str] = Counter()
    stand_ins: Counter[str] = Counter()
    n_several = 0
    n = np.zeros(len(shards), np.int64)
    n_without = np.zeros(len(shards), np.int64)
    left_out: dict[int, frozenset[int]] = {}
    usable: set[Kind] = set()
    numbers_of_texts = set()

    # A hundred thousand shards share a few lists of forms, each of which is looked at once.
    counted: dict[int, list[tuple[int, bool]]] = {}
    with_form: Counter[tuple[int, int]] = Counter()
    forms_of = {id(shard.forms): shard.forms for shard in shards}
    for key, forms in forms_of.items():
        counted[key] = [_count(form, choice) for form in forms]

    for s, shard in enumerate(shards):
        key = id(shard.forms)
        without = []
        for kind in shard.kinds:
            with_form[key, kind.form] += kind.n
            n_texts, has_several = counted[key][kind.form]
            if has_several:
                n_several += kind.n

            if n_texts or (with_class and kind.all_flags & CLASS):
                n[s] += kind.n
                usable.add(kind._replace(form=0, n=0))
                numbers_of_texts.add(n_texts)
            else:
                n_without[s] += kind.n
                without.append(number_of(kind))
        if without:
            left_out[s] = frozenset(without)

    for (key, number), n_samples in with_form.items():
        in_form = forms_of[key][number]
        if stand_in := choice.stand_in(in_form):
            stand_ins[stand_in] += n_samples
        names.update({"txt" if name == TEXT_FILE else name: n_samples for name in in_form})

    every_flag, some_flag = -1, 0
    for kind in usable:
        every_flag &= kind.all_flags
        some_flag |= kind.some_flags
    return Kinds(
        names,
        stand_ins,
        n_several,
        n,
        n_without,
        left_out,
        one_text_each=numbers_of_texts <= {1},
        some_without=0 in numbers_of_texts,
        labels=frozenset(name for name, flag in LABELS.items() if every_flag & flag),
        pictured=bool(some_flag & PICTURED),
        n_negatives=max((kind.negatives for kind in usable), default=0),
        n_counterfactuals=max((kind.counterfactuals for kind in usable), default=0),
    )


def _count(form: Form, choice: Choice) -> tuple[int, bool]:
    """The captions of a form, and whether its text file has more lines than are captions."""
    n_texts = choice.count(form)
    return n_texts, replace(choice, lines="each").count(form) > n_texts


def number_of(kind: Kind) -> int:
    """The number of a kind, as `kind_numbers` gives it to its rows."""
    return 2 * kind.form + bool(kind.all_flags & CLASS)


def fingerprint(shards: Sequence[Shard], choice: Choice, n_usable: np.ndarray) -> str:
    """Of all that a resumed run must find again: places, keys, texts, and which of the texts are
    captions. `n_usable` [shards]: samples.

    The content of the shards is compared beside it, with their names (`Source.contents`).
    """
    digest = hashlib.sha256(_of_choice(choice))
    for shard, n in zip(shards, n_usable.tolist()):
        digest.update(f"\n{shard.order} {shard.keys} {shard.texts} {n}".encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class Table:
    """The usable samples of one shard, in columns."""

    rows: np.ndarray  # ROW_COLUMNS [n]
    n_texts: np.ndarray  # int64 [n], captions that are not made of class names
    extents: bytes

    def has(self, flag: int) -> np.ndarray:
        """Which samples have a flag of `vlp.data.rows`, bool [n]."""
        return self.rows["flags"] & flag > 0


def table_of(body: bytes, shard: Shard, choice: Choice, left_out: frozenset[int]) -> Table:
    """The samples of a shard whose rows and extents are `body`, without those of the kinds left
    out.
    """
    n_row_bytes = shard.count * ROW.size
    rows = np.frombuffer(body[:n_row_bytes], ROW_COLUMNS)
    if left_out:
        kept = usable_rows(rows, left_out)
        # A sample whose origin's first one goes away begins its origin now.
        origin = np.cumsum(rows["flags"] & CONTINUES == 0)[kept]
        begins = np.diff(origin, prepend=0) > 0
        rows = rows[kept]
        flags = rows["flags"]
        rows["flags"] = np.where(begins, flags & ~np.uint16(CONTINUES), flags)

    by_form = np.array([choice.count(form) for form in shard.forms] or [0], np.int64)
    return Table(rows, by_form[rows["form"]], body[n_row_bytes:])


def usable_rows(rows: np.ndarray, left_out: frozenset[int]) -> np.ndarray:
    """The numbers of the rows that are of none of the kinds left out."""
    return np.flatnonzero(~np.isin(kind_numbers(rows), list(left_out)))


def earlier_fingerprint(
    tables: Callable[[], Iterable[Table]], shards: Sequence[Shard], choice: Choice
) -> str:
    """What checkpoints kept before shards had digests of their own: of the columns of all samples.
    `tables`: those of the shards, which are read three times for it.
    """
    # Each column of all samples in turn, as they once lay in memory.
    digest = hashlib.sha256()
    counts = []
    for table in tables():
        compared = np.zeros(len(table.rows), np.dtype(_COMPARED))
        for name, _ in _COMPARED:
            if name != "form":  # its number depends on what else the shard holds
                compared[name] = table.rows[name]
        digest.update(compared.tobytes())
        counts.append(len(compared))
    for s, n in enumerate(counts):
        digest.update(np.full(n, s, np.int32).tobytes())
    for table in tables():
        digest.update(table.n_texts.tobytes())

    digest.update(_of_choice(choice))
    for shard, table in zip(shards, tables()):
        digest.update(f"{shard.keys} {shard.texts}".encode() + table.extents)
    return digest.hexdigest()


def _of_choice(choice: Choice) -> bytes:
    return repr(choice).encode() + (repr(choice.roles).encode() if choice.roles else b"")
