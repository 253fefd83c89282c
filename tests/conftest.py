"""Material that several rooms' tests share."""

import os
import sys
from pathlib import Path

import pytest

# DeepSpeed looks for ninja, and tests start vlp and accelerate, which live beside this interpreter.
os.environ["PATH"] = str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"]


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """A small set of generated scenes: train/, zeroshot/, retrieval/, …"""
    from vlp.data_tools.scenes import write

    folder = tmp_path_factory.mktemp("scenes")
    write(
        folder,
        n_train=200,
        n_val=8,
        n_test=8,
        n_zeroshot=56,
        n_retrieval=20,
        n_proofs=9,
        size=32,
        processes=1,
    )
    return folder
