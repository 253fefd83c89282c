"""The page of the API: what a program calls, with signatures and docstrings."""

from __future__ import annotations

import dataclasses
import importlib
import inspect

from _generator.text import markdown

PUBLIC = [  # in the order of a reader's way
    "vlp.load",
    "vlp.eval.inference.Model",
    "vlp.config.load",
    "vlp.losses.build",
    "vlp.losses.Objective",
    "vlp.pairwise.Pairs",
    "vlp.data.loader.Loader",
    "vlp.step.train_step",
    "vlp.step.Training",
    "vlp.types.Batch",
    "vlp.eval.evaluation.evaluate",
    "vlp.eval.evaluation.in_training",
]
WIDTH = 90  # characters of a signature on one line


def page() -> str:
    return "\n\n".join(["# API", *(described(path) for path in PUBLIC)]) + "\n"


def described(path: str) -> str:
    """A public name: its signature, its docstring, and those of its public members."""
    module, _, name = path.rpartition(".")
    value = getattr(importlib.import_module(module), name)
    parts = [f"## {path}", signature(name, value), markdown(value)]

    # A property has no call of its own.
    if inspect.isclass(value):
        for member_name, member in members(value):
            parts.append(f"### {name}.{member_name}")
            if callable(member):
                parts.append(signature(member_name, member))
            parts.append(markdown(member))
    return "\n\n".join(parts)


def members(cls: type) -> list[tuple[str, object]]:
    """Public methods and properties that have a docstring, in the order of the code."""
    is_data = dataclasses.is_dataclass(cls)
    data = {field.name for field in dataclasses.fields(cls)} if is_data else set()

    # Not inspect.getmembers: it sorts by name, and it calls properties.
    documented = []
    for name, member in vars(cls).items():
        if name.startswith("_") or name in data or not inspect.getdoc(member):
            continue
        documented.append((name, getattr(member, "__func__", member)))  # of a classmethod
    return documented


def signature(name: str, value: object) -> str:
    """The call as a fence, one argument a line where it is long."""
    called = inspect.signature(value)

    # Annotations are texts here, because the modules postpone them.
    written = arguments(called)
    says_nothing = called.return_annotation in (called.empty, None, "None")
    returned = "" if says_nothing else f" -> {called.return_annotation}"

    call = f"{name}({', '.join(written)}){returned}"
    if len(call) > WIDTH:
        lines = "".join(f"    {argument},\n" for argument in written)
        call = f"{name}(\n{lines}){returned}"
    return f"```text\n{call}\n```"


def arguments(called: inspect.Signature) -> list[str]:
    """Arguments as a caller reads them, with the star before those that need their name."""
    written = []
    for parameter in called.parameters.values():
        if parameter.name in ("self", "cls"):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in written:
            written.append("*")

        # Not str(parameter): it quotes annotations that are texts.
        has_type = parameter.annotation is not parameter.empty
        has_default = parameter.default is not parameter.empty
        type_hint = f": {parameter.annotation}" if has_type else ""
        default = f" = {parameter.default!r}" if has_default else ""
        written.append(f"{parameter.name}{type_hint}{default}")
    return written
