"""The state of any optimiser by parameter and key: tensors, lists of them, and plain numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from vlp.config import Optimizer
from vlp.optim.build import create

T = TypeVar("T")
# (whole, like) -> a rank's part of a whole tensor, as `like` lies on this rank
Part = Callable[[Tensor, Tensor], Tensor]


def named_values(
    optimizer: torch.optim.Optimizer, parameter: Tensor, counters: Iterable[str] = ()
) -> Iterator[tuple[str, Tensor]]:
    """Key and tensor of all that an optimiser keeps of a parameter.

    A list's members are "Q:0", "Q:1", …; numbers become tensors of one; what the optimiser counts
    in its groups (`counters`, as `trial` finds them) is "group:step".
    """
    base = _base(optimizer)
    yield from _leaves(base.state.get(parameter, {}))
    if counters:
        group = _group_of(base, parameter)
        for key in sorted(counters):
            if key in group:
                yield f"group:{key}", _tensor(group[key])


def _leaves(state: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for key, value in state.items():
        if isinstance(value, (list, tuple)):
            for place, member in enumerate(value):
                yield f"{key}:{place}", _tensor(member)
        elif value is not None:
            yield key, _tensor(value)


def _tensor(value: Any) -> Tensor:
    # float32 would round a product of rates.
    if isinstance(value, float):
        return torch.tensor(value, dtype=torch.float64)
    return value if isinstance(value, Tensor) else torch.tensor(value)


def _base(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimiser that holds the state: Lookahead keeps its own in that of another."""
    return getattr(optimizer, "_base_optimizer", optimizer)


def _group_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Any]:
    for group in optimizer.param_groups:
        if any(member is parameter for member in group["params"]):
            return group
    raise KeyError("the parameter is in no group")


class _FirstValues(dict):
    """A parameter's state that remembers what each key was first set to."""

    def __init__(self) -> None:
        super().__init__()
        self.first: dict[str, Any] = {}

    def __setitem__(self, key: str, value: Any) -> None:
        # Tensors change in place later.
        if key not in self.first:
            self.first[key] = value.clone() if isinstance(value, Tensor) else value
        super().__setitem__(key, value)


def initial_states(
    parameter_groups: list[dict[str, Any]], options: Optimizer
) -> dict[Tensor, dict[str, Any]]:
    """The state that an optimiser would have of each parameter before its first step.

    Optimisers make it in that step. So a twin does one, with gradients of zero and on copies of the
    parameters, and what each key was first set to is kept.
    """
    copies: dict[Tensor, Tensor] = {}
    twin_groups = []
    for group in parameter_groups:
        for parameter in group["params"]:
            copies[parameter] = parameter.detach().clone().requires_grad_()
            copies[parameter].grad = torch.zeros_like(parameter)
        settings = {key: value for key, value in group.items() if key != "params"}
        twin_groups.append({**settings, "params": [copies[p] for p in group["params"]]})

    twin = create(twin_groups, options)
    base = _base(twin)
    for copied in copies.values():
        state = _FirstValues()
        for key, value in base.state.pop(copied, {}).items():  # Adagrad makes it at once
            state[key] = value
        base.state[copied] = state

    twin.step()
    return {parameter: {**base.state[c], **base.state[c].first} for parameter, c in copies.items()}


def by_parameter(moments: Mapping[str, Tensor]) -> dict[str, dict[str, str]]:
    """{name of a parameter: {key: full name}} of saved state, "key.name of the parameter" → tensor,
    of which nothing is read.
    """
    names: dict[str, dict[str, str]] = {}
    for full_name in moments:
        key, _, name = full_name.partition(".")
        names.setdefault(name, {})[key] = full_name
    return names


def restore(
    optimizer: torch.optim.Optimizer,
    options: Optimizer,
    parameters: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    part: Part,
) -> None:
    """Take over saved state, whole tensors by "key.name of the parameter"; a parameter that has
    none starts anew.

    part(whole, like): what this rank keeps of a whole tensor. ValueError where the state is of
    another optimiser, or of other options.
    """
    if not moments:
        return

    # Its form, and on which device each part of it lives, is the optimiser's affair.
    templates = initial_states(optimizer.param_groups, options)
    base = _base(optimizer)
    for name, full_names in by_parameter(moments).items():
        parameter = parameters.get(name)
        if parameter is None or parameter not in templates:
            continue

        # One parameter after another: no more is read at a time.
        saved = {key: moments[full_name] for key, full_name in full_names.items()}
        base.state[parameter] = _fill(templates[parameter], saved, parameter, part, name)
        _load_counters(base, parameter, saved)


def _fill(
    template: dict[str, Any], saved: dict[str, Tensor], parameter: Tensor, part: Part, place: str
) -> dict[str, Any]:
    """A parameter's state of the form of `template`, with the values of `saved`, whole tensors by
    the keys of `named_values`.

    part(whole, like): this rank's part of a whole tensor. ValueError, which names `place`, where
    something is missing or has another shape.
    """
    left = dict(saved)
    state: dict[str, Any] = {}
    for key, value in template.items():
        if isinstance(value, (list, tuple)):
            members = [
                _filled(member, left, f"{key}:{i}", part, place) for i, member in enumerate(value)
            ]
            state[key] = type(value)(members)
        elif value is None:
            state[key] = None
        else:
            state[key] = _filled(value, left, key, part, place)

    # What comes into being at a later step (Lookahead's slow weights) is like the parameter.
    for key, whole in left.items():
        if ":" not in key:
            state[key] = part(whole, parameter)
    return state


def _filled(value: Any, left: dict[str, Tensor], key: str, part: Part, place: str) -> Any:
    whole = saved_value(left, key, place)
    del left[key]
    if not isinstance(value, Tensor):
        return _number(whole)
    if whole.shape != value.shape:
        raise ValueError(
            f"the checkpoint's {key!r} of {place} has shape {tuple(whole.shape)}, expected "
            f"{tuple(value.shape)}; give the train.optimizer.options that it was written with"
        )
    return part(whole.to(value.dtype), value)


def saved_value(saved: Mapping[str, T], key: str, place: str) -> T:
    """A value of a parameter's saved state, or its name there; ValueError, which names `place`,
    where there is none.
    """
    if key not in saved:
        raise ValueError(
            f"the checkpoint's state of the optimiser has no {key!r} of {place}; give the "
            "train.optimizer.name and options that it was written with"
        )
    return saved[key]


def _load_counters(
    optimizer: torch.optim.Optimizer, parameter: Tensor, saved: dict[str, Tensor]
) -> None:
    """Set what the optimiser counts in the group of a parameter."""
    group = _group_of(optimizer, parameter)
    for key, value in saved.items():
        prefix, _, name = key.partition(":")
        if prefix != "group":
            continue

        group[name] = _number(value)


def _number(saved: Tensor) -> Any:
    """What was a number for Python, or else the tensor: optimisers count in float32 alone."""
    is_plain = saved.dtype in (torch.bool, torch.int64, torch.float64)
    return saved.item() if is_plain else saved.clone()
