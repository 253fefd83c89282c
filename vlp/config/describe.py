"""A field of the configuration in the words of whoever writes one: type, default, plug-ins."""

from __future__ import annotations

import ast
import json
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import yaml

from vlp.config import source
from vlp.config.durations import Duration
from vlp.config.source import Class, Field, Module

REQUIRED = "required"
_SCALARS = {
    "int": "whole number",
    "float": "number",
    "str": "text",
    "bool": "true or false",
    "Any": "anything",
    "None": "null",
    "dict": "mapping",
    "list": "list",
}
# By the name of a default_factory.
_EMPTY: dict[str, Any] = {"list": [], "dict": {}, "KeyedPlugins": {}}
_SIDES = {"image_tower": "vision_cfg", "text_tower": "text_cfg"}  # what a tower there must define


@dataclass(frozen=True)
class Slot:
    """A place of the configuration where plug-ins of a folder are named (vlp.plugin)."""

    name: str  # objective, data.sources, model.image_tower
    package: str
    form: Literal["keyed", "named", "list"]  # {NAME: {…}}, {name: NAME, …} or a list of those

    def key_prefix(self, plugin: str) -> str:
        """What an override writes before an option's name."""
        inner = {"keyed": f"{plugin}.", "named": "", "list": "N."}[self.form]
        return f"{self.name}.{inner}"

    def written(self, plugin: str) -> str:
        """The plug-in's place in YAML."""
        if self.form == "keyed":
            return f"{self.name}: {{{plugin}: {{…}}}}"
        section, _, key = self.name.partition(".")
        mapping = f"{{name: {plugin}, …}}"
        return f"{section}: {{{key}: {f'[{mapping}]' if self.form == 'list' else mapping}}}"

    def holds(self, module: Module) -> bool:
        """Whether a file of the folder may stand here: text towers are no image towers."""
        required = _SIDES.get(self.name.rpartition(".")[2])
        return required is None or module.defines(required)


def slot_of(annotation: ast.expr, name: str) -> Slot | None:
    """The slot for plug-ins behind an annotation such as Annotated[Plugin, Named("vlp.towers")]."""
    for node in ast.walk(annotation):
        match node:
            case ast.Call(func=ast.Name(id="Keyed"), args=[ast.Constant(value=str(package))]):
                return Slot(name, package, "keyed")
            # A list of plug-ins has the hook inside: list[Annotated[Plugin, Named(…)]].
            case ast.Call(func=ast.Name(id="Named"), args=[ast.Constant(value=str(package))]):
                in_list = ast.unparse(annotation).startswith("list[")
                return Slot(name, package, "list" if in_list else "named")
    return None


def section_of(field: Field) -> Class | None:
    """The dataclass that a field holds as a section, alone or beside null or a scalar."""
    if slot_of(field.annotation, field.name) is not None:
        return None

    # A hook in Annotated reads the value; its class is no section.
    calls = [node for node in ast.walk(field.annotation) if isinstance(node, ast.Call)]
    of_hooks = set(chain.from_iterable(ast.walk(call) for call in calls))

    # In any place, for a section may be optional: Views | None.
    for node in ast.walk(field.annotation):
        if not isinstance(node, ast.Name) or node in of_hooks:
            continue
        inner = source.class_named(node, field.module)
        if inner is not None and inner.is_dataclass and not inner.defines("from_config"):
            return inner
    return None


def type_of(field: Field) -> str:
    """A field's type in the words of whoever writes a configuration."""
    slot = slot_of(field.annotation, field.name)
    if slot is None:
        return _words(field.annotation, field.module)
    plugins = {
        "keyed": "{NAME: {option: …}, …}",
        "named": "{name: NAME, option: …}",
        "list": "[{name: NAME, option: …}, …]",
    }[slot.form]

    is_optional = isinstance(field.annotation, ast.BinOp)
    return f"{plugins} or null" if is_optional else plugins


def _alias(name: str, module: Module) -> ast.expr | None:
    """What a name of the module stands for, such as `Choice = Literal["a", "b"]`."""
    for statement in module.tree.body:
        match statement:
            case ast.Assign(targets=[ast.Name(id=target)]) if target == name:
                return statement.value
    return None


def _words(annotation: ast.expr, module: Module) -> str:
    match annotation:
        case ast.Constant(value=None):
            return "null"
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return f"{_words(left, module)} or {_words(right, module)}"
        case ast.Subscript(value=ast.Name(id="Literal"), slice=choices):
            values = choices.elts if isinstance(choices, ast.Tuple) else [choices]
            return " | ".join(_shown(ast.literal_eval(value)) for value in values)
        case ast.Subscript(value=ast.Name(id="list"), slice=item):
            return f"list of {_words(item, module)}"
        case ast.Subscript(value=ast.Name(id="tuple"), slice=ast.Tuple(elts=items)):
            return f"[{', '.join(_words(item, module) for item in items)}]"
        case ast.Subscript(value=ast.Name(id="dict"), slice=ast.Tuple(elts=[_, value])):
            return f"mapping to {_words(value, module)}"
        case ast.Subscript(value=ast.Name(id="Annotated"), slice=ast.Tuple(elts=[kind, *_])):
            return _words(kind, module)
        case ast.Name(id=name) if name in _SCALARS:
            return _SCALARS[name]
        case ast.Name(id=name) if (alias := _alias(name, module)) is not None:
            return _words(alias, module)

    named = source.class_named(annotation, module)
    if named is not None and named.defines("from_config"):
        return named.node.name.lower()
    if named is not None and named.is_dataclass:
        return f"{{{', '.join(source.fields_of(named))}}}"
    raise TypeError(f"{module.name}: no words for the type {ast.unparse(annotation)}")


def default_of(field: Field) -> str:
    """A field's default as YAML; REQUIRED where it has to be given."""
    if field.default is None:
        return REQUIRED
    match field.default:
        # default_factory=list, or the class of a section.
        case ast.Call(func=ast.Name(id="field"), keywords=[ast.keyword(value=ast.Name(id=name))]):
            return _shown(_EMPTY[name]) if name in _EMPTY else ""
        # default_factory=lambda: [1e-5, …]
        case ast.Call(func=ast.Name(id="field"), keywords=[ast.keyword(value=ast.Lambda(body=v))]):
            return _shown(ast.literal_eval(v))
        case ast.Call(func=ast.Name(id="Duration"), args=arguments):
            number, unit = (ast.literal_eval(argument) for argument in arguments)
            return _shown(Duration(number, unit).to_config())
        case ast.Call():
            return ""  # a section with the defaults of its own keys
    return _shown(ast.literal_eval(field.default))


def _shown(value: Any) -> str:
    """A plain value as YAML has it."""
    # JSON's words for these are YAML's, too.
    is_plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_plain or (isinstance(value, str) and _reads_as_itself(value)):
        return str(value)
    return json.dumps(value, ensure_ascii=False)


def _reads_as_itself(text: str) -> bool:
    """Whether YAML reads a text without quotes as that text: not {}, 1e3 or no."""
    try:
        return yaml.safe_load(text) == text
    except yaml.YAMLError:
        return False
