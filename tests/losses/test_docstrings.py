"""What an objective's docstring says is true: its sections, its needs, and its configurations."""

import re

import pytest
import yaml

from vlp import plugin
from vlp.losses import build, reads

NAMES = plugin.names("vlp.losses")
SECTIONS = ["Relations", "Papers", "Needs", "Cost", "Use"]  # the documentation's pages show these


def sections(name: str) -> dict[str, str]:
    """{section: its text on one line} of a loss file's docstring."""
    text = plugin.load("vlp.losses", name).__doc__
    parts = re.split(r"\n\n([A-Z]\w+):", text)[1:]
    return {title: " ".join(body.split()) for title, body in zip(parts[::2], parts[1::2])}


@pytest.mark.parametrize("name", NAMES)
def test_sections_come_in_one_order(name):
    first, second, *_ = plugin.load("vlp.losses", name).__doc__.splitlines()
    assert first.endswith(".") and second == "", "one sentence on the first line"
    assert list(sections(name)) == SECTIONS


@pytest.mark.parametrize("name", NAMES)
def test_needs_are_those_of_the_defaults(name):
    (term,) = plugin.keyed("vlp.losses", {name: {}})
    optional = getattr(term.module, "OPTIONAL", frozenset())
    if hasattr(term.module, "optional"):
        optional = term.module.optional(term.options)
    named = re.split(r"[;.]", sections(name)["Needs"])[0]

    assert set(re.findall(r"\w+", named)) == reads([term]) - optional


def test_configurations_of_papers_are_valid():
    n = 0
    for name in NAMES:
        for text in re.findall(r"`objective: ([^`]+)`", sections(name)["Papers"]):
            objective = yaml.safe_load(text)
            build(objective, samples=8, steps=8)
            assert name in objective, f"{name}: {text}"
            n += 1

    assert n >= len(NAMES)
