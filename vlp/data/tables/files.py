"""A table's file as text: found by name, unpacked from gzip, decoded, or refused.

Errors say what to do.
"""

from __future__ import annotations

import codecs
import difflib
import gzip
import zlib
from pathlib import Path

DELIMITED = (".csv", ".tsv", ".txt", ".token")
JSON_LINES = (".jsonl", ".ndjson", ".jsonlines")
KINDS = (*DELIMITED, *JSON_LINES, ".json", ".parquet")
EXPECTED = f"a table ends in {', '.join(KINDS)} (texts also with .gz)"

_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def option(name: str, value: str) -> str:
    """How a person says an option of the reader: to a tool, in a configuration, to `vlp eval`."""
    # A tool takes --caption-column several times.
    flag = name.replace("_", "-").removesuffix("s")
    return f"--{flag} {value} (configuration: {name}: {value}; vlp eval: {name}={value})"


def kind_of(path: Path) -> str:
    """The extension that tells how a table is read, without .gz; raises ValueError for others,
    FileNotFoundError.
    """
    name = path.name.lower().removesuffix(".gz")
    suffix = Path(name).suffix

    # Told apart from other endings, because the remedy is known.
    if suffix in (".xlsx", ".xls", ".ods"):
        raise ValueError(f"{path} is a spreadsheet; save it as CSV in UTF-8")

    if suffix not in KINDS:
        # A folder that is not there has no ending either.
        _need(path)
        raise ValueError(f"{path}: {EXPECTED}, not {suffix or 'nothing'!r}")
    return suffix


def load(path: Path) -> bytes:
    """The bytes of a table, unpacked if they are gzip; raises ValueError for what is no such file,
    OSError.
    """
    if path.is_dir():
        tables = [entry.name for entry in sorted(path.iterdir()) if entry.suffix.lower() in KINDS]
        held = f"it holds {', '.join(tables[:5])}" if tables else "it holds none"
        raise ValueError(f"{path} is a folder, expected a table; {held}")
    _need(path)

    # By content, not by name: browsers unpack .gz, and some servers pack what is called .csv.
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path} is damaged gzip ({error}); fetch it again") from None

    if data[:4] == b"PK\x03\x04":
        raise ValueError(
            f"{path} is a zip archive or a spreadsheet; unpack it, or save it as CSV in UTF-8"
        )
    if not data.strip():
        raise ValueError(f"{path} is empty")
    return data


def _need(path: Path) -> None:
    if not path.exists():
        raise FileNotFoundError(f"no table at {path}{_nearest(path)}")


def _nearest(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; there is no folder {path.parent}"

    names = [entry.name for entry in path.parent.iterdir()]
    close = difflib.get_close_matches(path.name, names, n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def decode(data: bytes, path: Path, encoding: str = "") -> str:
    """The text of a file: in the encoding that is named, else UTF-8, else UTF-16 by its mark or its
    zero bytes.

    Raises ValueError with line, column and remedy where the bytes are no text in that encoding.
    """
    chosen = encoding or _encoding_of(data)
    if chosen.lower().replace("_", "-") in ("utf-8", "utf8"):
        chosen = "utf-8-sig"  # also without the mark

    try:
        text = data.decode(chosen)
    except LookupError:
        raise ValueError(
            f"no encoding is called {encoding!r}; for instance utf-8, cp1252, utf-16, gb18030"
        ) from None
    except UnicodeError as error:
        start = getattr(error, "start", 0)
        raise ValueError(_wrong_bytes(data, start, path, encoding or "UTF-8")) from None

    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(
            f"{path}:{line}: found a zero byte; the file is damaged, or no text. "
            "Write it again as UTF-8"
        )
    return text


def _encoding_of(data: bytes) -> str:
    for mark, name in _BOMS:
        if data.startswith(mark):
            return name

    # Latin letters in UTF-16 are every second byte zero; no text in UTF-8 holds any.
    head = data[:4096]
    half = max(1, len(head) // 2)
    if head[1::2].count(0) > 0.3 * half:
        return "utf-16-le"
    if head[0::2].count(0) > 0.3 * half:
        return "utf-16-be"
    return "utf-8"


def _wrong_bytes(data: bytes, start: int, path: Path, encoding: str) -> str:
    line = data.count(b"\n", 0, start) + 1
    begin = data.rfind(b"\n", 0, start) + 1
    column = start - begin + 1
    # As Windows would show it, which is most often what wrote it.
    around = data[begin : start + 20].decode("cp1252", "replace")[-40:]
    return (
        f"{path}:{line}: byte {data[start]:#x} in column {column} is no {encoding} "
        f"(near {around!r}); save the table as UTF-8, or name its encoding: "
        f"{option('encoding', 'cp1252')}"
    )
