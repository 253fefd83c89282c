"""`vlp search`: the pictures of a collection that are nearest to a text or to a picture.

cosine(q, x_i) of unit rows, the embedding q of a query and x_i of each picture; exact up to a
million pictures, above by an inverted file of FAISS where it is installed. With --stored-as the
rows are held in a byte or a bit a number, and the best by those compared as floats.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

from vlp.eval import narrow
from vlp.eval.search import options as shared

if TYPE_CHECKING:
    from torch import Tensor

    from vlp.eval.models import Encoder
    from vlp.eval.pictures import Picture
    from vlp.eval.quantised import Kind
    from vlp.eval.search.library import Library

HELP = "find the pictures of a folder or of shards that fit a text or a picture"
EXAMPLE = """examples:
  vlp search exported/demo photos "a red bicycle" "two dogs"
  vlp search ViT-B-32:laion2b_s34b_b79k "shards/{000..041}.tar" "a red bicycle" --html found.html
  vlp search runs/demo photos --image example.jpg --top 5
  vlp search exported/demo photos "two dogs" --stored-as binary --rescore 8
  vlp search exported/demo photos                    asks for queries, a line each

PHOTOS: a folder, a tar, a pattern of tars, a picture; several joined by ::. They are embedded once:
the next call, and one that goes on where another was stopped, embeds what is new.
"""


FLOAT = "float16"  # as a library's rows are
RESCORE = 4


@dataclass(frozen=True)
class Stored:
    """How rows of fewer bits are searched."""

    kind: Kind
    rescore: int = RESCORE  # of the top·rescore nearest by them the top by float


class Match(NamedTuple):
    """A picture of the collection and its cosine with the query."""

    picture: Picture
    score: float


@dataclass(frozen=True)
class Answer:
    """A query with its nearest pictures, nearest first."""

    query: str
    matches: list[Match]
    example: Picture | None = None  # where the query is a picture


def arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="a run, an export, or any reference of `vlp eval`")
    add("photos", metavar="PHOTOS", help="what is searched (see below)")
    add("queries", nargs="*", metavar="QUERY", help="texts; none: lines of the standard input")
    add("--image", action="append", default=[], metavar="FILE", help="a picture as a query")
    add("--top", type=int, default=10, metavar="N", help="answers a query (default: %(default)s)")
    stored_help = "hold a byte (int8) or a bit (binary) a number instead of two bytes"
    add("--stored-as", choices=(FLOAT, "int8", "binary"), default=FLOAT, help=stored_help)
    rescore_help = f"of --stored-as: compare M times as many as floats (default: {RESCORE})"
    add("--rescore", type=int, metavar="M", help=rescore_help)
    add("--html", metavar="FILE", help="write the answers as one page with thumbnails")
    add("--json", metavar="FILE", help="write the answers as JSON")
    shared.arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Carry out the command; returns the exit status. Wrong input is a ValueError that helps."""
    _check(options)

    from vlp.eval.pictures import Picture
    from vlp.eval.search import library
    from vlp.eval.search.listing import pictures_in

    # What is mistyped shows before a model is loaded.
    pictures = pictures_in(options.photos)
    examples = [Picture(name, name) for name in options.image]
    for example in examples:
        example.open()

    encoder = shared.encoder(options)
    folder = Path(options.index) if options.index else library.place_of(encoder, options.photos)
    context = shared.context(options, encoder.device)
    opened = library.update(folder, encoder, pictures, context)
    if not options.quiet:
        n = len(opened.pictures)
        print(f"{n:,} pictures, embedded by {encoder.name} in {folder}", file=sys.stderr)

    stored = _stored(options)
    if stored is not None and not options.quiet:
        print(_sizes(opened, stored), file=sys.stderr)

    answers = []
    for answer in _answers(opened, encoder, options.queries, examples, options.top, stored):
        print(_lines(answer), flush=True)
        answers.append(answer)
    _write(options, answers)
    return 0


def _check(options: argparse.Namespace) -> None:
    """Refuse what could not be carried out to the end."""
    if options.top < 1:
        raise ValueError(f"--top is {options.top}; expected at least 1")
    if options.rescore is not None and options.stored_as == FLOAT:
        raise ValueError("--rescore belongs to --stored-as int8 or binary; name one of them")
    if options.rescore is not None and options.rescore < 1:
        raise ValueError(f"--rescore is {options.rescore}; expected at least 1")
    narrow.check(options.width)
    # An unset variable of a script, say: the model would answer it with some pictures.
    if not all(query.strip() for query in options.queries):
        raise ValueError(
            "a QUERY is empty; expected a text, such as 'a red ball' (without any QUERY the lines "
            "of the standard input are read)"
        )
    for name in ("html", "json"):
        target = getattr(options, name)
        if target and Path(target).is_dir():
            example = Path(target) / f"found.{name}"
            raise ValueError(f"--{name} {target} is a folder; name a file, such as {example}")
    for example in options.image:
        if not Path(example).is_file():
            raise ValueError(f"--image {example}: there is no such file")


def _stored(options: argparse.Namespace) -> Stored | None:
    """The rows of fewer bits that are asked for; None: the library's own."""
    if options.stored_as == FLOAT:
        return None
    return Stored(options.stored_as, RESCORE if options.rescore is None else options.rescore)


def _answers(
    opened: Library,
    encoder: Encoder,
    texts: list[str],
    examples: list[Picture],
    top: int,
    stored: Stored | None,
) -> Iterator[Answer]:
    """The answers in the order of the queries: pictures, texts, or else lines as they come."""
    for example in examples:
        row = encoder.encode_images([example.open(encoder.decoding)])
        yield Answer(example.name, nearest(opened, row, top, stored), example)

    lines = texts if texts or examples else _typed()
    for text in lines:
        yield Answer(text, nearest(opened, encoder.encode_texts([text]), top, stored))


def _typed() -> Iterator[str]:
    """Lines of the standard input that are not empty, asked for where a person types them."""
    is_terminal = sys.stdin.isatty()
    while True:
        if is_terminal:
            print("query: ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def nearest(opened: Library, query: Tensor, top: int, stored: Stored | None = None) -> list[Match]:
    """The pictures nearest to a query [1, D], by falling cosine. stored: None: the library's own
    rows are compared.
    """
    import numpy as np

    from vlp.eval.search.nearest import EXACT_UP_TO, exact

    top = min(top, len(opened.pictures))
    if stored is not None:
        from vlp.eval.search import coded

        rows = coded.of_library(opened, stored.kind)
        answers = coded.nearest(opened, rows, query, top, stored.rescore)
        return [Match(opened.pictures[number], score) for score, number in answers]

    row = query.cpu().numpy()
    index = _index(opened) if len(opened.pictures) > EXACT_UP_TO else None
    if index is None:
        scores, numbers = exact(row, opened.blocks(), np.array([-1]), top)
    else:
        scores, numbers = index.search(row, top)
    return [
        Match(opened.pictures[number], score)
        for score, number in zip(scores[0].tolist(), numbers[0].tolist())
        if number >= 0
    ]


def _sizes(opened: Library, stored: Stored) -> str:
    """What the rows take as they are searched, beside what they take as floats."""
    from vlp.eval.search import coded

    n_bytes = coded.of_library(opened, stored.kind).n_bytes
    n_float = 2 * opened.width * len(opened.pictures)
    return (
        f"searched as {stored.kind}: {n_bytes:,} bytes instead of {n_float:,}; the "
        f"{stored.rescore} × --top nearest are compared as {FLOAT}"
    )


def _index(opened: Library) -> Any:
    """The library's inverted file, read once and built if need be; None where FAISS is not
    installed.
    """
    if opened not in _indices:
        _indices[opened] = _read_index(opened)
    return _indices[opened]


def _read_index(opened: Library) -> Any:
    """The inverted file of `_index`, from the disk or new."""
    from vlp import locks, log
    from vlp.eval.search import nearest

    try:
        nearest.import_faiss()
        # Under the name of what it holds, so that a library that has grown gets another.
        path = opened.folder / f"{opened.digest()}.faiss"
        index = nearest.read_index(path)
        if index is None:
            with locks.held(opened.folder, advice="The next call finds what it makes."):
                # Another call may have built it meanwhile.
                index = nearest.read_index(path) or _built(opened, path)
    except (ValueError, locks.InUse) as error:
        log.say(f"searching exactly, which takes long: {error}")
        return None
    return index


def _built(opened: Library, path: Path) -> Any:
    """A new inverted file in place of older ones. The library's lock is held."""
    import numpy as np

    from vlp.eval.search import nearest
    from vlp.files import remove_leftovers

    remove_leftovers(opened.folder)
    n_cells = round(4 * len(opened.pictures) ** 0.5)
    share = min(1.0, nearest.FITTED * n_cells / len(opened.pictures))
    rng = np.random.default_rng(0)
    fitted_to = [rows[rows.any(1) & (rng.random(len(rows)) < share)] for _, rows in opened.blocks()]
    index = nearest.inverted_file(np.concatenate(fitted_to).astype(np.float32), n_cells)
    nearest.write_index(index, opened.blocks(), path)

    # Whoever reads an older one has it open.
    for stale in opened.folder.glob("*.faiss"):
        if stale != path:
            stale.unlink(missing_ok=True)
    return nearest.read_index(path)


_indices: WeakKeyDictionary[Library, Any] = WeakKeyDictionary()


def _lines(answer: Answer) -> str:
    """An answer for the terminal."""
    matches = [f"  {match.score:6.3f}  {match.picture.name}" for match in answer.matches]
    return "\n".join([answer.query, *matches])


def _write(options: argparse.Namespace, answers: list[Answer]) -> None:
    """Write the answers where the options ask for them."""
    from vlp.eval.search.page import page
    from vlp.files import write_atomically

    if options.json:
        records = [
            {
                "query": answer.query,
                "matches": [{"picture": m.picture.name, "score": m.score} for m in answer.matches],
            }
            for answer in answers
        ]
        Path(options.json).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(options.json), json.dumps(records, indent=1).encode())
        print(f"written: {options.json}", file=sys.stderr)
    if options.html:
        Path(options.html).parent.mkdir(parents=True, exist_ok=True)
        title = f"{options.model} on {options.photos}"
        write_atomically(Path(options.html), page(answers, title).encode(errors="replace"))
        print(f"written: {options.html}", file=sys.stderr)
