"""Dataclasses read from their source text: fields, defaults and the comments beside them.

Nothing is imported, so that the reference of the configuration answers at once: the files of
objectives and towers import torch. A comment exists in the text only.
"""

from __future__ import annotations

import ast
import functools
import io
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import vlp


@dataclass(frozen=True)
class Module:
    """A file of this project as text."""

    name: str  # dotted: vlp.losses.infonce
    tree: ast.Module
    comments: dict[int, str] = field(repr=False)  # line -> text without the sign
    alone: frozenset[int] = field(repr=False)  # lines that hold a comment and nothing else

    @property
    def summary(self) -> str:
        """The first paragraph of the docstring, in one line."""
        return summary_of(self.tree)

    def defines(self, function: str) -> bool:
        """Whether a function of this name stands in the file itself."""
        return any(isinstance(n, ast.FunctionDef) and n.name == function for n in self.tree.body)


@dataclass(frozen=True)
class Class:
    """A class and the file that it stands in, which its names belong to."""

    module: Module
    node: ast.ClassDef

    @property
    def summary(self) -> str:
        return summary_of(self.node)

    @property
    def is_dataclass(self) -> bool:
        return any("dataclass" in ast.unparse(item) for item in self.node.decorator_list)

    def defines(self, method: str) -> bool:
        return any(isinstance(n, ast.FunctionDef) and n.name == method for n in self.node.body)


@dataclass(frozen=True)
class Field:
    """A field of a dataclass."""

    name: str
    annotation: ast.expr
    default: ast.expr | None  # None: it has to be given
    sentence: str  # the comments above and beside it, in one line
    module: Module  # in which the names of annotation and default have their meaning


def summary_of(node: ast.Module | ast.ClassDef) -> str:
    """The first paragraph of a docstring, in one line."""
    paragraph = (ast.get_docstring(node) or "").split("\n\n")[0]
    return " ".join(paragraph.split())


@functools.cache
def read(name: str) -> Module | None:
    """The module of a dotted name, or None where there is no such file."""
    folder = Path(vlp.__path__[0]).joinpath(*name.split(".")[1:])
    for path in (folder.with_suffix(".py"), folder / "__init__.py"):
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            comments, alone = _comments(text)
            return Module(name, ast.parse(text), comments, alone)
    return None


def plugins(package: str) -> Iterator[Module]:
    """The plug-ins of a folder: its public files, as vlp.plugin finds them."""
    folder = Path(vlp.__path__[0]).joinpath(*package.split(".")[1:])
    for path in sorted(folder.iterdir()):
        is_module = path.suffix == ".py" or (path / "__init__.py").is_file()

        # Files with an underscore are shared by plug-ins, and are none.
        if not is_module or path.stem.startswith("_"):
            continue
        module = read(f"{package}.{path.stem}")
        assert module is not None, path
        yield module


def _comments(text: str) -> tuple[dict[int, str], frozenset[int]]:
    """The comments by line, and the lines that hold nothing else; a syntax tree has neither."""
    comments, alone = {}, set()

    # A sign of a comment may stand in a text; the tokenizer knows which is which.
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            line, column = token.start
            comments[line] = token.string.lstrip("#").strip()
            if not token.line[:column].strip():
                alone.add(line)
    return comments, frozenset(alone)


def class_named(name: ast.expr, module: Module) -> Class | None:
    """The class of this project that a name means in a file, whatever file it is imported from."""
    # `_moving.Individual`, where the file imports the module.
    if isinstance(name, ast.Attribute) and isinstance(name.value, ast.Name):
        holder = _imported(name.value.id, module)
        return None if holder is None else _class_in(holder, name.attr)
    return _class_in(module, name.id) if isinstance(name, ast.Name) else None


def _class_in(module: Module, name: str) -> Class | None:
    for statement in module.tree.body:
        if isinstance(statement, ast.ClassDef) and statement.name == name:
            return Class(module, statement)

    # Not defined here: perhaps imported, or exported again by a package.
    for node in ast.walk(module.tree):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("vlp"):
            continue
        for alias in node.names:
            if (alias.asname or alias.name) == name:
                holder = read(node.module)
                return None if holder is None else _class_in(holder, alias.name)
    return None


def _imported(name: str, module: Module) -> Module | None:
    """The module that `from vlp.losses import _moving` binds to a name."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return read(f"{node.module}.{alias.name}")
    return None


def fields_of(found: Class) -> dict[str, Field]:
    """The fields of a dataclass by name, those of its bases first, in the order of dataclasses."""
    fields: dict[str, Field] = {}

    # dataclasses collects the bases from the last one to the first.
    for base in reversed(found.node.bases):
        parent = class_named(base, found.module)
        if parent is not None:
            fields |= fields_of(parent)

    # A field keeps the place of the base's one that it replaces.
    for node in found.node.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        if ast.unparse(node.annotation).startswith("ClassVar"):
            continue  # of the class, no key
        name = node.target.id
        sentence = _sentence(node, found.module)
        if not sentence and name in fields:  # another default for what a base explains
            sentence = fields[name].sentence

        fields[name] = Field(name, node.annotation, node.value, sentence, found.module)
    return fields


def _sentence(node: ast.AnnAssign, module: Module) -> str:
    """The comments directly above a field and those on its own lines."""
    # A sentence too long for the line stands above its field.
    above: list[str] = []
    line = node.lineno - 1
    while line in module.alone:
        above.insert(0, module.comments[line])
        line -= 1

    # Beside includes the lines of a default in parentheses.
    own_lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
    beside = [module.comments[line] for line in own_lines if line in module.comments]
    return " ".join([*above, *beside])
