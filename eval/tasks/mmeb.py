"""MMEB (Jiang et al. 2024, arXiv 2410.05160): queries of a picture, a text and an instruction, each
with candidates of its own; how often the right one comes first.

Published (TIGER-Lab/MMEB-eval): a folder a data set, with parquet files of `qry_text, qry_img_path,
tgt_text, tgt_img_path`; the last two are lists, the right candidate first. An empty path is no
picture, `<|image_1|>` in a text the picture's place, and the instruction part of the text; columns
`qry_inst` and `tgt_inst`, as MMEB-V2 has them, are put before it. Pictures lie in images.zip, which
is to be unpacked. Lists of JSON (.jsonl, .json) with these columns do as well.

Reported are the precision at 1 of every data set, and their mean. A candidate that repeats the
right one is left out; a tie is wrong, where the release takes the first of equals.

Source: TIGER-AI-Lab/VLM2Vec@1640113, `eval.py`, and @01a6f92, `src/dataset.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from vlp.data.members import is_hidden
from vlp.eval import choices, queries
from vlp.eval.datasets.annotated import Wanted
from vlp.eval.datasets.tables import need_keys, read_rows
from vlp.eval.embed import Context
from vlp.eval.models import Encoder
from vlp.eval.pictures import DataError, Picture
from vlp.eval.queries import Entry, Query
from vlp.eval.tasks import TaskResult

VERSION = 1
KNOWN_AS = "image_caption_selection"
MAIN = "mean"
COLUMNS = ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path")
INSTRUCTIONS = ("qry_inst", "tgt_inst")
TABLES = (".parquet", ".jsonl", ".json")  # forms whose cells may be lists
_PART = re.compile(r"-\d{5}-of-\d{5}$")  # of a parquet file's name


@dataclass(frozen=True)
class Options:
    """Where the published files are, and what stands for a picture with a text."""

    data: str  # the folder with a folder a data set, one of these, or a table
    images: str | None = None  # a folder or a .tar; None: beside the data
    # names of the data sets to evaluate; empty: all that are there
    subsets: list[str] = field(default_factory=list)
    # a picture with a text: by the model, as one (multimodal language models), as the picture or
    # the text alone, or as the sum of both embeddings
    together: Literal["model", "image", "text", "sum"] = "model"
    missing: Literal["error", "skip"] = "error"  # queries without one of their images


@dataclass
class QuerySet:
    """The queries of all data sets, opened and checked."""

    queries: list[Query]
    skipped: list[str]  # images that are not there
    n_repeated: int  # candidates that repeat the right one


def scores(options: Options) -> list[str]:
    """The precision of each data set, and their mean."""
    return choices.score_names(_files(options))


def read(options: Options) -> QuerySet:
    """The queries whose pictures are there."""
    path = Path(options.data)
    wanted = Wanted(options.images or (path if path.is_dir() else path.parent))
    usable: list[Query] = []
    n_repeated = 0
    for group, files in _files(options).items():
        for file in files:
            rows = read_rows(file, (*COLUMNS, *INSTRUCTIONS))
            need_keys(rows, COLUMNS, file)
            for number, row in enumerate(rows):
                query, n_same = _query(row, f"{file}: row {number}", group, wanted)
                n_repeated += n_same
                if query is not None:
                    usable.append(query)

    wanted.refuse_missing(options.missing)
    if not usable:
        raise DataError(f"{path} holds no query; is this the published folder?")
    return QuerySet(usable, wanted.absent, n_repeated)


def _files(options: Options) -> dict[str, list[Path]]:
    """The tables of each data set by its name: its folder's, or the file's."""
    path = Path(options.data)
    if not path.exists():
        raise DataError(f"no queries at {path}; give the folder of MMEB-eval, or a table")
    tables = [path] if path.is_file() else sorted(path.rglob("*"))
    tables = [file for file in tables if file.suffix in TABLES and not is_hidden(file.name)]

    groups: dict[str, list[Path]] = {}
    for file in tables:
        is_apart = path.is_dir() and file.parent != path
        name = file.relative_to(path).parts[0] if is_apart else _PART.sub("", file.stem)
        groups.setdefault(name, []).append(file)
    if not groups:
        raise DataError(
            f"{path} holds no table ({', '.join(TABLES)}); give the folder of MMEB-eval, or a table"
        )

    unknown = [name for name in options.subsets if name not in groups]
    if unknown:
        raise DataError(
            f"{path} has no data set {', '.join(map(repr, unknown))}; it has {', '.join(groups)}"
        )
    return {name: groups[name] for name in options.subsets or groups}


def _query(row: dict[str, Any], place: str, group: str, wanted: Wanted) -> tuple[Query | None, int]:
    """A row as a query, and how many of its candidates repeat the right one; None where a picture
    is not there.
    """
    texts, paths = row["tgt_text"], row["tgt_img_path"]
    # One text may stand for all candidates, as where these are pictures alone.
    if isinstance(paths, list) and (texts is None or isinstance(texts, str)):
        texts = [texts or ""] * len(paths)
    if isinstance(texts, list) and (paths is None or isinstance(paths, str)):
        paths = [paths or ""] * len(texts)
    if not isinstance(texts, list) or not isinstance(paths, list) or len(texts) != len(paths):
        raise DataError(
            f"{place}: found tgt_text {str(texts)[:40]} and tgt_img_path {str(paths)[:40]}, "
            "expected two lists of one length"
        )
    if not texts:
        raise DataError(f"{place}: tgt_text and tgt_img_path are empty, expected candidates")

    asked = _entry(row["qry_text"], row["qry_img_path"], row.get("qry_inst"), place, wanted)
    every = [
        _entry(text, path, row.get("tgt_inst"), place, wanted) for text, path in zip(texts, paths)
    ]
    if asked is None or any(entry is None for entry in every):
        return None, 0

    # Candidates of one answer may be written twice.
    candidates = tuple(dict.fromkeys(entry for entry in every if entry is not None))
    return Query(asked, candidates, group), every[1:].count(every[0])


def _entry(text: Any, path: Any, instruction: Any, place: str, wanted: Wanted) -> Entry | None:
    """A text and the name of a picture, both of which may be empty, not both; None where the
    picture is not there.
    """
    for written in (text, instruction):
        if written is not None and not isinstance(written, str):
            raise DataError(
                f"{place}: found {str(written)[:40]} in place of a text; expected words"
            )
    words = " ".join(filter(None, (instruction, text)))
    picture: Picture | None = None
    if path:
        picture = wanted.find(path)
        if picture is None:
            return None
    entry = Entry.of(words, picture)
    if picture is None and not entry.words:
        raise DataError(f"{place}: a query or candidate has neither text nor picture")
    return entry


def run(encoder: Encoder, data: QuerySet, options: Options, context: Context) -> TaskResult:
    """The precision at 1 of each data set, and their mean."""
    queries.check(encoder, data.queries, options.together)
    hits = queries.hits(encoder, data.queries, options.together, context)

    entries = chain.from_iterable(map(_entries, data.queries))
    result = TaskResult(
        "mmeb",
        counts={
            "items": len(data.queries),
            "candidates": sum(len(query.candidates) for query in data.queries),
            "repeated": data.n_repeated,
            "skipped": len(data.skipped),
        },
        digest=context.digest(
            [entry.picture for entry in entries if entry.picture is not None],
            [_written(query) for query in data.queries],
        ),
    )
    by_guessing = [1 / len(query.candidates) for query in data.queries]
    choices.score_groups(result, hits, by_guessing, [query.group for query in data.queries])
    return result


def _entries(query: Query) -> Iterator[Entry]:
    yield query.asked
    yield from query.candidates


def _written(query: Query) -> list[Any]:
    """What of a query is not its pictures."""
    texts = [(entry.before, entry.after, entry.picture is not None) for entry in _entries(query)]
    return [query.group, *texts]
