"""Prompt templates: sentences with `{}` (or `{c}`, as clip_benchmark writes it) for the class name.

A set is a text file beside this one, one template a line (`photo`, `ensemble`), or open_clip's:
`imagenet80` (the 80 of Radford et al. 2021) and `imagenet7` (their best seven), taken from the
installed open_clip at run time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

FROM_OPEN_CLIP = {
    "imagenet80": "OPENAI_IMAGENET_TEMPLATES",
    "imagenet7": "SIMPLE_IMAGENET_TEMPLATES",
}


def sets() -> list[str]:
    """Names of the template sets."""
    return sorted([*_files(), *FROM_OPEN_CLIP])


def _files() -> dict[str, Path]:
    """The sets that are files, by name."""
    files: dict[str, Path] = {}

    # Beside this file, and where a plug-in has put a folder of its own.
    for folder in __path__:
        files |= {file.stem: file for file in Path(folder).glob("*.txt")}
    return files


def templates(choice: str | Sequence[str]) -> list[str]:
    """The templates, with `{}`, of a set, of a text file (a template a line), or as listed.

    Raises ValueError for an unknown set, and for a template without a place for the class name.
    """
    if isinstance(choice, str) and choice in FROM_OPEN_CLIP:
        import open_clip

        return [template("{}") for template in getattr(open_clip, FROM_OPEN_CLIP[choice])]

    # `{c}` is how clip_benchmark writes the place of the name.
    lines = [line.strip().replace("{c}", "{}") for line in _lines(choice) if line.strip()]
    wrong = [line for line in lines if line.count("{}") != 1]
    if wrong or not lines:
        raise ValueError(
            "templates need exactly one {} or {c} for the class name, "
            f"found {wrong or 'no template'}"
        )
    return lines


def _lines(choice: str | Sequence[str]) -> list[str]:
    """The lines of a set or file, or the sentences as listed."""
    if not isinstance(choice, str):
        return list(choice)

    # A set's name goes before a file of that name.
    path = _files().get(choice, Path(choice))
    if not path.is_file():
        raise ValueError(f"no template set or file {choice!r}; known sets: {', '.join(sets())}")
    return path.read_text(encoding="utf-8").splitlines()


def fill(templates: Sequence[str], names: Sequence[str]) -> list[str]:
    """All prompts, class by class: names[0] in every template, then names[1], …"""
    # Class by class: a view [classes, templates, D] of the embeddings then needs no copy.
    prompts = []
    for name in names:
        prompts += [template.replace("{}", name) for template in templates]
    return prompts
