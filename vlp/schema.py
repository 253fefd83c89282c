"""Strict dataclasses from plain mappings: unknown keys get a suggestion, all problems are reported
at once.

`parse(Cls, mapping)` walks the fields of a dataclass and converts by annotation: bool, int, float,
str, None, Literal, unions, list[T], tuple[T, ...], dict[str, T], nested dataclasses; a class with a
`from_config(value)` classmethod reads itself; and `Annotated[T, hook]` hands the value to
`hook.parse(value, path, problems)` (plug-ins do that). A dataclass may raise ValueError in
`__post_init__` for values that make no sense together, and name former keys in `RENAMED`, a mapping
of the old to the new one: they are refused with the new.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal

Path = tuple[str | int, ...]
_DECIMAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a configuration, and where: `path` leads from the root to the value."""

    path: Path
    message: str


class ConfigError(ValueError):
    """Everything that is wrong with a configuration, one line a problem.

    `lines` maps paths to "file:line"; a problem is placed at the nearest known ancestor of its
    path.
    """

    def __init__(self, problems: list[Problem], lines: dict[Path, str] | None = None) -> None:
        self.problems = problems
        super().__init__("\n".join(self._describe(p, lines or {}) for p in problems))

    @staticmethod
    def _describe(problem: Problem, lines: dict[Path, str]) -> str:
        # A key that is missing has no line; the section that should hold it has.
        place = ""
        for length in range(len(problem.path), -1, -1):
            ancestor = problem.path[:length]
            if ancestor in lines:
                place = lines[ancestor]
                break

        name = ".".join(map(str, problem.path))
        return ": ".join(part for part in (place, name, problem.message) if part)


def did_you_mean(name: str, choices: typing.Iterable[str]) -> str:
    """A suggestion to append to an error: ", did you mean 'x'?" or the list of what exists."""
    choices = sorted(choices)
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.6)
    if close:
        return f", did you mean {close[0]!r}?"
    return f"; known: {', '.join(choices) or 'none'}"


def parse(cls: type, value: Any, path: Path = ()) -> Any:
    """Build dataclass `cls` from the mapping `value`; raises ConfigError naming every problem
    found.
    """
    problems: list[Problem] = []
    result = parse_into(cls, value, path, problems)
    if problems:
        raise ConfigError(problems)
    return result


def parse_into(annotation: Any, value: Any, path: Path, problems: list[Problem]) -> Any:
    """Convert `value` by `annotation`, appending to `problems`; what is returned after a problem is
    meaningless.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)

    # In the order from outer to inner forms: a union may hold all that follow.
    if origin is typing.Annotated:
        return arguments[1].parse(value, path, problems)
    if origin in (typing.Union, types.UnionType):
        return _union(arguments, value, path, problems)
    if origin is Literal:
        return _choice(arguments, value, path, problems)
    if origin in (list, tuple):
        return _sequence(origin, arguments, value, path, problems)
    if origin is dict or annotation is dict:
        if not isinstance(value, dict):
            return _wrong(value, "a mapping", path, problems)
        inner = arguments[1] if arguments else Any
        return {key: parse_into(inner, item, (*path, key), problems) for key, item in value.items()}

    # Read by whoever uses it.
    if annotation is Any:
        return value
    if hasattr(annotation, "from_config"):
        try:
            return value if isinstance(value, annotation) else annotation.from_config(value)
        except ValueError as error:
            problems.append(Problem(path, str(error)))
            return None
    if dataclasses.is_dataclass(annotation):
        return _dataclass(annotation, value, path, problems)
    return _scalar(annotation, value, path, problems)


def _choice(choices: tuple, value: Any, path: Path, problems: list[Problem]) -> Any:
    """One of a Literal's values."""
    # By kind as well: to Python 1, 1.0 and True are equal, and here they do not mean the same.
    if any(type(choice) is type(value) and choice == value for choice in choices):
        return value

    hint = f"; known: {', '.join(map(_written, choices))}"
    meant = [choice for choice in choices if _same(choice, value)]
    if meant:
        hint = f", did you mean {_written(meant[0])}?"
    elif isinstance(value, str):
        hint = did_you_mean(value, map(_written, choices))
    problems.append(Problem(path, f"{value!r} is not a choice{hint}"))
    return value


def _same(choice: Any, value: Any) -> bool:
    """Whether a value of another kind is likely to mean the choice: 1 for true, "2" for 2."""
    return choice == value or str(value).lower() in (str(choice).lower(), _written(choice))


def _written(choice: Any) -> str:
    """A choice as it is written in YAML."""
    return str(choice).lower() if isinstance(choice, bool) else str(choice)


def _wrong(value: Any, expected: str, path: Path, problems: list[Problem]) -> Any:
    """None, which stands for the value; the problem is noted."""
    problems.append(Problem(path, f"found {value!r} ({type(value).__name__}), expected {expected}"))


def _scalar(annotation: Any, value: Any, path: Path, problems: list[Problem]) -> Any:
    if annotation in (None, type(None)):
        return None if value is None else _wrong(value, "nothing (null)", path, problems)
    if annotation is float:
        return _number(value, path, problems)
    if annotation is int:
        # True and False are numbers to Python; nobody means them so.
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        return value if is_whole else _wrong(value, "a whole number", path, problems)

    name = {str: "text", bool: "true or false"}.get(annotation)
    if name is None:
        key = ".".join(map(str, path))
        raise TypeError(f"{key}: annotation {annotation!r} is not supported by vlp.schema")
    return value if isinstance(value, annotation) else _wrong(value, name, path, problems)


def _number(value: Any, path: Path, problems: list[Problem]) -> float | None:
    # YAML 1.1 reads 1e-3, without a dot, as text.
    if isinstance(value, str) and _DECIMAL.fullmatch(value):
        value = float(value)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return _wrong(value, "a number", path, problems)
    if not math.isfinite(value):
        return _wrong(value, "a finite number", path, problems)
    return float(value)


def _union(arguments: tuple, value: Any, path: Path, problems: list[Problem]) -> Any:
    """The first alternative that takes the value; where none does, the problems of one of them."""
    attempts = []
    for argument in arguments:
        problems_here: list[Problem] = []
        result = parse_into(argument, value, path, problems_here)
        if not problems_here:
            return result
        attempts.append((argument, problems_here))

    # The alternative whose outer form fits tells most: a mapping is meant for the dataclass, a list
    # for the list.
    for argument, problems_here in attempts:
        is_inside = any(problem.path != path for problem in problems_here)
        is_section = dataclasses.is_dataclass(argument) and isinstance(value, dict)
        if is_inside or is_section:
            problems.extend(problems_here)
            return None

    of_values = [listed for argument, listed in attempts if argument is not type(None)]
    fewest = min(of_values, key=len)
    problems.append(fewest[0])
    return None


def _sequence(
    origin: type, arguments: tuple, value: Any, path: Path, problems: list[Problem]
) -> Any:
    if not isinstance(value, (list, tuple)):
        return _wrong(value, "a list", path, problems)

    # A tuple of fixed length has a kind for each place; a list has one for all.
    fixed = origin is tuple and arguments and Ellipsis not in arguments
    if fixed and len(value) != len(arguments):
        return _wrong(value, f"a list of {len(arguments)} items", path, problems)
    kinds = arguments
    if not fixed:
        kinds = (arguments[0] if arguments else Any,) * len(value)
    items = [
        parse_into(kind, item, (*path, i), problems)
        for i, (kind, item) in enumerate(zip(kinds, value))
    ]
    return origin(items)


def _dataclass(cls: Any, value: Any, path: Path, problems: list[Problem]) -> Any:
    if not isinstance(value, dict):
        return _wrong(value, "a mapping", path, problems)

    # Annotations are text (from __future__ import annotations) and have to be resolved.
    hints = typing.get_type_hints(cls, include_extras=True)
    known = {f.name: f for f in dataclasses.fields(cls) if f.init}
    for key in value:
        if key in getattr(cls, "RENAMED", ()):
            now = cls.RENAMED[key]
            problems.append(Problem((*path, key), f"{key!r} is called {now!r} now; write that"))
        elif key not in known:
            suggestion = did_you_mean(str(key), known)
            problems.append(Problem((*path, key), f"unknown key {key!r}{suggestion}"))

    n_before, values = len(problems), {}
    for name, spec in known.items():
        no_default = spec.default is spec.default_factory is dataclasses.MISSING
        if name in value:
            values[name] = parse_into(hints[name], value[name], (*path, name), problems)
        elif no_default:
            problems.append(Problem(path, f"missing key {name!r}"))
    if len(problems) > n_before:
        return None

    # What makes no sense together, the class itself says.
    try:
        return cls(**values)
    except ValueError as error:
        problems.append(Problem(path, str(error)))
        return None


def plain(value: Any) -> Any:
    """The inverse of `parse`: dataclasses (and whatever has `to_config`) back to mappings, lists
    and scalars.
    """
    if hasattr(value, "to_config"):
        return value.to_config()
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value
