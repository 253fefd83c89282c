"""Every file of vlp/selection keeps the folder's contract."""

import dataclasses
import inspect

from vlp import plugin


def test_every_selection_has_options_and_opens():
    found = plugin.names("vlp.selection")
    assert found == ["jest", "mcl"]
    for name in found:
        module = plugin.load("vlp.selection", name)
        assert "arXiv" in module.__doc__ and dataclasses.is_dataclass(module.Options)
        assert module.Options.__dataclass_params__.frozen
        assert list(inspect.signature(module.open).parameters)[:2] == ["options", "config"]
