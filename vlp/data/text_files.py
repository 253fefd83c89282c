"""The text files of a sample: which of them is its text."""

from __future__ import annotations

from vlp.data import no_captions

# Their extensions. Of a sample's files the first of these that holds any text is its text file,
# which is called `txt` in a choice of captions.
TEXT_FILES = ("txt", "text", "caption")


def chosen(texts: dict[str, str]) -> tuple[str, list[str]]:
    """The first of a sample's text files, by extension, that holds a text; and which others are
    not read, in words.
    """
    filled: list[tuple[str, str]] = []
    spare: list[str] = []
    for kind, text in texts.items():
        text = _plain(text)
        if content := no_captions.content_of(text):
            spare.append(f"a .{kind} of {content}")
        elif text:
            filled.append((kind, text))

    if not filled:
        return "", spare
    first_kind, first = filled[0]
    spare += [f"a .{kind} beside a .{first_kind}" for kind, text in filled if text != first]
    return first, spare


def _plain(text: str) -> str:
    """A text without blanks around it, its lines ended as on Unix."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text.strip()
