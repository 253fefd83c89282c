"""Prompts and ImageNet's class names in other languages than English.

photo_LANG       "a photo of a …", a template of ours
imagenet_LANG    the class names and templates that clip_benchmark 1.6 ships (MIT), read from the
                 installed package, of which nothing is copied here: zh as Chinese-CLIP translated
                 them, ja as rinna's japanese-clip did, it and ar

Whatever else there is, Chinese-CLIP's label_cn.txt or clip_benchmark's files, is read at a path:
`classes=FILE`, `templates=FILE`.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

PHOTO = {
    "photo_ar": "صورة {}.",
    "photo_de": "ein Foto von {}.",
    "photo_es": "una foto de {}.",
    "photo_fr": "une photo de {}.",
    "photo_it": "una foto di {}.",
    "photo_ja": "{}の写真。",
    "photo_ko": "{}의 사진.",
    "photo_pt": "uma foto de {}.",
    "photo_ru": "фотография: {}.",
    "photo_zh": "一张{}的照片。",
}
# our code of a language, as ISO 639 has it -> clip_benchmark's
IMAGENET = {"imagenet_ar": "ar", "imagenet_it": "it", "imagenet_ja": "jp", "imagenet_zh": "cn"}
_PACKAGE = "clip_benchmark"
_KEY = "imagenet1k"


def is_known(choice: object) -> bool:
    """Whether `templates=` names one of these sets."""
    return isinstance(choice, str) and (choice in PHOTO or choice in IMAGENET)


def sets() -> list[str]:
    """The template sets that can be used here."""
    return [*PHOTO, *(IMAGENET if _folder() is not None else ())]


def templates(name: str) -> list[str]:
    """A set's templates; ValueError where their package is absent."""
    if name in PHOTO:
        return [PHOTO[name]]
    listed = _read(name, "zeroshot_classification_templates")
    return [template.replace("{c}", "{}") for template in listed]


def class_names(name: str) -> list[str]:
    """ImageNet's 1,000 names in a language; ValueError where their package is absent."""
    return _read(name, "classnames")


def _read(name: str, kind: str) -> list[str]:
    folder = _folder()
    if folder is None:
        raise ValueError(
            f"{name} is read from clip_benchmark, which is not installed: pip install --no-deps "
            "clip_benchmark; or give files of yours as classes=FILE and templates=FILE"
        )
    path = folder / f"{IMAGENET[name]}_{kind}.json"
    try:
        value: Any = json.loads(path.read_text(encoding="utf-8"))
        return [str(entry) for entry in value[_KEY]]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"{path} is not clip_benchmark 1.6's list {{{_KEY}: […]}}; install that version: pip "
            "install --no-deps clip_benchmark==1.6.2"
        ) from None


def _folder() -> Path | None:
    """Where the installed package keeps its lists; it is found without importing it."""
    package = importlib.util.find_spec(_PACKAGE)
    if package is None or not package.submodule_search_locations:
        return None
    return Path(package.submodule_search_locations[0]) / "datasets"
