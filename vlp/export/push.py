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
from safetensors import SafetensorError, safe_open

from vlp.export import usage
from vlp.models import language
from vlp.pretrained.folders import MANIFEST, any_json, exported_files, files_of, read_json
from vlp.pretrained.hub import http_error
from vlp.pretrained.places import bare, near, on_hub
from vlp.pretrained.references import ADAPTERS, CONFIG, TEXT_TOWER, resolve, stated_config
from vlp.privacy import scrubbed

_HTTPError = http_error()
_REFUSALS = (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, _HTTPError, OSError)
_GENERATED = {".gitattributes"}  # what a Hub itself puts into a new repository

Change = CommitOperationAdd | CommitOperationDelete


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
    if not str(folder):
        raise PushError("no folder is named; expected what vlp export wrote")
    hub = HfApi(endpoint=endpoint)
    repository = bare(repository)
    contents = _contents(Path(folder), repository, say)
    present = _present(hub, repository, private)

    # The same command twice is no error and no commit.
    same_paths = set(present) == set(contents)
    if same_paths and all(_same(data, present[path]) for path, data in contents.items()):
        say(f"{repository} holds this model already")
        return f"{hub.endpoint}/{repository}"
    if present and not overwrite:
        some = ", ".join(sorted(present)[:4])
        raise PushError(
            f"{repository} at {hub.endpoint} exists with other content ({some}, …); choose another "
            "name, or add --overwrite"
        )

    changes: list[Change] = []
    for path, data in contents.items():
        uploaded = data if isinstance(data, bytes) else str(data)
        changes.append(CommitOperationAdd(path, uploaded))
    for path in present:
        if path not in contents:
            changes.append(CommitOperationDelete(path))
    return _commit(hub, repository, changes, attempts, wait_s, say)


def _present(hub: HfApi, repository: str, private: bool) -> dict[str, RepoFile]:
    """The files of the repository, which is created if need be, without what the Hub put there."""
    try:
        hub.create_repo(repository, private=private, exist_ok=True)
        entries = list(hub.list_repo_tree(repository, recursive=True))
    except _REFUSALS as error:
        raise _explained(error, repository, hub.endpoint) from None

    files = [entry for entry in entries if isinstance(entry, RepoFile)]
    return {file.path: file for file in files if file.path not in _GENERATED}


def _commit(
    hub: HfApi,
    repository: str,
    changes: list[Change],
    attempts: int,
    wait_s: float,
    say: Callable[[str], None],
) -> str:
    for attempt in range(1, attempts + 1):
        # One commit: readers see the old model or the new one, never both.
        try:
            return hub.create_commit(repository, changes, commit_message="Upload model").commit_url
        except (HfHubHTTPError, _HTTPError, OSError, RuntimeError) as error:
            # A refusal stays one, however often it is asked for.
            status = _status(error)
            refused = status is not None and 400 <= status < 500
            if refused or attempt == attempts:
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
    if folder.is_file():
        raise PushError(f"{folder} is a file; expected the folder that vlp export wrote")
    if not folder.is_dir():
        raise PushError(f"no folder {folder}{near(folder)}; expected what vlp export wrote")

    # By the export's own list: what else lies there may be private.
    names = exported_files(folder)
    if not names:
        raise PushError(
            f"{folder} is no export: it holds no {MANIFEST}, which lists what is published; run "
            "vlp export first"
        )

    # It has no card, and its configuration holds paths of this machine.
    if "state.json" in names:
        raise PushError(
            f"{folder} is a checkpoint, what a run goes on from; publish its model: vlp export "
            f"{folder} --to DIR, then vlp push DIR {repository}"
        )
    if ADAPTERS in names:
        _check_base(folder)

    contents: dict[str, Path | bytes] = {name: _inside(folder, name) for name in names}
    others = sorted(set(files_of(folder)) - set(names))
    if others:
        say(f"left out, because no export wrote them: {', '.join(others)}")

    for name in names:
        _check_whole(folder / name)

    # What loads by this folder's name loads by the repository's there.
    title = read_json(folder / MANIFEST).get("name")
    if not isinstance(title, str):
        raise PushError(
            f"{folder / MANIFEST} does not say the name of the export; export the model again"
        )
    local_card = (folder / "README.md").read_text(encoding="utf-8")
    contents["README.md"] = usage.published(local_card, title, repository).encode()
    for name in names:
        if name.rpartition("/")[2] == CONFIG:
            at_root = name == CONFIG
            contents[name] = _named(folder / name, repository if at_root else "", contents)

    return contents


def _check_whole(path: Path) -> None:
    """Refuse a file that whoever downloads it could not read either, as a copy cut short."""
    if path.name == "modules.json":
        _check_modules(path)
    elif path.suffix == ".json":
        read_json(path)
    elif path.suffix == ".safetensors":
        try:
            safe_open(path, "numpy")
        except SafetensorError as error:
            raise PushError(
                f"{path} is no whole file of weights ({error}); export the model again"
            ) from None


def _check_modules(path: Path) -> None:
    """Refuse a list of sentence-transformers' modules that it could not make a model of."""
    modules = any_json(path)
    is_list = isinstance(modules, list) and bool(modules)
    if not is_list or not all(_is_module(module) for module in modules):
        raise PushError(
            f"{path} does not list modules with type and path, as sentence-transformers reads "
            "them; export the model again"
        )


def _is_module(module: Any) -> bool:
    if not isinstance(module, dict):
        return False
    return all(isinstance(module.get(key), str) for key in ("type", "path"))


def _check_base(folder: Path) -> None:
    """Refuse adapters for a base that nobody else has."""
    about = folder / ADAPTERS
    base = str(read_json(about).get("base"))
    if on_hub(base):
        return
    try:
        is_tag = resolve(base).kind == "tag"
    except ValueError:
        is_tag = False
    if not is_tag:
        raise PushError(
            f"the adapters' base, {base}, is of this machine; publish that model and set base in "
            f"{about} to hf-hub:USER/NAME"
        )


def _named(path: Path, repository: str, contents: dict[str, Path | bytes]) -> bytes:
    """open_clip_config.json as it is published. transformers finds a text tower as the
    configuration of the repository.
    """
    described = stated_config(path.parent)
    text = described["model_cfg"]["text_cfg"]
    if repository and text.get("hf_tokenizer_name") == ".":
        text["hf_tokenizer_name"] = repository
    language_model = Path(text.get("hf_model_name") or "")
    is_absolute = language_model.is_absolute()
    # A language model that is not in the folder keeps its name, which others must be able to find.
    outside = language.reference_of(text)
    if outside and (is_absolute or language_model.is_dir()):
        raise PushError(
            f"the text tower runs the language model {outside}, a folder of this machine; publish "
            "that model, embed the captions by its Hub name and train anew"
        )
    if is_absolute and not outside:
        # A stage in a subfolder is vlp's to load.
        text["hf_model_name"] = repository or f"./{TEXT_TOWER}"
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
    """Whether a file is the repository's, by its hash: nothing is downloaded."""
    data = ours if isinstance(ours, bytes) else ours.read_bytes()
    if theirs.lfs is not None:
        return hashlib.sha256(data).hexdigest() == theirs.lfs.sha256

    # git's name for the content
    blob = b"blob %d\0" % len(data) + data
    return hashlib.sha1(blob).hexdigest() == theirs.blob_id


def _status(error: BaseException | None) -> int | None:
    """The HTTP status behind an error, if a server answered at all."""
    # huggingface_hub wraps the answer in errors of its own.
    while error is not None:
        response = getattr(error, "response", None)
        if response is not None:
            return response.status_code
        error = error.__cause__
    return None


def _explained(error: BaseException, repository: str, endpoint: str) -> PushError:
    """The error in words that say what to do, without a token that it may have repeated."""
    if isinstance(error, HFValidationError):
        return PushError(
            f"{repository!r} is no name of a repository; expected user/name: {_scrubbed(error)}"
        )

    status = _status(error)
    no_right = isinstance(error, (RepositoryNotFoundError, LocalTokenNotFoundError))
    if no_right or status in (401, 403):
        stated = f" (status {status})" if status else ""
        return PushError(
            f"no right to write {repository} at {endpoint}{stated}; log in with `hf auth login` or "
            "set HF_TOKEN to a token that may write there. Nothing was published"
        )
    return PushError(
        f"the upload of {repository} to {endpoint} failed: {_scrubbed(error)}. Nothing was "
        "published; run the same command again: large files that arrived are not sent twice"
    )


def _scrubbed(error: BaseException) -> str:
    """The first line of an error, and of its cause, without anything that looks like a token."""
    chain = [each for each in (error, error.__cause__) if each is not None]
    lines = [str(each).strip().partition("\n")[0] or type(each).__name__ for each in chain]
    without_repetition = dict.fromkeys(lines)
    return scrubbed("; ".join(without_repetition))
