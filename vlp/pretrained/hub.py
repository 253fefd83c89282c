"""Model folders of the Hugging Face Hub, downloaded into its cache: configurations, tokenizers,
weights, never code.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import Literal

# Never *.py: a repository's code is not downloaded, so it cannot be run.
_DESCRIPTIONS = [
    "*.json",
    "*.txt",
    "*.model",
    "text_tower/*",
    "open_clip_model.safetensors",
    "*/open_clip_model.safetensors",
    # a folder of adapters; its base is fetched by the name that it states
    "rest.safetensors",
    "image/adapter_model.safetensors",
    "text/adapter_model.safetensors",
]
# Weights of transformers' form, and pickled ones by the file that describes them.
_TRANSFORMERS = ["model.safetensors", "model-*.safetensors"]
_PICKLED = {
    "open_clip_config.json": "open_clip_pytorch_model.bin",
    "config.json": "pytorch_model.bin",
}
Kind = Literal["model", "dataset"]
CALLED: dict[Kind, str] = {"model": "model", "dataset": "data set"}
# How long the Hub has for its first answer, by `patient`: a mistyped path should fail soon.
_PATIENCE_S = {True: 10.0, False: 3.0}


def snapshot(repository: str, patient: bool = True) -> Path:
    """The folder of `repository`, user/name: as the Hub has it, or as the cache has it where no Hub
    answers.

    `patient`: False where the name may as well be a mistyped path. ValueError says why there is
    none.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    timeout_s = _PATIENCE_S[patient]
    try:
        # One short question first: where no Hub answers it, the cache serves at once.
        if not _answers(repository, timeout_s):
            return _cached(repository, timeout_s)

        # Descriptions first: they tell which of the weights are needed.
        folder = Path(huggingface_hub.snapshot_download(repository, allow_patterns=_DESCRIPTIONS))
        _fetch_weights(repository, folder)
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = " ".join(str(error).split())[:300]
        if patient:
            raise ValueError(f"could not get {repository} from the Hub: {reason}") from None
        raise ValueError(
            f"no model {repository!r}: no such file or folder, and not from a Hub either "
            f"({reason}); write hf-hub:{repository} where the Hub is meant"
        ) from None

    return folder


def _cached(repository: str, waited_s: float) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = huggingface_hub.snapshot_download(
            repository, allow_patterns=_DESCRIPTIONS, local_files_only=True
        )
    except LocalEntryNotFoundError:
        raise ValueError(
            f"no Hub answered within {waited_s:g} s, and its cache on this machine does not hold it"
        ) from None

    return Path(folder)


def located(repository: str, kind: Kind, patient: bool) -> str:
    """What a library of Hugging Face is handed for `repository`: its name where the Hub has it, or
    where no Hub answers the folder of a model in the cache.

    `patient` as for `snapshot`. ValueError says in a line why there is none.
    """
    from huggingface_hub import constants

    # Another Hub or cache, as tests have them, has other answers.
    return _located(repository, kind, patient, constants.ENDPOINT, constants.HF_HUB_CACHE)


# A run looks for one model many times; where no Hub answers each time would cost seconds.
@cache
def _located(repository: str, kind: Kind, patient: bool, endpoint: str, cached_in: str) -> str:
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    try:
        if _answers(repository, _PATIENCE_S[patient], kind):
            return repository
    except GatedRepoError:
        raise ValueError(
            f"the Hub shows {repository} only to those who were let in; ask for it on its page, "
            "and log in: hf auth login"
        ) from None
    except RepositoryNotFoundError:
        raise ValueError(
            f"the Hub ({endpoint}) has no {CALLED[kind]} {repository!r}, or it is private: "
            "correct the name, or log in: hf auth login"
        ) from None
    except HfHubHTTPError as error:
        # A Hub that is out of order, which the cache outlives.
        if not in_cache(repository, kind):
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"the Hub ({endpoint}) refuses {repository!r}: {reason}") from None

    if not in_cache(repository, kind):
        raise ValueError(
            f"no Hub answered within {_PATIENCE_S[patient]:g} s for {repository}, nor does its "
            "cache here hold it; correct the path or name, or look at the network"
        )
    # `datasets` keeps tables of its own, and finds them by the name.
    return repository if kind == "dataset" else str(_cached(repository, _PATIENCE_S[patient]))


def in_cache(repository: str, kind: Kind) -> bool:
    """Whether an earlier download of a repository is here."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    # An evaluation set is read without the package.
    if kind == "dataset" and importlib.util.find_spec("datasets") is not None:
        import datasets

        # where it keeps the tables that it made of a repository
        tables = Path(datasets.config.HF_DATASETS_CACHE) / repository.replace("/", "___")
        if tables.is_dir():
            return True
    try:
        huggingface_hub.snapshot_download(repository, repo_type=kind, local_files_only=True)
    except LocalEntryNotFoundError:
        return False
    return True


def _answers(repository: str, timeout_s: float, kind: Kind = "model") -> bool:
    """Whether the Hub has the repository; False where none can be reached, which may leave the
    cache.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        huggingface_hub.HfApi().repo_info(repository, repo_type=kind, timeout=timeout_s)
    except HfHubHTTPError:  # an answer, and a refusal
        raise
    except (OfflineModeIsEnabled, http_error()):
        return False
    return True


def http_error() -> type[Exception]:
    """The base of httpx's errors, or of httpx2's: whichever this version of huggingface_hub speaks
    with.
    """
    from huggingface_hub.errors import HfHubHTTPError

    return next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")


def _fetch_weights(repository: str, folder: Path) -> None:
    """Add the weights where they are not open_clip's safetensors: transformers', or pickled
    tensors.
    """
    import huggingface_hub

    described = next((name for name in _PICKLED if (folder / name).is_file()), None)
    concatenated = (folder / "vlp_stages.json").is_file()
    if described is None or concatenated or (folder / "open_clip_model.safetensors").is_file():
        return

    # Pickled weights last: many repositories hold both, and one download is enough.
    huggingface_hub.snapshot_download(repository, allow_patterns=_TRANSFORMERS)
    if not any(folder.glob("model*.safetensors")):
        huggingface_hub.hf_hub_download(repository, _PICKLED[described])
