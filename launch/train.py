"""Run `vlp train` as a script, which is what launchers start.

accelerate launch --config_file launch/accelerate/cpu2.yaml launch/train.py CONFIG [key=value …]
"""

import sys
from pathlib import Path

# A script's own folder comes first on the path, and this one holds folders named accelerate and
# deepspeed.
sys.path = [
    entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent
]

from vlp.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
