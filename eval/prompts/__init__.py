"""Prompt templates: sentences with `{}` (or `{c}`, as clip_benchmark writes it) for the class name.

A set is a text file beside this one, one template a line (`photo`, `ensemble`), or open_clip's:
`imagenet80` (the 80 of Radford et al. 2021) and `imagenet7` (their best seven), taken from the
installed open_clip at run time.

In other languages `photo_zh`, … and `imagenet_zh`, … (translated.py).

A JSON file {class name: [sentences]} gives every class its own, as CuPL publishes them (Pratt et
al. 2023, sarahpratt/CuPL, `all_prompts/`); `{}` in them is not needed. A file of one set,
{set: [templates]}, as clip_benchmark's of a language are, is that set.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlp.eval.prompts import translated

# templates for every class, or class name -> its sentences
Templates = list[str] | dict[str, list[str]]

FROM_OPEN_CLIP = {
    "imagenet80": "OPENAI_IMAGENET_TEMPLATES",
    "imagenet7": "SIMPLE_IMAGENET_TEMPLATES",
}


def sets() -> list[str]:
    """Names of the template sets."""
    return sorted([*_files(), *FROM_OPEN_CLIP, *translated.sets()])


def _files() -> dict[str, Path]:
    """The sets that are files, by name."""
    files: dict[str, Path] = {}

    # Beside this file, and where a plug-in has put a folder of its own.
    for folder in __path__:
        files |= {file.stem: file for file in Path(folder).glob("*.txt")}
    return files


def templates(choice: str | Sequence[str] | Mapping[str, Sequence[str]]) -> Templates:
    """The templates, with `{}`, of a set, of a text file (a template a line), or as listed; of a
    JSON file or a mapping the sentences of each class.

    Raises ValueError for an unknown set, and for a template without a place for the class name.
    """
    if isinstance(choice, Mapping):
        return _of_mapping(choice, "templates")
    if isinstance(choice, str) and choice.endswith(".json"):
        return _of_json(Path(choice))
    if isinstance(choice, str) and choice in FROM_OPEN_CLIP:
        import open_clip

        return [template("{}") for template in getattr(open_clip, FROM_OPEN_CLIP[choice])]

    if isinstance(choice, str) and translated.is_known(choice):
        return translated.templates(choice)

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


def _of_json(path: Path) -> Templates:
    """Sentences by class, or a list of templates, from a JSON file."""
    value = read_json(path)
    if isinstance(value, Mapping) and len(value) == 1:
        # Sentences of one class are no set of a whole: only clip_benchmark's files are so.
        (only,) = value.values()
        value = only if _is_templates(only) else value
    return templates(value) if isinstance(value, list) else _of_mapping(value, str(path))


def _is_templates(value: Any) -> bool:
    """Whether every sentence of a list has a place for the class name."""
    is_list = isinstance(value, list) and bool(value)
    return is_list and all(isinstance(s, str) and ("{c}" in s or "{}" in s) for s in value)


def read_json(path: Path) -> Any:
    """The content of a JSON file of prompts; ValueError says what is there instead."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"no prompts at {path}; expected a file or folder") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from None


def _of_mapping(value: Any, origin: str) -> dict[str, list[str]]:
    """Sentences by class name, checked."""
    if not isinstance(value, Mapping) or not value:
        raise ValueError(
            f"{origin} holds {type(value).__name__}, expected {{class name: [sentences]}}"
        )
    for name, sentences in value.items():
        is_list = isinstance(sentences, (list, tuple)) and len(sentences) > 0
        if not is_list or not all(isinstance(s, str) and s.strip() for s in sentences):
            raise ValueError(
                f"{origin}: class {name!r} has {str(sentences)[:60]!r}, expected a list of "
                "sentences"
            )
    return {name: list(sentences) for name, sentences in value.items()}


def of_classes(chosen: Templates, names: Sequence[str]) -> list[list[str]]:
    """The prompts of each class; ValueError names classes that have none of their own."""
    if isinstance(chosen, list):
        return [fill(chosen, [name]) for name in names]

    # Lists write one name as "hot_dog", "Hot dog" and "hot dog".
    sentences = {_spelled(name): of_class for name, of_class in chosen.items()}
    silent = [name for name in names if _spelled(name) not in sentences]
    if silent:
        raise ValueError(
            f"{len(silent)} of {len(names)} classes have no prompts, e.g. {silent[0]!r}; the file "
            f"has them for {', '.join(list(chosen)[:5])}, …: give it the set's class names, or "
            "classes=FILE the names of the prompts"
        )
    templates_of = [[s.replace("{c}", "{}") for s in sentences[_spelled(name)]] for name in names]
    return [fill(of_class, [name]) for of_class, name in zip(templates_of, names)]


def _spelled(name: str) -> str:
    return " ".join(name.replace("_", " ").lower().split())


def first(chosen: Templates, n: int) -> Templates:
    """The first n of them, of every class that has its own."""
    if isinstance(chosen, list):
        return chosen[:n]
    return {name: sentences[:n] for name, sentences in chosen.items()}


def fill(templates: Sequence[str], names: Sequence[str]) -> list[str]:
    """All prompts, class by class: names[0] in every template, then names[1], …"""
    # Class by class: a view [classes, templates, D] of the embeddings then needs no copy.
    prompts = []
    for name in names:
        prompts += [template.replace("{}", name) for template in templates]
    return prompts
