"""The server that loader processes are forked from: how the trainer starts it, and what it does
first.

It imports what they need once; they share that memory. It leaves the trainer's session, because
launchers and terminals send a signal to the trainer's whole process group: loader processes that
died of it would leave the trainer, which still has to end its step and save, without its batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver

from vlp.config import Config

# In the server's environment; this module is imported elsewhere, too.
_MARK = "VLP_LOADER_SERVER"


def start_for(config: Config) -> None:
    """Start the server with all that loader processes will need for this run, if it has any: early,
    for it takes seconds.
    """
    if not config.data.workers:
        return

    modules = [plugin.module.__name__ for plugin in config.data.sources]

    # What only some configurations need, and is slow to import.
    augment = config.data.augment
    if config.data.views or augment.color or augment.grayscale:
        modules.append("torchvision.transforms.v2")
    if config.model.text_tower is not None and config.model.text_tower.name != "transformer":
        modules.append("transformers")
    start(*modules)


def start(*modules: str) -> None:
    """Start the server, unless it runs, and return: it imports `modules` while this process goes
    on.
    """
    # Imported by the server once, and shared by all processes that are forked from it.
    preloaded = [__name__, "vlp.data.loader", "vlp.data._clip_text", *modules]
    forkserver.set_forkserver_preload(preloaded)

    # The server is started by `python -c`, which would look for modules in the current folder
    # first.
    with _environment(PYTHONSAFEPATH="1", **{_MARK: "1"}):
        forkserver.ensure_running()


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Environment variables for a process that is started inside."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)

    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


# Only in the server itself: its own session keeps a launcher's signals from it.
if os.environ.pop(_MARK, None):
    os.environ.pop("PYTHONSAFEPATH", None)
    os.setsid()
