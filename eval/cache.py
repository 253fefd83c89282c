"""`vlp cache`: what is kept between calls, and how to be rid of it."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlp.caches import Entry

HELP = "list what is kept between calls, or remove it"
EXAMPLE = """examples:
  vlp cache                               sizes and last uses, by kind
  vlp cache --older 30d                   of what was not used for so long
  vlp cache clear --older 30d             remove that
  vlp cache clear --kind embeddings search

The folder is $VLP_CACHE, else $XDG_CACHE_HOME/vlp, else ~/.cache/vlp. All of it can be made again:
embeddings of `vlp eval`, libraries of `vlp search`, indices of shards that cannot lie beside them,
copies of remote shards. What a process works with is left alone.
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    from vlp.caches import KINDS

    add = parser.add_argument
    add("action", nargs="?", choices=("list", "clear"), default="list", help="default: list")
    add("--older", metavar="SPAN", help="only what was not used for 30d, 12h, 2w or 45min")
    add("--kind", nargs="+", choices=tuple(KINDS), help="only of these kinds")


def run(options: argparse.Namespace) -> int:
    """Carry out the command; returns the exit status."""
    from vlp import caches
    from vlp.locks import age_text

    folder = caches.cache_folder()
    kinds = options.kind or [*caches.KINDS, caches.OTHER]
    least_age_s = caches.seconds_of(options.older) if options.older else 0.0

    now = time.time()
    chosen = [
        entry
        for entry in caches.entries(folder)
        if entry.kind in kinds and now - entry.last_use >= least_age_s
    ]
    if options.action == "clear":
        return _clear(chosen)

    print(f"{folder}\n")
    print(f"{'kind':<12}{'items':>7}{'size':>12}  last use")
    for kind in kinds:
        of_kind = [entry for entry in chosen if entry.kind == kind]
        if kind == caches.OTHER and not of_kind:
            continue
        last_use = max((entry.last_use for entry in of_kind), default=None)
        used = "-" if last_use is None else f"{age_text(now - last_use)} ago"
        print(f"{kind:<12}{len(of_kind):>7,}{caches.size_text(caches.total(of_kind)):>12}  {used}")
    print(f"{'together':<12}{len(chosen):>7,}{caches.size_text(caches.total(chosen)):>12}")
    return 0


def _clear(chosen: list[Entry]) -> int:
    """Remove the entries that nobody works with, and say what went and what stayed."""
    from vlp import caches

    ours = [entry for entry in chosen if entry.kind != caches.OTHER]
    removed: list[Entry] = []
    in_use: list[Entry] = []
    for entry in ours:
        (removed if caches.remove(entry) else in_use).append(entry)

    print(f"removed: {len(removed):,} items, {caches.size_text(caches.total(removed))}")
    for entry in in_use:
        print(f"in use, left alone: {entry.path}")
    return 0
