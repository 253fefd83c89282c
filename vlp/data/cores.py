"""How many processor cores there are for this process, and how many processes decode on them."""

from __future__ import annotations

import os
from pathlib import Path

MOST_WORKERS = 32  # of a rank, when nobody says: each holds half a gigabyte of imports
_CGROUP = Path("/sys/fs/cgroup")


def usual_workers(n_ranks: int) -> int:
    """`data.workers: auto` for each of the `n_ranks` of this machine: its share of the cores but
    one, which the training process takes; at least 1, at most MOST_WORKERS.
    """
    return max(1, min(cores() // n_ranks - 1, MOST_WORKERS))


def cores(cgroup: Path = _CGROUP) -> int:
    """Cores that this process may use, by its affinity and the quota of its control group."""
    allowed = len(os.sched_getaffinity(0))
    quota = _quota(cgroup)
    return allowed if quota is None else max(1, min(allowed, int(quota)))


def _quota(cgroup: Path) -> float | None:
    """Cores that a container is limited to, by version 2 or 1 of control groups; None: no limit."""
    try:
        limit, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            limit = (cgroup / "cpu" / "cpu.cfs_quota_us").read_text().strip()
            period = (cgroup / "cpu" / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None

    # Without a limit the words are "max" in version 2 and "-1" in version 1.
    return int(limit) / int(period) if limit.isdigit() and period.isdigit() else None
