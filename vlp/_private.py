"""What of a configuration may be published: no secrets, no addresses' credentials, no folders of this machine.

Cards are read by everybody. Keys that hold storage options or secrets are left out; of an address its credentials and its
query, which is where signatures lie, are cut off; of a path stays the last part.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

_LEFT_OUT = re.compile(r"(?i)^(storage|storage_options|headers?|client_kwargs|auth(orization)?)$")
_SECRET = re.compile(r"(?i)(^|[_-])(token|secret|password|passwd|credential|api_?key|access_?key|key)s?$")
_TOKEN = re.compile(r"\b(hf_|sk-|ghp_|gho_|github_pat_|glpat-|xox[a-z]-|AKIA)[\w-]{8,}|(?i:\bbearer\s+)\S+")
_ADDRESS = re.compile(r"\b([a-z][a-z0-9+.-]*://)(?:[^\s/@'\"]*@)?([^\s?#'\"]*)(?:[?#][^\s'\"]*)?")
_FOLDERS = ("path", "paths", "data", "images", "out", "resume", "embeddings", "classes", "templates", "captions")
_REFERENCES = ("init_from", "pretrained", "model", "tokenizer", "architecture", "reference")


def shareable(value: Any, key: str = "") -> Any:
    """A configuration, or a part of it under `key`, without what is nobody else's business."""
    if isinstance(value, Mapping):
        return {name: shareable(item, str(name)) for name, item in value.items() if not _hidden(str(name), item)}
    if isinstance(value, (list, tuple)):
        return [shareable(item, key) for item in value]
    return _text(value, key) if isinstance(value, str) else value


def _hidden(key: str, value: Any) -> bool:
    return bool(_LEFT_OUT.match(key)) or (bool(_SECRET.search(key)) and isinstance(value, (str, bytes, Mapping, list)))


def _text(text: str, key: str) -> str:
    if "://" in text:
        return _ADDRESS.sub(r"\1\2", _TOKEN.sub("***", text))
    return _TOKEN.sub("***", "::".join(_last(part, key) for part in text.split("::")))


def _last(text: str, key: str) -> str:
    """A path by its last part; a name of open_clip or the Hub before a colon stays."""
    head, colon, place = text.rpartition(":")
    if head.startswith("hf") or "\n" in text:
        return text
    absolute = place.startswith(("/", "~", "./", "../", "\\")) or bool(re.match(r"[A-Za-z]:\\", text))
    relative = "/" in place and (key in _FOLDERS or (key in _REFERENCES and place.count("/") > 1))  # user/name stays
    local = absolute or relative
    return f"{head}{colon}{PurePath(place.replace(chr(92), '/')).name}" if local else text
