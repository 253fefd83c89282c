"""Prompt templates: sentences with `{}` (or `{c}`, as clip_benchmark writes it) for the class name.

A set is a text file beside this one, one template a line (`photo`, `ensemble`), or open_clip's:
`imagenet80` (the 80 of Radford et al. 2021) and `imagenet7` (their best seven), taken from the
installed open_clip at run time.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

FROM_OPEN_CLIP = {
    "imagenet80": "OPENAI_IMAGENET_TEMPLATES",
    "imagenet7": "SIMPLE_IMAGENET_TEMPLATES",
}


def sets() -> list[str]:
    """Names of the template sets."""
    return sorted(
        [p.name[:-4] for p in files(__name__).iterdir() if p.name.endswith(".txt")]
        + list(FROM_OPEN_CLIP)
    )


def templates(choice: str | Sequence[str]) -> list[str]:
    """The templates, with `{}`, of a set, of a text file (a template a line), or as given; a
    ValueError says what is wrong.
    """
    if not isinstance(choice, str):
        lines = list(choice)
    elif choice in FROM_OPEN_CLIP:
        import open_clip

        return [template("{}") for template in getattr(open_clip, FROM_OPEN_CLIP[choice])]
    elif choice in sets():
        lines = (files(__name__) / f"{choice}.txt").read_text(encoding="utf-8").splitlines()
    elif Path(choice).is_file():
        lines = Path(choice).read_text(encoding="utf-8").splitlines()
    else:
        raise ValueError(f"no template set or file {choice!r}; known sets: {', '.join(sets())}")
    lines = [line.strip().replace("{c}", "{}") for line in lines if line.strip()]
    wrong = [line for line in lines if line.count("{}") != 1]
    if wrong or not lines:
        raise ValueError(
            f"templates need exactly one {{}} or {{c}} for the class name, found {wrong or 'no template'}"
        )
    return lines


def fill(templates: Sequence[str], names: Sequence[str]) -> list[str]:
    """All prompts, class by class: names[0] in every template, then names[1], …"""
    return [template.replace("{}", name) for name in names for template in templates]
