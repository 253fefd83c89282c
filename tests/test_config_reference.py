"""The reference of the configuration: what it says is what the dataclasses are, key by key."""

import ast
import dataclasses
import importlib
import subprocess
import sys
import typing

import pytest
import yaml

from vlp import cli, plugin, schema
from vlp.config import Config, describe, reference, source
from vlp.schema import ConfigError, plain

FOLDERS = {
    "objective": "vlp.losses",
    "selection": "vlp.selection",
    "eval": "vlp.eval.tasks",
    "data.sources": "vlp.data.sources",
    "model.image_tower": "vlp.towers",
    "model.text_tower": "vlp.towers",
}
SECTIONS = {section.name: section for section in reference.sections()}


def keys():
    return [key for section in SECTIONS.values() for key in section.keys]


def test_every_key_and_section_has_a_sentence():
    silent = [section.name for section in SECTIONS.values() if not section.sentence]
    silent += [key.key for key in keys() if not key.sentence]
    assert not silent
    assert len(SECTIONS) >= 77 and len(keys()) >= 384


def options_by_section():
    """The classes of all plug-ins, imported, by the section that describes them."""
    for name, package in FOLDERS.items():
        common = getattr(importlib.import_module(package), "Common", None)
        if common is not None:
            yield name, common
        for plugin_name in plugin.names(package):
            section = f"{name}.{plugin_name}"
            module = plugin.load(package, plugin_name)
            one_sided = name.endswith("_tower") and section not in SECTIONS
            if not one_sided:
                yield from tree(module.Options, section)


def compare(section, options):
    """The names and defaults that the text says are those of the class; returns how many."""
    described = {key.key.rpartition(".")[2]: key.default for key in section.keys}
    fields = {field.name: field for field in dataclasses.fields(options)}
    assert list(described) == list(fields), section.name

    for name, field in fields.items():
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if dataclasses.is_dataclass(default) and not hasattr(default, "to_config"):
            assert described[name] == "", (section.name, name)  # its own section says it
        elif default is dataclasses.MISSING:
            assert described[name] == reference.REQUIRED, (section.name, name)
        else:
            hint = typing.get_type_hints(options, include_extras=True)[name]
            problems = []
            read = schema.parse_into(hint, yaml.safe_load(described[name]), (), problems)
            assert not problems and plain(read) == plain(default), (section.name, name)
    return len(fields)


def test_plugins_are_described_as_they_are():
    n_keys, seen = 0, set()
    for name, options in options_by_section():
        n_keys += compare(SECTIONS[name], options)
        seen.add(name)
    assert n_keys >= 283 and len(seen) >= 55
    under_slots = {
        name for name in SECTIONS if any(f"{name}.".startswith(f"{s}.") for s in FOLDERS)
    }
    assert under_slots - seen <= {"selection"}  # which has no keys in common


def tree(cls, name=""):
    """The dataclasses of the configuration proper, by section."""
    yield name, cls
    for field in dataclasses.fields(cls):
        inner_name = f"{name}.{field.name}" if name else field.name
        if inner_name in SECTIONS and inner_name not in FOLDERS:
            hint = plugin_free(cls, field.name)
            yield from tree(hint, inner_name)


def plugin_free(cls, name):
    """The dataclass of a field, also where null may stand instead."""
    hint = typing.get_type_hints(cls)[name]
    return next(h for h in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(h))


def test_the_tree_is_described_as_it_is():
    classes = list(tree(Config))
    assert sum(compare(SECTIONS[name], cls) for name, cls in classes) >= 80
    assert len(classes) >= 18


@pytest.mark.parametrize(
    ("asked", "sections"),
    [
        (
            "train.optimizer",
            {"train.optimizer", "train.optimizer.groups", "train.optimizer.layer_decay"},
        ),
        ("objective.hard_negatives", {"objective.hard_negatives"}),
        ("image_tower.vit", {"model.image_tower.vit"}),
        ("model.image_tower.vit", {"model.image_tower.vit"}),
        ("cwcl", {"objective.cwcl"}),
        ("flip", {"data.augment", "data.views.augment"}),
    ],
)
def test_a_section_is_found_by_the_end_of_its_name(asked, sections):
    assert {section.name for section in reference.find(asked)} == sections


@pytest.mark.parametrize(
    ("asked", "holds"),
    [
        ("objective", "objective.infonce"),
        ("losses", "objective.infonce"),
        ("sources", "data.sources.shards"),
        ("tasks", "eval.zeroshot"),
        ("towers", "model.text_tower.transformer"),
        ("data", "data.augment"),
    ],
)
def test_a_section_comes_with_all_inside_it(asked, holds):
    assert holds in {section.name for section in reference.find(asked)}


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("flip", "data.augment.flip"),
        ("warm-up", "train.optimizer.warmup"),
        ("precision", "train.precision"),
        ("bf16", "train.precision"),
        ("wandb", "log.trackers"),
        ("pretrained", "model.pretrained"),
    ],
)
def test_search_finds_a_key_by_what_is_said_of_it(word, key):
    assert key in {key.key for section in reference.search(word) for key in section.keys}


def test_a_type_with_a_name_or_a_hook_is_told_by_its_choices():
    text = """
Choice = Literal["a", "b"]
class Hook: ...
class Options:
    named: Choice = "a"
    hooked: Annotated[Choice, Hook(Choice, old="c")] = "b"
"""
    module = source.Module("vlp.nowhere", ast.parse(text), {}, frozenset())
    options = source.Class(module, module.tree.body[-1])
    described = {
        name: (describe.type_of(field), describe.default_of(field))
        for name, field in source.fields_of(options).items()
    }
    assert described == {"named": ("a | b", "a"), "hooked": ("a | b", "b")}


def test_what_does_not_exist_is_answered_with_the_near_one(capsys):
    assert cli.main(["config", "train.optimzer"]) == 1
    assert "did you mean 'train.optimizer'?" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="known: out, data, model"):
        reference.find("qqq")
    with pytest.raises(ConfigError, match="no key says anything of 'qqq'"):
        reference.search("qqq")


def test_the_command_prints_every_key_and_imports_nothing_heavy():
    """In a process of its own: here torch is loaded long since."""
    code = (
        "import sys; from vlp.cli import main; status = main(['config']); "
        "sys.exit(status or ('torch' in sys.modules))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert printed.returncode == 0, printed.stderr
    assert all(f"  {key.key}" in printed.stdout for key in keys())


def test_the_help_of_train_leads_to_it(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    assert "vlp config" in capsys.readouterr().out
