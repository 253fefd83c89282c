"""Run `vlp train` as a script, which is what launchers start.

accelerate launch --config_file launch/accelerate/cpu2.yaml launch/train.py CONFIG [key=value …]

torchrun and accelerate start all ranks anew where one has died, if they may (--max-restarts), with
the same arguments. Then the run goes on from its newest checkpoint, whatever `resume=` was typed.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

# A script's own folder comes first on the path, and this one holds folders named accelerate and
# deepspeed.
sys.path = [
    entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent
]

from vlp.cli import main  # noqa: E402


def arguments(typed: list[str], environment: Mapping[str, str]) -> list[str]:
    """The arguments of `vlp` for what was typed, at the first start or a later one."""
    n_restarts = int(environment.get("TORCHELASTIC_RESTART_COUNT", "0"))
    # The last of two values of a key counts.
    going_on = ["resume=auto"] if n_restarts else []
    return ["train", *typed, *going_on]


if __name__ == "__main__":
    sys.exit(main(arguments(sys.argv[1:], os.environ)))
