"""Where the sets of a suite lie: folders under one root, or repositories of the Hub."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vlp.eval.pictures import DataError
from vlp.eval.suites import Entry
from vlp.plugin import Plugin

HUB = "hf://"


@dataclass(frozen=True)
class Located:
    """The sets of a suite that are there, and those that are not."""

    entries: list[Entry]
    tasks: list[Plugin]  # of `entries`, in their order
    absent: list[Entry]


def locate(entries: list[Entry], root: str) -> Located:
    """Look for every set under `root`, a folder or hf://USER; nothing is opened or fetched."""
    exists = _on_hub(root) if root.startswith(HUB) else _in_folder(root)
    present: list[Entry] = []
    absent: list[Entry] = []
    tasks: list[Plugin] = []
    for entry in entries:
        places = _places(entry, exists)
        if places is None:
            absent.append(entry)
        else:
            present.append(entry)
            tasks.append(entry.plugin(places))
    return Located(present, tasks, absent)


def _places(entry: Entry, exists: Callable[[str], str | None]) -> dict[str, str] | None:
    """`data` and the other options that are places; None where one of them is not there."""
    wanted = {"data": entry.at, **entry.files}
    places = {}
    for option, candidates in wanted.items():
        present = (exists(candidate) for candidate in candidates)
        place = next((place for place in present if place is not None), None)
        if place is None:
            return None
        places[option] = place
    return places


def _in_folder(root: str) -> Callable[[str], str | None]:
    """A place under the folder, or None if nothing is there."""
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise DataError(f"--data {root} is no folder; expected the one that holds the suite's sets")

    def place(name: str) -> str | None:
        path = folder / name
        # An empty folder is what a download that failed leaves behind.
        is_there = path.is_file() or (path.is_dir() and any(path.iterdir()))
        return str(path) if is_there else None

    return place


def _on_hub(root: str) -> Callable[[str], str | None]:
    """A repository of the user, as `vlp.eval.datasets` takes it, or None if there is none."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    user = root.removeprefix(HUB).strip("/")
    if not user or "/" in user:
        raise DataError(f"--data {root} names no user of the Hub; expected {HUB}USER")
    api = HfApi()

    def place(name: str) -> str | None:
        # Folders inside of a set are no repositories.
        if "/" in name:
            return None
        repository = f"{user}/{name}"
        try:
            is_there = api.repo_exists(repository, repo_type="dataset")
        except (HfHubHTTPError, OSError) as error:
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
        wanted = [entry.at, *entry.files.values()]
        places = "; ".join(" or ".join(candidates) for candidates in wanted)
        lines.append(f"  {entry.name}: no {places}; get it from {entry.get}")
    return "\n".join(lines)
