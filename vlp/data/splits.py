"""What the names of folders and files say about the splits of a data set: train, val2017,
seg_test/, train-00000-of-00002.parquet.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

_WORDS = (
    "train|training|val|valid|validation|test|testing|dev|eval|holdout|minival|trainval|"
    "fold|unlabell?ed|query|gallery"
)
_FOLDER = re.compile(
    rf"(?P<before>[a-z\d]+[-_ ])?({_WORDS})([-_ ]?\d+)?([-_ ]?(set|split|data|images))?"
)
_FILE = re.compile(r"(train|val|validation|test|dev)(?![a-z])", re.IGNORECASE)


def among_folders(names: Iterable[str]) -> list[str]:
    """The folders that are splits, sorted; none where they may be classes: "train" beside "bus".

    Splits may share a word before theirs (seg_train, seg_test), classes do not (toy_train,
    bullet_train are two classes).
    """
    folders = sorted(set(names))
    by_prefix: defaultdict[str, list[str]] = defaultdict(list)
    for folder in folders:
        match = _FOLDER.fullmatch(folder.casefold())
        if match:
            by_prefix[match["before"] or ""].append(folder)

    # Two names that are splits in one way are no accident; a lone one counts only by itself.
    several = [splits for splits in by_prefix.values() if len(splits) > 1]
    if several:
        return max(several, key=len)
    return folders if by_prefix[""] == folders else []


def of_file(name: str) -> str:
    """The split that the beginning of a file's name tells, lower case, or ""."""
    match = _FILE.match(name)
    return match[1].lower() if match else ""
