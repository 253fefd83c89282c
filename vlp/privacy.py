"""What leaves this process, and what does not: secrets, and for pages and cards the folders of this
machine. Standard library only.

Every file of a run, every mark of a tool, every tracker and every line to the console goes through
here.

    scrubbed(text)       a message: secrets hidden
    without_secrets(x)   a configuration that is kept to go on from: secrets hidden, keys kept
    shareable(x)         one for a model card: secrets left out, places by their last part
    private(text)        text of a page: secrets hidden, places by their last part
    address(url)         an address without credentials and signature: the name of a file in a cache

Secrets are: of an address the credentials before @ and its query, unless all of it is harmless;
every text under `storage`; values of keys such as token or api_key; tokens that can be told by
their form; the values of environment variables such as HF_TOKEN, and what `remember` has seen.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

HIDDEN = "***"

_STORAGE = re.compile(r"(?i)^(storage|storage_options|client_kwargs)$")
_HEADERS = re.compile(r"(?i)^(headers?|auth(orization)?|cookies?)$")
_SECRET = re.compile(
    r"(?i)(^|[_-])(token|secret|password|passwd|credential|signature|authorization|"
    r"api_?key|access_?key|account_?key|connection_string|key)s?$"
)
_VARIABLE = re.compile(
    r"(?i)(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|SIGNATURE|KEY|PAT|DSN|CONNECTION_STRING)$"
)
_TOKEN = re.compile(r"\b(hf_|sk-|ghp_|gho_|github_pat_|glpat-|xox[a-z]-|AKIA|ASIA|ya29\.)[\w-]{8,}")
_BEARER = re.compile(r"((?i:\bbearer\s+)|\bBasic\s+(?=\S*[\d=]))[\w.~+/=-]{6,}")
_NAMES = r"(?:token|secret|password|passwd|signature|authorization|api[_-]?key|access[_-]?key)s?"
_ASSIGNED = re.compile(
    rf"(?i)((?:^|[^A-Za-z0-9])(?:{_NAMES}|(?<=[._-])key)[\"']?[=:][\"']?)"
    r"(?!true\b|false\b|none\b|null\b)[^\s\"',;&)}\]]{6,}"
)
_HEADER = re.compile(rf"(?i)((?:^|[^A-Za-z0-9]){_NAMES}[\"']?:\s+[\"']?)[^\s\"',;)}}\]]{{12,}}")
# In Azure's connection strings, in any case of letters. A signature for shared access is a query.
_AZURE = re.compile(
    r"(?i)(\b(?:AccountKey|SharedAccessKey|SharedAccessSignature)=)[^\s\"';,)}\]]{6,}"
)
_SHARED = re.compile(r"((?:^|[?&;\s\"'=])sig=)[^\s\"'&;,)}\]]{6,}")
_LOGIN = re.compile(r"((?:^|\s)(?:-u|--user|--password)[= ])\S+")
_ADDRESS = re.compile(
    r"\b(?P<scheme>[a-z][a-z0-9+.-]*://)(?:[^\s/'\"<>?]*@)?"
    r"(?P<place>(?:(?!::)[^\s?#'\"<>])*)(?P<query>[?#](?:(?!::)[^\s'\"<>])*)?"
)
_HARMLESS = {
    "download", "dl", "raw", "rev", "revision", "ref", "version", "versionid", "generation", "alt",
    "format",
}  # fmt: skip
_PATH = re.compile(r"(?<![\w.:/~…-])(?:~|/|[A-Za-z]:\\)[^\s'\"<>,;:()]*[/\\][^\s'\"<>,;:()]*")
_SHORTEST = 6  # letters of a value that is looked for in other text

_FOLDERS = (
    "path", "paths", "data", "images", "out", "resume", "embeddings", "classes", "templates",
    "captions",
)  # fmt: skip
_REFERENCES = ("init_from", "pretrained", "model", "tokenizer", "architecture", "reference")

_remembered: set[str] = set()  # secrets of the configurations that this process has read


def scrubbed(text: str) -> str:
    """The text with every secret hidden."""
    # The longest first: one secret may be the beginning of another.
    for value in sorted({*_remembered, *_of_environment()}, key=len, reverse=True):
        text = text.replace(value, HIDDEN)

    # Addresses before words, whose patterns would cut an address in two.
    text = _ADDRESS.sub(lambda match: _bare(match, HIDDEN), text)
    text = _TOKEN.sub(HIDDEN, text)
    for pattern in (_BEARER, _ASSIGNED, _AZURE, _SHARED, _HEADER, _LOGIN):
        text = pattern.sub(rf"\g<1>{HIDDEN}", text)
    return text


def without_secrets(value: Any, key: str = "") -> Any:
    """A tree of mappings, lists and scalars, of the same form, with its secrets hidden. `key`: the
    one that it stands under.
    """
    if is_secret(key, value):
        return _hide(value, numbers=not _STORAGE.match(key))
    if isinstance(value, Mapping):
        return {name: without_secrets(item, str(name)) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_secrets(item) for item in value]
    return scrubbed(value) if isinstance(value, str) else value


def is_secret(key: str, value: Any) -> bool:
    """Whether what stands under this key of a configuration is nobody else's business."""
    # All of these, whatever their names: each file system has keys of its own.
    if _STORAGE.match(key) or _HEADERS.match(key):
        return True
    can_hold_text = isinstance(value, (str, bytes, Mapping, list, tuple))
    return can_hold_text and bool(value) and bool(_SECRET.search(key))


def _hide(value: Any, numbers: bool) -> Any:
    """The same tree with every text hidden, and `numbers` where their place says that they are
    secret, too.
    """
    if isinstance(value, Mapping):
        hidden = {}
        for name, item in value.items():
            named_secret = bool(_SECRET.search(str(name)))
            hidden[name] = _hide(item, numbers or named_secret)
        return hidden
    if isinstance(value, (list, tuple)):
        return [_hide(item, numbers) for item in value]

    if value is None or isinstance(value, bool) or value == "":
        return value
    is_harmless = isinstance(value, (int, float)) and not numbers
    return value if is_harmless else HIDDEN


def hidden_keys(value: Any, path: str = "") -> Iterator[str]:
    """Dotted keys of a configuration whose values hold what `without_secrets` hid."""
    # Sequences by number, as overrides name their items.
    if isinstance(value, Mapping):
        items = [(str(name), item) for name, item in value.items()]
    elif isinstance(value, (list, tuple)):
        items = [(str(i), item) for i, item in enumerate(value)]
    else:
        items = []
        text = value if isinstance(value, str) else ""

        # A caption's template may hold asterisks of its own.
        of_secrets = text == HIDDEN or "://" in text or text.startswith("pipe:")
        if HIDDEN in text and of_secrets:
            yield path

    for name, item in items:
        yield from hidden_keys(item, f"{path}.{name}" if path else name)


def remember(value: Any, key: str = "") -> None:
    """Remember the secrets of a configuration, so that `scrubbed` knows them everywhere."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            named_secret = bool(_SECRET.search(str(name)) or _HEADERS.match(str(name)))
            inherits = is_secret(key, item) and not named_secret
            remember(item, key if inherits else str(name))
    elif isinstance(value, (list, tuple)):
        for item in value:
            remember(item, key)
    elif isinstance(value, str) and is_secret(key, value) and HIDDEN not in value:
        # A header such as "Bearer abc" is shown by others without its first word.
        parts = (value, *value.split(), *_keys_of(value))
        _remembered.update(part for part in parts if _is_telling(part, key))


def _keys_of(text: str) -> list[str]:
    """The secrets within a connection string of Azure, which its errors may show alone."""
    return [match[0][len(match[1]) :] for match in _AZURE.finditer(text)]


def _is_telling(part: str, key: str) -> bool:
    """Whether a text is worth looking for elsewhere: what only stands in `storage` may be a common
    word or an address.
    """
    # Hiding a region's or a host's name everywhere would spoil other messages.
    if _STORAGE.match(key):
        return len(part) >= 16 and "/" not in part
    return len(part) >= _SHORTEST and part.lower() not in ("bearer", "basic", "digest")


def address(url: str) -> str:
    """An address without credentials and signatures: the same file has the same one."""
    return _ADDRESS.sub(lambda match: _bare(match, ""), url)


def _bare(match: re.Match[str], instead: str) -> str:
    """An address without credentials, and with `instead` of a query that may be a signature."""
    # A signature stands in the query, whatever the service calls it.
    query = match["query"] or ""
    if query and not _is_harmless(match["scheme"], query):
        query = query[0] + instead if instead else ""
    return f"{match['scheme']}{match['place']}{query}"


def _is_harmless(scheme: str, query: str) -> bool:
    """Whether a query asks for a file in a form or version, and signs nothing."""
    names = {part.partition("=")[0].lower() for part in re.split("[?#&]", query) if part}
    if scheme not in ("http://", "https://") and "=" not in query:
        return True  # a pattern of files: s3://bucket/000??.tar
    return names <= _HARMLESS | {HIDDEN}


def _of_environment() -> set[str]:
    """Values of the variables whose names say that they are secret."""
    named_secrets = (value for name, value in os.environ.items() if _VARIABLE.search(name))
    return {part for value in named_secrets for part in (value, *_keys_of(value)) if len(part) >= 8}


def shareable(value: Any, key: str = "") -> Any:
    """A configuration, or a part of it under `key`, for everybody: no secrets, no folders of this
    machine.
    """
    if isinstance(value, Mapping):
        return {
            name: shareable(item, str(name))
            for name, item in value.items()
            if not is_secret(str(name), item)
        }
    if isinstance(value, (list, tuple)):
        return [shareable(item, key) for item in value]
    return _shared_text(value, key) if isinstance(value, str) else value


def _shared_text(text: str, key: str) -> str:
    """A text under `key`, for everybody; `::` joins several addresses or paths."""
    # Addresses are shared whole, without what only their owner may know.
    if "://" in text:
        return scrubbed(address(text)).replace(f"?{HIDDEN}", "")
    return scrubbed("::".join(_last(part, key) for part in text.split("::")))


def _last(text: str, key: str) -> str:
    """A path by its last part; a name of open_clip or the Hub before a colon stays."""
    # `local-dir:/home/…` and `hf-hub:user/name` keep what stands before the colon.
    head, colon, place = text.rpartition(":")
    if head.startswith("hf") or "\n" in text:
        return text

    of_windows = bool(re.match(r"[A-Za-z]:\\", text))
    is_absolute = of_windows or place.startswith(("/", "~", "./", "../", "\\"))

    # A name user/name of the Hub stays.
    is_reference_path = key in _REFERENCES and place.count("/") > 1
    is_relative = "/" in place and (key in _FOLDERS or is_reference_path)
    if not is_absolute and not is_relative:
        return text

    last_part = PurePath(place.replace("\\", "/")).name
    return f"{head}{colon}{last_part}"


def private(text: str) -> str:
    """The text without secrets, and of addresses and absolute paths the last part only: pages get
    passed on.
    """

    def last_part(place: str) -> str:
        without_query = re.split(r"[?#]", place)[0].rstrip("/\\")
        return re.split(r"[/\\]", without_query)[-1]

    def shortened_address(match: re.Match[str]) -> str:
        scheme = match["scheme"].removesuffix("://")
        return f"{scheme}: …/{last_part(match['place'])}"

    text = _ADDRESS.sub(shortened_address, scrubbed(text))
    return _PATH.sub(lambda match: f"…/{last_part(match[0])}", text)
