"""Text members as text, whatever encoding they were written in."""

from __future__ import annotations


def decoded(data: bytes, kind: str, notes: list[str]) -> str:
    """UTF-8, UTF-16, or what Windows writes; anything but UTF-8 is noted."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        notes.append(f".{kind} is not UTF-8: read as UTF-16")
        return data.decode("utf-16", "replace").replace("\0", "")

    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = data.decode("utf-8", "replace")
        # Not one whole character beyond ASCII tells another encoding rather than damage.
        if any("\x7f" < character != "\ufffd" for character in text):
            notes.append(f".{kind} is not UTF-8: the wrong bytes became U+FFFD")
        else:
            notes.append(f".{kind} is not UTF-8: read as Windows-1252")
            text = data.decode("cp1252", "replace")

    if "\0" in text:
        encoding = _wide_encoding(data)
        if encoding:
            notes.append(f".{kind} holds NUL bytes: read as {encoding.upper()}")
            text = data.decode(encoding, "replace")
        else:
            notes.append(f".{kind} holds NUL bytes: they are left out")
        text = text.replace("\0", "")
    return text.removeprefix("\ufeff")


def _wide_encoding(data: bytes) -> str:
    """Which UTF-16 without a mark of its order bytes are; "" for none."""
    # Of Latin letters in UTF-16 every second byte is NUL.
    halves = {"utf-16-le": data[1::2], "utf-16-be": data[0::2]}
    for encoding, half in halves.items():
        if half.count(0) * 2 > len(half):
            return encoding
    return ""
