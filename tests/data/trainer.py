"""A trainer in a process of its own, for tests that kill it: `python trainer.py WORKERS` prints its
processes and waits.
"""

import multiprocessing
import sys
import time
from multiprocessing import forkserver
from types import SimpleNamespace

from torch.utils.data import Dataset


class Numbers(Dataset):
    def __getitem__(self, i):
        return SimpleNamespace(number=i), None


if __name__ == "__main__":
    from vlp.data.processes import Feed

    feed = Feed(Numbers(), 0, int(sys.argv[1]))
    item = None
    while item is None:
        item = feed.poll()
    pids = [process.pid for process in multiprocessing.active_children()]
    print(forkserver._forkserver._forkserver_pid, *pids, flush=True)
    time.sleep(600)
