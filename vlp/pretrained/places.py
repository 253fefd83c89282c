"""Is a reference a folder of this machine, or a name on the Hub? Decided here, once for all.

Libraries of Hugging Face ask a Hub for whatever is no folder, again and again where none answers:
a mistyped path costs half a minute, and the answer speaks of repositories. Here a path that leads
nowhere is refused at once, with the folders near it, and a name is asked for once, briefly.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from vlp.pretrained import hub, packages
from vlp.pretrained.folders import listing
from vlp.privacy import scrubbed

# prefixes that say that the Hub is meant
HUB = ("hf-hub:", "hf:")
# Endings of weights; npz is big_vision's.
FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".npz")
# Endings of other files that people name. Not every ending: Qwen3-0.6B is a repository.
_OTHER_FILES = (
    *(".json", ".jsonl", ".yaml", ".yml", ".txt", ".csv", ".tsv", ".parquet", ".arrow", ".onnx"),
    *(".tar", ".zip", ".gz", ".tgz", ".zst", ".py", ".h5"),
)
_TRANSFORMERS = "a folder of transformers' form"


def on_hub(reference: str) -> bool:
    """Whether a reference says that what it names lies on the Hub."""
    return reference.startswith(HUB)


def bare(reference: str) -> str:
    """A reference without the prefix that says that the Hub is meant."""
    return reference.partition(":")[2] if on_hub(reference) else reference


def may_be_repository(text: str) -> bool:
    """Whether the Hub may have a repository of this name, user/name or an old one of one word;
    nothing is asked.
    """
    like_one = re.fullmatch(r"(?:[A-Za-z0-9_-][\w.-]*/)?[A-Za-z0-9_-][\w.-]*", text, re.ASCII)
    doubled = "--" in text or ".." in text  # which the Hub forbids
    return bool(like_one) and not doubled and not text.lower().endswith((*FILES, *_OTHER_FILES))


def is_path(text: str) -> bool:
    """Whether a text can only mean a place here: a mistyped path is no business of a Hub."""
    return not may_be_repository(text) or ("/" in text and Path(text).parent.exists())


def of_page(address: str) -> str:
    """The reference to what an address of the Hub's pages shows; "" for others."""
    hub_page = (
        r"(?:https?:)?//(?:www\.)?(?:huggingface\.co|hf\.co)/(?:datasets/)?([^/?#]+/[^/?#]+).*"
    )
    page = re.fullmatch(hub_page, address)
    return f"hf-hub:{page[1]}" if page else ""


def locate(
    reference: str, expected: str = _TRANSFORMERS, kind: hub.Kind = "model", file: str = ""
) -> str:
    """What a library of Hugging Face is handed for `reference`: the path of a folder here, of the
    Hub's cache where no Hub answers, or else a name that the Hub has.

    `expected` says what the folder should be, `file` what it holds at least. ValueError says what
    was found, to stand behind the name of the key or option.
    """
    text = packages.local(reference)
    place = Path(text).expanduser()
    if text and place.is_dir():
        return _holding(place, file, expected)
    if text and place.exists():
        raise ValueError(f"{text} is a file; expected {expected}: name the folder that holds it")
    page = of_page(text)
    if page:
        raise ValueError(f"{scrubbed(text)} is an address; write {page}")

    # What the cache holds was a repository before, whatever lies here beside it.
    name = bare(text)
    if on_hub(text):
        if not may_be_repository(name):
            raise ValueError(f"{name!r} is no name of a repository; expected hf-hub:USER/NAME")
    elif is_path(name) and not (may_be_repository(name) and hub.in_cache(name, kind)):
        on_the_hub = f"USER/NAME of a {hub.CALLED[kind]} on the Hub"
        if may_be_repository(name):
            on_the_hub = f"hf-hub:{name} where the Hub is meant"
        raise ValueError(
            f"no folder {scrubbed(text)!r} here{near(place)}; expected {expected}, or {on_the_hub}"
        )

    try:
        return hub.located(name, kind, patient=on_hub(text))
    except ValueError as error:
        here = "" if on_hub(text) else f"no folder {text!r} here{near(place)}, and "
        raise ValueError(f"{here}{error}") from None


def _holding(folder: Path, file: str, expected: str) -> str:
    """The folder's path; ValueError where it lacks a file without which it is none."""
    if file and not (folder / file).is_file():
        raise ValueError(
            f"{folder} holds no {file}; it holds {listing(folder)}. Expected {expected}"
        )
    return str(folder)


def near(place: Path) -> str:
    """The closest existing names, for a path that leads nowhere."""
    # Up to the first folder that exists: the mistake may lie higher in the path.
    folder = place.parent
    while not folder.is_dir() and folder != folder.parent:
        place, folder = folder, folder.parent

    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    close = difflib.get_close_matches(place.name, names, n=3, cutoff=0.6)
    if not close:
        return ""
    return f" (near it: {', '.join(str(folder / name) for name in close)})"
