"""What the text members of a sample say: its captions and its JSON, and which of its texts are
trained on.

A sample's texts stand under names: those of its JSON's fields, and `txt` for the text file. Unless
a source's `captions` chooses, they are those of the first of `USUAL` that holds any. What cannot be
used is noted and costs only itself.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from vlp.config import Captions

MAX_TEXT_BYTES = 1 << 20  # a caption file or JSON beyond this is an attack or an accident
USUAL = ("captions", "caption", "txt")  # where captions stand in a shard of which nothing is said
MAX_CLASS = 10**9  # class numbers are below this

# the text file among the names of a `Form`, in which `txt` may be a field of the JSON too
TEXT_FILE = ".txt"
_IN_ENTRIES = ("caption", "raw", "text", "sentence")  # COCO's and Karpathy's fields of one caption
_MAX_NAMES = 64  # text fields of one sample that can be chosen, and the length of their names
_MAX_PYTHON_LIST = 1 << 16  # characters
# Cheap, and true of few captions: parsing each that begins with a bracket would take long.
_LIST_OF_TEXTS = re.compile(r"\[\s*(['\"].*)?\]", re.DOTALL)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

Form = dict[
    str, int
]  # how many texts a sample has under each name, the lines of its text file included; at most 255


class TextMembers(NamedTuple):
    """What the text members of one sample hold."""

    captions: tuple[str, ...]
    meta: dict[str, Any]  # the JSON, with the class number of a .cls as "cls"
    text: str  # of the .txt, whole
    notes: list[str]  # what could not be used, as "kind: details"


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Options of the sources whose samples are members of tars: which of a sample's texts are its
    captions.
    """

    # Fields of the JSON by name, `txt` for the text file: [re_caption, txt] has the texts of all of
    # them, in this order; {re_caption: 0.75, txt: 0.25} draws a field by its share. Empty: the
    # JSON's captions or caption, else the text file.
    captions: list[str] | dict[str, float] = field(default_factory=list)
    lines: Literal["one", "each"] | None = (
        None  # a text file of several lines: as data.captions.lines, unless said here
    )

    def __post_init__(self) -> None:
        shares = self.captions.values() if isinstance(self.captions, dict) else []
        if len(set(self.captions)) < len(self.captions) or min(shares, default=1) <= 0:
            raise ValueError(
                f"captions is {self.captions}; expected different names, with shares above 0 where it has shares"
            )


@dataclass(frozen=True)
class Choice:
    """Which of a sample's texts are its captions."""

    names: tuple[str, ...] = ()  # empty: the first of `USUAL` that the sample has
    shares: tuple[float, ...] = ()  # of the names; empty: all captions alike
    lines: Literal["one", "each"] = (
        "one"  # whether a text file is one caption, or each of its lines is
    )

    @classmethod
    def of(cls, texts: Texts, captions: Captions) -> Choice:
        """What a source's options and `data.captions` choose together; raises ValueError where they
        do not agree.
        """
        shares = tuple(texts.captions.values()) if isinstance(texts.captions, dict) else ()
        if shares and captions.choose != "random":
            raise ValueError(
                f"the source's captions {texts.captions} are drawn by their shares, which data.captions.choose: "
                f"{captions.choose} leaves no room for; give a list of names, or leave choose out"
            )
        return cls(tuple(texts.captions), shares, texts.lines or captions.lines)

    def count(self, form: Form) -> int:
        """How many captions a sample of this form has."""
        counts = [self._under(name, form) for name in self.names or USUAL]
        return sum(counts) if self.names else next(filter(None, counts), 0)

    def captions(self, meta: dict[str, Any], text: str) -> tuple[str, ...]:
        """The captions of a sample with this JSON and this text file."""
        groups = self._groups(meta, text)
        return tuple(caption for group in groups for caption in group)

    def weights(self, meta: dict[str, Any], text: str) -> tuple[float, ...]:
        """By which the captions are drawn; empty: all alike."""
        groups = self._groups(meta, text) if self.shares else []
        return tuple(share / len(group) for share, group in zip(self.shares, groups) for _ in group)

    def check(self, there: Mapping[str, int], n_samples: int, where: str) -> list[str]:
        """What to tell about names that samples lack; ValueError for one that none has. `there`:
        samples by name.
        """
        for name in self.names:
            if name not in there:
                raise ValueError(
                    f"no sample of {where} has a text under {name!r}, which the source's captions name; there are "
                    f"{listed(there)}: choose among these"
                )
        return [
            f"{where}: {n_samples - there[name]:,} of {n_samples:,} samples have no text under {name!r}"
            for name in self.names
            if there[name] < n_samples
        ]

    def _under(self, name: str, form: Form) -> int:
        if name == "txt" and TEXT_FILE in form:
            return 1 if self.lines == "one" else form[TEXT_FILE]
        return form.get(name, 0)

    def _groups(self, meta: dict[str, Any], text: str) -> list[Sequence[str]]:
        """The texts under each of the names; of the usual ones only the first that has any."""
        if self.names:
            return [self._texts(name, meta, text) for name in self.names]
        for name in USUAL:
            if texts := self._texts(name, meta, text):
                return [texts]
        return []

    def _texts(self, name: str, meta: dict[str, Any], text: str) -> Sequence[str]:
        if name == "txt" and text:
            return [text] if self.lines == "one" else lines_of(text)
        return texts_of(meta[name])[:255] if name in meta else ()


_USUAL_CHOICE = Choice()


def listed(names: Mapping[str, int]) -> str:
    """Names with their numbers of samples, the commonest first: "txt (40), re_caption (30)"."""
    common = sorted(names, key=lambda name: (-names[name], name))
    return (
        ", ".join(f"{name} ({names[name]:,})" for name in common[:20])
        + (", …" if len(common) > 20 else "")
        or "none"
    )


def read_texts(members: dict[str, bytes]) -> TextMembers:
    """Read the members txt, json and cls of a sample."""
    notes: list[str] = []
    decoded = {}
    for kind, data in members.items():
        if len(data) > MAX_TEXT_BYTES:
            notes.append(f"a .{kind} of more than {MAX_TEXT_BYTES} bytes is not read")
        else:
            decoded[kind] = _decode(data, kind, notes)

    meta = _json(decoded["json"], notes) if "json" in decoded else {}
    if label := decoded.get("cls", "").strip():
        if re.fullmatch(r"\d{1,9}", label):
            meta.setdefault("cls", int(label))
        else:
            notes.append(
                f"a .cls that is no class number is not read: {label[:40]!r}, expected a whole number below {MAX_CLASS}"
            )
    text = decoded.get("txt", "")
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = text.strip()
    return TextMembers(_USUAL_CHOICE.captions(meta, text), meta, text, notes)


def form_of(meta: dict[str, Any], text: str) -> Form:
    """How many texts a sample has under each name."""
    form = {}
    for name, value in meta.items():
        if isinstance(value, (str, list, dict)) and (texts := texts_of(value)):
            form[name] = min(len(texts), 255)
    if text:
        form[TEXT_FILE] = len(lines_of(text)) if "\n" in text else 1
    return form


def cut(form: Form) -> Form:
    """A form without what nobody would name: fields beyond the first 64, and endless names."""
    if len(form) <= _MAX_NAMES and len(max(form, key=len, default="")) <= _MAX_NAMES:
        return form
    names = [name for name in form if len(name) <= _MAX_NAMES][:_MAX_NAMES]
    return {name: n for name, n in form.items() if name in {*names, *USUAL, TEXT_FILE}}


def lines_of(text: str) -> list[str]:
    """The lines of a text that hold any, at most the 255 that an index counts."""
    lines = (line.strip() for line in text.split("\n"))
    return [line for line in lines if line][:255]


def texts_of(value: Any) -> list[str]:
    """The captions that a value of a JSON holds: a text, an entry such as {"raw": text}, or a list
    of these, also one that is written into a text (`written_list`).
    """
    if isinstance(value, str):
        value = written_list(value.strip())
    items = value if isinstance(value, list) else [value]
    texts = (text_in(item) for item in items)
    return [text for text in texts if text]


def written_list(text: str) -> str | list[str]:
    """The list of texts that JSON or Python wrote into a text, `["a dog", "a cat"]`; any other text
    as it is.
    """
    if not _LIST_OF_TEXTS.fullmatch(text):
        return text

    # Python's reader takes five seconds for a text of 1 MB.
    parsers: list[Callable[[str], Any]] = [json.loads]
    if len(text) <= _MAX_PYTHON_LIST:
        parsers.append(ast.literal_eval)
    for parse in parsers:
        try:
            value = parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
            return value
    return text


def text_in(entry: Any) -> str | None:
    """The text of one entry of a list of captions: itself, or in a field such as {"raw": text}.

    None where it has none.
    """
    if isinstance(entry, dict):
        texts = (entry[name] for name in _IN_ENTRIES if isinstance(entry.get(name), str))
        entry = next(texts, None)
    return entry.strip() if isinstance(entry, str) else None


def _decode(data: bytes, kind: str, notes: list[str]) -> str:
    """UTF-8, UTF-16, or what Windows writes; anything but UTF-8 is noted."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        notes.append(f".{kind} is not UTF-8: read as UTF-16")
        return data.decode("utf-16", "replace").replace("\0", "")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = data.decode("utf-8", "replace")
        if any("\x7f" < character != "\ufffd" for character in text):
            notes.append(f".{kind} is not UTF-8: the wrong bytes became U+FFFD")
        else:  # not one whole character of UTF-8 beyond ASCII: another encoding rather than damage
            notes.append(f".{kind} is not UTF-8: read as Windows-1252")
            text = data.decode("cp1252", "replace")
    if "\0" in text:
        halves = {"utf-16-le": data[1::2], "utf-16-be": data[0::2]}
        encoding = next(
            (name for name, half in halves.items() if half.count(0) * 2 > len(half)), ""
        )
        notes.append(
            f".{kind} holds NUL bytes: "
            + (f"read as {encoding.upper()}" if encoding else "they are left out")
        )
        text = (data.decode(encoding, "replace") if encoding else text).replace("\0", "")
    return text.removeprefix("\ufeff")


def _json(text: str, notes: list[str]) -> dict[str, Any]:
    """The JSON as a mapping; a text or a list is its captions. One that cannot be used is empty,
    and noted.
    """
    try:
        value = json.loads(text)
        if _SURROGATE.search(text):
            value = _without_surrogates(value, notes)
    except (ValueError, RecursionError) as error:
        notes.append(f"not valid JSON: {str(error)[:80] if text.strip() else 'it is empty'}")
        return {}
    if isinstance(value, (str, list)):
        value = {"caption" if isinstance(value, str) else "captions": value}
    if not isinstance(value, dict):
        notes.append(f"a JSON that holds no mapping is not read: it is {json.dumps(value)[:40]}")
        return {}
    for name in ("captions", "caption"):
        entries = value.get(name)
        if entries is None or isinstance(entries, str):
            continue
        entries = entries if isinstance(entries, list) else [entries]
        odd = [
            entry
            for entry in entries
            if entry is not None and not isinstance(entry, str) and not text_in(entry)
        ]
        if odd:
            notes.append(f"no text in the JSON's {name}: {json.dumps(odd[0])[:40]} is left out")
    return value


def _without_surrogates(value: Any, notes: list[str]) -> Any:
    """Halves of a surrogate pair stand for no character and cannot be written again."""
    text = json.dumps(value, ensure_ascii=False)
    whole = re.sub("[\ud800-\udfff]", "\ufffd", text)
    if whole != text:
        notes.append("lone surrogates in the JSON: they became U+FFFD")
    return json.loads(whole)
