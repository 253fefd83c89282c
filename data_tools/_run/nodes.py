"""What the nodes of a cluster must share with the machine of the call: versions, and the files.

Outputs are the same byte for byte only where the code and the libraries that read and write are the
same. A folder counts as shared where a node sees the files in it that this machine sees, and the
token that this machine has just written.
"""

from __future__ import annotations

import hashlib
import io
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any
from uuid import uuid4

import vlp
from vlp.files import existing

# What the bytes of an output depend on, besides our own code.
_LIBRARIES = (
    "numpy", "pillow", "simplejpeg", "safetensors", "torch", "torchvision", "open_clip_torch",
    "timm", "transformers", "faiss-cpu", "py3langid", "rapidocr-onnxruntime",
)  # fmt: skip
_OURS = "VLP_"  # names of our settings in the environment
_OF_THE_SYSTEM = type(Path())


class ClusterError(ValueError):
    """The cluster cannot do the work as this machine would."""


@cache
def versions() -> dict[str, str]:
    """The versions of what writes here, by name."""
    python = ".".join(platform.python_version_tuple()[:2])
    named = {"python": python, "vlp": f"{vlp.__version__} (code {_digest_of_code()})"}
    for library in _LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            # A build for GPUs beside one for CPUs is no other version.
            named[library] = metadata.version(library).partition("+")[0]
    return named


def _digest_of_code() -> str:
    """Eight digits of a hash over the package's files: a checkout keeps its version for months."""
    root = Path(vlp.__file__).parent
    digest = hashlib.sha256()
    # The outer rooms are links in a checkout.
    for folder, below, names in os.walk(root, followlinks=True):
        below.sort()
        for name in sorted(names):
            path = Path(folder, name)
            if path.suffix in (".py", ".yaml", ".json", ".txt"):
                digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:8]


def refuse_differing(here: dict[str, str], of_nodes: dict[str, dict[str, str]]) -> None:
    """Raise ClusterError that names each node of which a version is not that of this machine."""
    differing = []
    for node, theirs in of_nodes.items():
        names = [name for name in {**here, **theirs} if here.get(name) != theirs.get(name)]
        differences = [
            f"{name} {theirs.get(name, 'missing')} (here {here.get(name, 'missing')})"
            for name in names
        ]
        if differences:
            differing.append(f"{node}: {', '.join(differences)}")
    if differing:
        raise ClusterError(
            "nodes of the cluster have other versions than this machine, and would write other "
            f"bytes: {'; '.join(differing[:8])}; install the same versions everywhere"
        )


@dataclass(frozen=True)
class Call:
    """What a process on a node takes over from the machine of the call, and must find there."""

    folder: str  # the working directory, that relative paths start from
    environment: dict[str, str]  # our settings in it
    import_path: list[str]
    versions: dict[str, str]
    inputs: list[Path]  # one of each folder
    outputs: dict[Path, Path]  # a folder: the token in it

    def adopt(self) -> None:
        """Let this process find files and modules, and decide, as the caller does."""
        # Without a shared folder it may be missing here; then paths are addresses.
        with suppress(OSError):
            os.chdir(self.folder)
        os.environ.update(self.environment)
        sys.path += [entry for entry in self.import_path if entry not in sys.path]

    def missing(self) -> str:
        """What of this machine is not there, in words; empty where all is."""
        for path in self.inputs:
            if not path.exists():
                return f"does not see {path}"
        for folder, token in self.outputs.items():
            if not token.exists():
                return f"does not see {folder}"
            if not os.access(folder, os.W_OK):
                return f"cannot write into {folder}"
        return ""


@contextmanager
def call(paths: list[Path]) -> Iterator[Call]:
    """This machine's call, of work that reads and writes these paths; meanwhile a token lies in
    each folder that is written to.
    """
    inputs: dict[Path, Path] = {}
    outputs: dict[Path, Path] = {}
    with ExitStack() as stack:
        for path in map(Path.absolute, paths):
            # Of a thousand shards in one folder, and of their marks, one tells.
            if path.parent in inputs or path.parent in outputs:
                continue
            if path.exists():
                inputs[path.parent] = path
                continue

            # What is missing yet, a mark or a shard, will be written there.
            folder = existing(path)
            token = folder / f".ray-{uuid4().hex[:12]}.tmp"
            if folder not in outputs and os.access(folder, os.W_OK):
                stack.callback(token.unlink, missing_ok=True)
                token.touch()
                outputs[folder] = token

        environment = {name: os.environ[name] for name in os.environ if name.startswith(_OURS)}
        yield Call(os.getcwd(), environment, [*sys.path], versions(), [*inputs.values()], outputs)


def pickled(thing: Any) -> tuple[bytes, list[Path]]:
    """A thing as bytes, and the paths in it."""
    from ray import cloudpickle

    paths: dict[Path, None] = {}

    class Pickler(cloudpickle.CloudPickler):
        def persistent_id(self, part: Any) -> None:
            """Asked about every object on the way; None: it is pickled as usual."""
            # Paths in a store are of other kinds, and every node sees them.
            if type(part) is _OF_THE_SYSTEM:
                paths[part] = None

    file = io.BytesIO()
    Pickler(file).dump(thing)
    return file.getvalue(), list(paths)
