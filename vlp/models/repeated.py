"""The repeated modules of a tower: its blocks."""

from __future__ import annotations

from itertools import chain

from torch import nn


def repeated(module: nn.Module) -> list[nn.Module]:
    """Members of the outermost lists and sequences whose members are all of one class, and not
    single layers.
    """
    children = list(module.children())
    one_class = len({type(child) for child in children}) == 1
    all_composed = all(any(child.children()) for child in children)

    is_list = isinstance(module, (nn.ModuleList, nn.Sequential))
    if is_list and one_class and all_composed:
        return children
    return list(chain.from_iterable(repeated(child) for child in children))
