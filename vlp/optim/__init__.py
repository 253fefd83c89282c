"""Optimisers, the groups of parameters that they update, and the schedule of the learning rate.

    optim.check(options)                        refuses names, options and schedules that do not run
    optim.groups(model, options)                every trainable parameter in exactly one group
    optim.build(model, options)                 the optimiser over them
    optim.Schedule(options, plan)(step)         the learning rate of an update

Which optimiser runs under which engine is found by `optim.trial`, not by a list of names.
"""

from vlp.optim.build import build, check, guards_itself, set_up_step
from vlp.optim.groups import decays, groups
from vlp.optim.schedules import Schedule, warmup_steps
from vlp.optim.state import by_parameter, initial_states, named_values, restore, saved_value
from vlp.optim.trial import Kind, trial

__all__ = [
    "Kind",
    "Schedule",
    "build",
    "by_parameter",
    "check",
    "decays",
    "groups",
    "guards_itself",
    "initial_states",
    "named_values",
    "restore",
    "saved_value",
    "set_up_step",
    "trial",
    "warmup_steps",
]
