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
from itertools import chain
from typing import Any, Literal, NamedTuple

from vlp.config import Captions
from vlp.data import encodings, text_files, usual_names
from vlp.data.text_files import TEXT_FILES

MAX_TEXT_BYTES = 1 << 20  # a caption file or JSON beyond this is an attack or an accident
# Where captions stand in a shard of which nothing is said; a sample that has none of these may have
# some under another usual name.
USUAL = ("captions", "caption", "txt")
MAX_CLASS = 10**9  # class numbers are below this

# the text file among the names of a `Form`, in which `txt` may be a field of the JSON too
TEXT_FILE = ".txt"
_IN_ENTRIES = ("caption", "raw", "text", "sentence")  # COCO's and Karpathy's fields of one caption
_MAX_NAMES = 64  # text fields of one sample that can be chosen, and the length of their names
_MAX_PYTHON_LIST = 1 << 16  # characters
# Cheap, and true of few captions: parsing each that begins with a bracket would take long.
_LIST_OF_TEXTS = re.compile(r"\[\s*(['\"].*)?\]", re.DOTALL)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

# How many texts a sample has under each name, the lines of its text file included; at most 255.
Form = dict[str, int]


class TextMembers(NamedTuple):
    """What the text members of one sample hold."""

    captions: tuple[str, ...]
    meta: dict[str, Any]  # the JSON, with the class number of a .cls as "cls"
    text: str  # of the text file, whole
    notes: list[str]  # what could not be used, as "kind: details"
    spare: list[str]  # text files that are not read, in words: "a .caption beside a .txt"


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Options of the sources whose samples are members of tars: which of a sample's texts are its
    captions.
    """

    # Fields of the JSON by name, `txt` for the text file: [re_caption, txt] has the texts of all of
    # them, in this order; {re_caption: 0.75, txt: 0.25} draws a field by its share; {long:
    # re_caption, short: caption} names the field of each of data.captions.roles. Empty: the JSON's
    # captions or caption, else the text file, else another usual field such as text or title.
    captions: list[str] | dict[str, float] | dict[str, str] = field(default_factory=list)
    # A text file of several lines: as data.captions.lines, unless said here.
    lines: Literal["one", "each"] | None = None

    def __post_init__(self) -> None:
        repeated = len(set(self.names)) < len(self.names)
        if repeated or min(self.shares.values(), default=1) <= 0:
            raise ValueError(
                f"captions is {self.captions}; expected different names, with shares above 0 where "
                "it has shares"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The fields that are captions, in order."""
        return tuple(self.roles.values() or self.captions)

    @property
    def shares(self) -> dict[str, float]:
        """The share of each field, where fields are drawn by their shares."""
        return self._mapping(float)

    @property
    def roles(self) -> dict[str, str]:
        """The field of each role, where fields have roles."""
        return self._mapping(str)

    def _mapping(self, kind: type) -> dict[str, Any]:
        """`captions` where it maps names to values of this kind; else empty."""
        if not isinstance(self.captions, dict):
            return {}
        values: dict[str, Any] = {**self.captions}
        return values if all(isinstance(value, kind) for value in values.values()) else {}


@dataclass(frozen=True)
class Choice:
    """Which of a sample's texts are its captions."""

    names: tuple[str, ...] = ()  # empty: the first of `USUAL` that the sample has
    shares: tuple[float, ...] = ()  # of the names; empty: all captions alike
    lines: Literal["one", "each"] = "one"  # whether a text file is one caption, or each line is
    # Of the names; empty: they have none. Not in the text of a choice, which runs compare that were
    # started before there were roles.
    roles: tuple[str, ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, texts: Texts, captions: Captions) -> Choice:
        """What a source's options and `data.captions` choose together; raises ValueError where they
        do not agree.
        """
        # Shares draw one caption at each visit; the other choices leave nothing to draw.
        shares, roles = texts.shares, texts.roles
        if shares and captions.choose != "random":
            raise ValueError(
                f"the source's captions {texts.captions} are drawn by their shares, which "
                f"data.captions.choose: {captions.choose} leaves no room for; give a list of "
                "names, or leave choose out"
            )

        if roles and set(roles) != set(captions.roles):
            raise ValueError(
                f"the source's captions have the roles {', '.join(roles)}, and data.captions.roles "
                f"is {captions.roles}; name the same there, in the order of the columns"
            )
        return cls(
            texts.names,
            tuple(shares.values()),
            texts.lines or captions.lines,
            tuple(roles),
        )

    def count(self, form: Form) -> int:
        """How many captions a sample of this form has."""
        if self.names:
            return sum(self._under(name, form) for name in self.names)

        usual = (self._under(name, form) for name in USUAL)
        return next(filter(None, usual), 0) or form.get(self.stand_in(form) or "", 0)

    def stand_in(self, form: Form) -> str | None:
        """The field of the JSON that is taken for the captions of a sample of this form: text,
        title, …; None where it has some under `USUAL`, or names say which.
        """
        if self.names or any(self._under(name, form) for name in USUAL):
            return None
        return usual_names.stand_in(form)

    def captions(self, meta: dict[str, Any], text: str) -> tuple[str, ...]:
        """The captions of a sample with this JSON and this text file."""
        return tuple(chain.from_iterable(self._groups(meta, text)))

    def weights(self, meta: dict[str, Any], text: str) -> tuple[float, ...]:
        """By which the captions are drawn; empty: all alike."""
        if not self.shares:
            return ()
        weights: list[float] = []
        for share, group in zip(self.shares, self._groups(meta, text)):
            weights += [share / len(group)] * len(group) if group else []
        return tuple(weights)

    def roles_of(self, meta: dict[str, Any], text: str) -> tuple[str, ...]:
        """The role of each caption; empty where names have none."""
        if not self.roles:
            return ()
        roles: list[str] = []
        for role, group in zip(self.roles, self._groups(meta, text)):
            roles += [role] * len(group)
        return tuple(roles)

    def check(self, there: Mapping[str, int], n_samples: int, where: str) -> list[str]:
        """What to tell about names that samples lack; ValueError for one that none has. `there`:
        samples by name.
        """
        for name in self.names:
            if name not in there:
                raise ValueError(
                    f"no sample of {where} has a text under {name!r}, which the source's captions "
                    f"name; there are {listed(there)}: choose among these"
                )

        # A few samples without a field are usual; none with it is a misspelt name.
        lacking = {name: n_samples - there[name] for name in self.names}
        return [
            f"{where}: {n:,} of {n_samples:,} samples have no text under {name!r}"
            for name, n in lacking.items()
            if n > 0
        ]

    def _under(self, name: str, form: Form) -> int:
        """How many captions a form has under a name."""
        # The text file goes before a field of the JSON that has its name.
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

        # As the index counted: by the form that it keeps.
        stand_in = usual_names.stand_in(cut(form_of(meta, text)))
        return [self._texts(stand_in, meta, text)] if stand_in else []

    def _texts(self, name: str, meta: dict[str, Any], text: str) -> Sequence[str]:
        """The captions under a name; as many as `_under` counts."""
        if name == "txt" and text:
            return [text] if self.lines == "one" else lines_of(text)
        return texts_of(meta[name])[:255] if name in meta else ()


_USUAL_CHOICE = Choice()


def listed(names: Mapping[str, int]) -> str:
    """Names with their numbers of samples, the commonest first: "txt (40), re_caption (30)"."""
    common = sorted(names, key=lambda name: (-names[name], name))
    if not common:
        return "none"

    shown = [f"{name} ({names[name]:,})" for name in common[:20]]
    if len(common) > 20:
        shown.append("…")
    return ", ".join(shown)


def read_texts(members: dict[str, bytes]) -> TextMembers:
    """Read the text members of a sample, by extension: `TEXT_FILES`, json and cls."""
    notes: list[str] = []
    decoded = {}
    for kind, data in members.items():
        if len(data) > MAX_TEXT_BYTES:
            notes.append(f"a .{kind} of more than {MAX_TEXT_BYTES} bytes is not read")
        else:
            decoded[kind] = encodings.decoded(data, kind, notes)

    # The class number of a .cls counts where the JSON has none.
    meta = _json(decoded["json"], notes) if "json" in decoded else {}
    if label := decoded.get("cls", "").strip():
        if re.fullmatch(r"\d{1,9}", label):
            meta.setdefault("cls", int(label))
        else:
            notes.append(
                f"a .cls that is no class number is not read: {label[:40]!r}, "
                f"expected a whole number below {MAX_CLASS}"
            )

    texts = {kind: decoded[kind] for kind in TEXT_FILES if kind in decoded}
    text, spare = text_files.chosen(texts)
    return TextMembers(_USUAL_CHOICE.captions(meta, text), meta, text, notes, spare)


def form_of(meta: dict[str, Any], text: str) -> Form:
    """How many texts a sample has under each name."""
    form = {}
    for name, value in meta.items():
        if isinstance(value, (str, list, dict)) and (texts := texts_of(value)):
            form[name] = min(len(texts), 255)  # a byte of the index

    if text:
        form[TEXT_FILE] = len(lines_of(text)) if "\n" in text else 1
    return form


def cut(form: Form) -> Form:
    """A form without what nobody would name: fields beyond the first 64, and endless names."""
    longest = max(map(len, form), default=0)
    if max(len(form), longest) <= _MAX_NAMES:
        return form

    names = [name for name in form if len(name) <= _MAX_NAMES][:_MAX_NAMES]
    kept = {*names, *USUAL, TEXT_FILE, "class"}
    return {name: n for name, n in form.items() if name in kept}


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
    texts = map(text_in, items)
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


def _json(text: str, notes: list[str]) -> dict[str, Any]:
    """The JSON as a mapping; a text or a list is its captions. One that cannot be used is empty,
    and noted.
    """
    # Depth and digits without end raise RecursionError and ValueError.
    try:
        value = json.loads(text)
        if _SURROGATE.search(text):
            value = _without_surrogates(value, notes)
    except (ValueError, RecursionError) as error:
        reason = str(error)[:80] if text.strip() else "it is empty"
        notes.append(f"not valid JSON: {reason}")
        return {}

    if isinstance(value, str):
        value = {"caption": value}
    elif isinstance(value, list):
        value = {"captions": value}

    if not isinstance(value, dict):
        notes.append(f"a JSON that holds no mapping is not read: it is {json.dumps(value)[:40]}")
        return {}
    _note_odd_captions(value, notes)
    return value


def _note_odd_captions(value: dict[str, Any], notes: list[str]) -> None:
    """Note what stands among the captions of a JSON and holds no text."""
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
            example = json.dumps(odd[0])[:40]
            notes.append(f"no text in the JSON's {name}: {example} is left out")


def _without_surrogates(value: Any, notes: list[str]) -> Any:
    """Halves of a surrogate pair stand for no character and cannot be written again."""
    text = json.dumps(value, ensure_ascii=False)
    whole = re.sub("[\ud800-\udfff]", "\ufffd", text)
    if whole != text:
        notes.append("lone surrogates in the JSON: they became U+FFFD")
    return json.loads(whole)
