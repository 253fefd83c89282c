"""An exported folder becomes a repository of a Hub: one commit, so that a reader sees all of it or
nothing.

The token is huggingface_hub's own affair (`hf auth login`, or HF_TOKEN); it is never an argument,
printed or stored here. HF_ENDPOINT, or `endpoint`, names another Hub than huggingface.co.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from vlp.export import card
from vlp.pretrained.hub import http_error
from vlp.pretrained.references import (
    CONFIG,
    MANIFEST,
    TEXT_TOWER,
    exported_files,
    files_of,
    read_json,
)
from vlp.privacy import scrubbed

_HTTPError = http_error()
_GENERATED = {".gitattributes"}  # what a Hub itself puts into a new repository


class PushError(RuntimeError):
    """A folder that could not be uploaded. The repository is as it was before."""


def push(
    folder: Path | str,
    repository: str,
    *,
    private: bool = False,
    overwrite: bool = False,
    endpoint: str | None = None,
    attempts: int = 5,
    wait_s: float = 2.0,
    say: Callable[[str], None] = print,
) -> str:
    """Upload the exported `folder` as `repository` (user/name), created if need be; returns the
    address of the commit.

    A dropped connection is tried again, `attempts` times in all, waiting `wait_s`, twice that, …;
    large files that arrived are not sent twice, then or when the same command is run again. A
    repository that holds other files is left alone (PushError) unless `overwrite`, which replaces
    all of them; one that holds just these is left as it is.
    """
    folder, hub = Path(folder), HfApi(endpoint=endpoint)
    contents = _contents(folder, repository, say)
    try:
        hub.create_repo(repository, private=private, exist_ok=True)
        present = {
            e.path: e
            for e in hub.list_repo_tree(repository, recursive=True)
            if isinstance(e, RepoFile)
        }
    except (
        HfHubHTTPError,
        HFValidationError,
        LocalTokenNotFoundError,
        _HTTPError,
        OSError,
    ) as error:
        raise _explained(error, repository, hub.endpoint) from None
    foreign = [path for path in present if path not in _GENERATED]
    if set(foreign) == set(contents) and all(
        _same(data, present[path]) for path, data in contents.items()
    ):
        say(f"{repository} holds this model already")
        return f"{hub.endpoint}/{repository}"
    if foreign and not overwrite:
        raise PushError(
            f"{repository} at {hub.endpoint} exists with other content ({', '.join(sorted(foreign)[:4])}, …); "
            "choose another name, or add --overwrite"
        )
    changes = [
        CommitOperationAdd(path, data if isinstance(data, bytes) else str(data))
        for path, data in contents.items()
    ]
    changes += [CommitOperationDelete(path) for path in foreign if path not in contents]
    return _commit(hub, repository, changes, attempts, wait_s, say)


def _commit(
    hub: HfApi,
    repository: str,
    changes: list[Any],
    attempts: int,
    wait_s: float,
    say: Callable[[str], None],
) -> str:
    for attempt in range(1, attempts + 1):
        try:
            return hub.create_commit(repository, changes, commit_message="Upload model").commit_url
        except (HfHubHTTPError, _HTTPError, OSError, RuntimeError) as error:
            status = _status(error)
            if (status is not None and 400 <= status < 500) or attempt == attempts:
                raise _explained(error, repository, hub.endpoint) from None
            say(f"upload interrupted ({_scrubbed(error)}); attempt {attempt + 1} of {attempts}")
            time.sleep(wait_s * 2 ** (attempt - 1))
    raise AssertionError("attempts must be at least 1")


def _contents(
    folder: Path, repository: str, say: Callable[[str], None]
) -> Mapping[str, Path | bytes]:
    """What an export wrote, by its path in the repository; nothing else that lies in the folder is
    published.

    The card, a tokenizer and a text tower that lie beside the model are named by the repository
    there.
    """
    names = exported_files(folder)
    if not names:
        raise PushError(
            f"{folder} is no export: it holds no {MANIFEST}, which lists what is published; run vlp export first"
        )
    contents: dict[str, Path | bytes] = {name: _inside(folder, name) for name in names}
    others = sorted(set(files_of(folder)) - set(names))
    if others:
        say(f"left out, because no export wrote them: {', '.join(others)}")

    title = read_json(folder / MANIFEST)["name"]
    contents["README.md"] = card.published(
        (folder / "README.md").read_text(encoding="utf-8"), title, repository
    ).encode()
    for name in names:
        if name.rpartition("/")[2] == CONFIG:
            at_root = name == CONFIG
            contents[name] = _named(folder / name, repository if at_root else "", contents)
    return contents


def _named(path: Path, repository: str, contents: dict[str, Path | bytes]) -> bytes:
    """open_clip_config.json as it is published. transformers finds a text tower as the
    configuration of the repository.
    """
    described = read_json(path)
    text = described["model_cfg"]["text_cfg"]
    if repository and text.get("hf_tokenizer_name") == ".":
        text["hf_tokenizer_name"] = repository
    if Path(text.get("hf_model_name") or "").is_absolute():
        text["hf_model_name"] = (
            repository or f"./{TEXT_TOWER}"
        )  # a stage in a subfolder is vlp's to load
        if repository:
            contents["config.json"] = path.parent / TEXT_TOWER / "config.json"
    return (json.dumps(described, indent=2) + "\n").encode()


def _inside(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.is_file():
        raise PushError(f"{folder} has lost {name}, which its export wrote; export it again")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise PushError(
            f"{path} leads out of the folder, to {path.resolve()}; put the file itself there"
        )
    return path


def _same(ours: Path | bytes, theirs: RepoFile) -> bool:
    data = ours if isinstance(ours, bytes) else ours.read_bytes()
    if theirs.lfs is not None:
        return hashlib.sha256(data).hexdigest() == theirs.lfs.sha256
    return (
        hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == theirs.blob_id
    )  # git's name for the content


def _status(error: BaseException | None) -> int | None:
    """The HTTP status behind an error, if a server answered at all."""
    while error is not None:
        response = getattr(error, "response", None)
        if response is not None:
            return response.status_code
        error = error.__cause__
    return None


def _explained(error: BaseException, repository: str, endpoint: str) -> PushError:
    status = _status(error)
    if isinstance(error, HFValidationError):
        return PushError(
            f"{repository!r} is no name of a repository; expected user/name: {_scrubbed(error)}"
        )
    if status in (401, 403) or isinstance(
        error, (RepositoryNotFoundError, LocalTokenNotFoundError)
    ):
        return PushError(
            f"no right to write {repository} at {endpoint}"
            + (f" (status {status})" if status else "")
            + "; log in with `hf auth login` or set HF_TOKEN to a token that may write there. Nothing was published"
        )
    return PushError(
        f"the upload of {repository} to {endpoint} failed: {_scrubbed(error)}. Nothing was published; "
        "run the same command again: large files that arrived are not sent twice"
    )


def _scrubbed(error: BaseException) -> str:
    """The first line of an error, and of its cause, without anything that looks like a token."""
    lines = [
        str(e).strip().partition("\n")[0] or type(e).__name__
        for e in (error, error.__cause__)
        if e is not None
    ]
    parts = dict.fromkeys(lines)  # without repetition
    return scrubbed("; ".join(parts))
