"""Evaluation tasks, one a file. `Common` holds the keys that every task of a training configuration
takes.

A task's file holds
    Options          a frozen dataclass: its configuration keys, one comment a field
    VERSION          int, raised whenever the same model and data would score differently
    KNOWN_AS         the name under which clip_benchmark records such a result
    MAIN             the score that stands for the task in tables and averages; its level by
                     guessing is in the result's `chance`
    SCORES           names of all scores it can give, by which `checkpoint.best` and `stop` are
                     checked before training, with * for what only an evaluation tells; or
    scores(options)  the same where options or data decide; with neither only MAIN can be watched
    read(options)    the evaluation set, opened and checked, nothing decoded: start-up errors come
                     from here
    run(encoder, data, options, context) -> TaskResult
and its docstring names the protocol's source. What it needs is public: `TaskResult` and `shared`
from here, `Encoder` from vlp.eval.models, `Context` from vlp.eval.embed, `DataError` and `Picture`
from vlp.eval.pictures, `open_source` from vlp.eval.datasets, and for captions that a picture must
choose among vlp.eval.choices. docs/extend-task.md is a complete example.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from vlp.config import Duration
from vlp.eval.result import TaskResult

__all__ = ["Common", "TaskResult", "shared"]


@dataclass(frozen=True)
class Common:
    """Keys of every task."""

    every: Duration | None = None  # how often during training; None: only at the end


def shared(kind: type, options: Any, **more: Any) -> Any:
    """Options of another task, `kind`, that reads the same data: with the keys that `options` has
    too, and `more`.
    """
    same = {
        key.name: getattr(options, key.name) for key in fields(kind) if hasattr(options, key.name)
    }
    return kind(**(same | more))
