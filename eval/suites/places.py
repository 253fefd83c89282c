"""Where the sets of a suite lie: folders under some roots, or repositories of the Hub."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlp.eval.pictures import DataError
from vlp.eval.suites import Entry
from vlp.plugin import Plugin

HUB = "hf://"
Place = Callable[[Entry, str], "str | None"]  # of a set, a name -> `data`, or None: not there


@dataclass(frozen=True)
class Located:
    """The sets of a suite that are there, and those that are not."""

    entries: list[Entry]
    tasks: list[Plugin]  # of `entries`, in their order
    absent: list[Entry]


def locate(entries: list[Entry], roots: list[str]) -> Located:
    """Look for every set under the roots, folders or hf://USER, in their order; nothing is opened
    or fetched.
    """
    places = [_hub_place(root) if root.startswith(HUB) else _folder_place(root) for root in roots]
    present: list[Entry] = []
    absent: list[Entry] = []
    tasks: list[Plugin] = []
    for entry in entries:
        options = _options(entry, places)
        if options is None:
            absent.append(entry)
        else:
            present.append(entry)
            tasks.append(entry.plugin(options))
    return Located(present, tasks, absent)


def _options(entry: Entry, places: list[Place]) -> dict[str, Any] | None:
    """`data` and what else goes with the first form that is there; None if none is."""
    for layout in entry.layouts:
        wanted = {"data": layout.at, **layout.files}
        known = {option: _first(entry, names, places) for option, names in wanted.items()}
        if None not in known.values():
            return {**layout.options, **known}
    return None


def _first(entry: Entry, names: list[str], places: list[Place]) -> str | None:
    """The first of the names that is there, under the first root that has one."""
    candidates = (place(entry, name) for place in places for name in names)
    return next((place for place in candidates if place is not None), None)


def _folder_place(root: str) -> Place:
    """What says where a name is under the folder."""
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise DataError(f"--data {root} is no folder; expected the one that holds the suite's sets")

    def place(entry: Entry, name: str) -> str | None:
        path = folder / name
        # An empty folder is what a download that failed leaves behind.
        is_there = path.is_file() or (path.is_dir() and any(path.iterdir()))
        return str(path) if is_there else None

    return place


def _hub_place(root: str) -> Place:
    """What says which repository of a user holds a set."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    from vlp.pretrained.hub import http_error

    user = root.removeprefix(HUB).strip("/")
    if not user or "/" in user:
        raise DataError(f"--data {root} names no user of the Hub; expected {HUB}USER")
    api = HfApi()
    refusals = (http_error(), HFValidationError, OSError)

    def place(entry: Entry, name: str) -> str | None:
        # Repositories hold clip_benchmark's layout; authors' archives are unpacked by hand.
        if not entry.wds or not name.startswith("wds_"):
            return None
        repository = f"{user}/{name}"
        try:
            is_there = api.repo_exists(repository, repo_type="dataset")
        except refusals as error:
            raise DataError(
                f"the Hub does not say whether {repository} exists ({str(error)[:200]}); try "
                "again, or fetch the sets and give their folder as --data"
            ) from None
        return f"hf:{repository}" if is_there else None

    return place


def list_absent(absent: list[Entry]) -> str:
    """A line a set that is not there: where it was looked for, and where it comes from."""
    lines = []
    for entry in absent:
        lines.append(f"  {entry.name}: no {looked_for(entry)}; get it from {entry.get}")
    return "\n".join(lines)


def looked_for(entry: Entry) -> str:
    """The places of a set: of each form one of every list."""
    forms = []
    for layout in entry.layouts:
        wanted = [layout.at, *layout.files.values()]
        forms.append(" with ".join(" or ".join(names) for names in wanted))
    return "; ".join(forms)
