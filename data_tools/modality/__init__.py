"""`vlp data modality`: shards → rows in time of a further modality of their samples, one file a
shard.

Of the sample KEY the members
    KEY.wav, KEY.flac, KEY.NAME.wav      --sound: log-mel rows of F bands, 100 a second. Waves of
                                         PCM; others with `pip install 'vlp[audio]'`
                                         --sound-model: the embedding of an audio model
    KEY.000.jpg, KEY.001.jpg, …          --frames: embeddings of frames by a model, D numbers each
    KEY.NAME.npy, or KEY.npy             --vectors: what any other model gave, [F] or [T, F] numbers

DIR/SHARD.safetensors holds
    rows        [n, T, F] float16 in the order of the shard's n usable samples, zeros beyond length
    length      [n] int32: how many of the T rows the sample has; 0: it lacks the modality, or its
                members cannot be used (both are counted)
    metadata    keys (SHA-256 in hex of the samples' keys, one a line), made_by (the settings)

The source option `modalities: {NAME: DIR}` gives them to training, `model.heads.modalities.NAME`
is their tower.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from vlp.data_tools import _encoder
from vlp.data_tools._run import work

if TYPE_CHECKING:
    import numpy as np

    from vlp.data.further_members import Member

HELP = "rows of sounds, of video frames or of other embeddings, as a further modality"
EXAMPLE = """vlp data modality data/train --sound --seconds 10 --to data/train_audio
  vlp data modality data/train --sound-model models/clap --to data/train_clap
  vlp data modality data/train --frames 8 --model runs/clip --to data/train_video
  vlp data modality data/train --vectors depth --to data/train_depth
"""


class Reader(Protocol):
    """Makes the rows of a sample from its members."""

    @property
    def shape(self) -> tuple[int, int]:
        """(T, F)"""
        ...

    def members(self, of_sample: list[Member]) -> list[Member]:
        """Those that make the modality, in their order; none: the sample lacks it."""
        ...

    def rows(self, files: list[bytes]) -> np.ndarray:
        """[t, F] float32, 1 <= t <= T; raises ValueError for what cannot be read."""
        ...

    def settings(self) -> dict[str, Any]:
        """What decides the rows."""
        ...


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vlp data modality`."""
    add = parser.add_argument
    add("source", help="shards: a folder, a tar, or a pattern with braces; several joined by ::")
    add(
        "--to",
        required=True,
        metavar="DIR",
        help="folder for the files; the same call goes on where one stopped",
    )

    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--sound", action="store_true", help="log-mel rows of the samples' sounds")
    kind.add_argument(
        "--sound-model", metavar="MODEL", help="embed sounds by CLAP or AST of transformers"
    )
    kind.add_argument("--frames", type=int, metavar="N", help="embed up to N frames by --model")
    kind.add_argument("--vectors", metavar="NAME", help="take the numbers of KEY.NAME.npy")

    add = parser.add_argument_group("sounds").add_argument
    add("--name", default="", help="of KEY.NAME.wav (default: the first sound of a sample)")
    add("--seconds", type=float, default=10.0, help="of the longest (default: %(default)s)")
    add("--bands", type=int, default=64, metavar="F", help="mel bands (default: %(default)s)")
    add("--rate", type=int, default=16_000, metavar="HZ", help="default: %(default)s")

    add = parser.add_argument_group("vectors").add_argument
    add("--shape", default="", metavar="TxF", help="default: that of the first file")
    _encoder.arguments(parser)
    work.arguments(parser)


@work.alone
def run(args: argparse.Namespace) -> int:
    """Write the files and print what was read."""
    from vlp.data.paths import expand
    from vlp.data.stored import destination
    from vlp.data_tools._run.shards import check_names, claim, jobs

    sources, pool, folder = expand(args.source), work.pool(args), destination(args.to)
    check_names(sources)
    reader = _reader(args, sources)
    if args.frames is not None or args.sound_model is not None:
        pool = pool.of_model(args.device)
    claim(folder, "modality", sources, reader.settings())
    read = Read(reader, folder)
    total = work.total(work.carry_out("modality", jobs(sources, folder, "modality"), read, pool))
    print(work.report(total, f"{folder}:"))
    _refuse_nothing(total, reader, folder)
    return 0


def _refuse_nothing(total: Counter[str], reader: Reader, folder: Path) -> None:
    """Refuse a modality that no sample has, such as one of a misspelt name."""
    # Of a call that read nothing, others read the shards.
    if total["samples read"] and not total["samples with rows"]:
        raise ValueError(
            f"{folder}: no sample has rows of {reader.settings()}; see the reasons above, and how "
            "members are named in `vlp data modality --help`"
        )


def _reader(args: argparse.Namespace, sources: list[Path]) -> Reader:
    """What the options ask for; ValueError where it cannot be."""
    from vlp.data_tools.modality import frames, sound_model, sounds, vectors

    if args.frames is None and args.model:
        raise ValueError("--model embeds frames; write --frames N, or leave it out")
    if args.sound:
        return sounds.Sounds(args.name, args.seconds, args.bands, args.rate)
    if args.sound_model is not None:
        named = args.sound_model, args.name, args.seconds, args.device
        return sound_model.SoundModel(*named)
    if args.vectors is not None:
        return vectors.Vectors.of(args.vectors, args.shape, sources)
    if args.frames < 1:
        raise ValueError(f"--frames {args.frames}: expected a number of frames, at least 1")
    model = _encoder.Model.of(args)
    if model is None:
        raise ValueError("--frames are embedded by a model; name it with --model REF")
    return frames.Frames(model, args.frames)


@dataclass(frozen=True)
class Read:
    """The work on one shard."""

    reader: Reader
    folder: Path

    def __call__(self, job: tuple[int, Path]) -> work.Result:
        import numpy as np
        import torch

        from vlp.data_tools._run.shards import samples
        from vlp.data_tools._run.tensors import as_bytes
        from vlp.data_tools.modality.members import of_keys
        from vlp.files import write_atomically

        _, path = job
        counts: Counter[str] = Counter()
        keys = [sample.key for sample in samples(path, counts)]
        members = of_keys(path, keys, counts)

        rows = np.zeros((len(keys), *self.reader.shape), np.float16)
        lengths = np.zeros(len(keys), np.int32)
        with open(path, "rb") as file:
            for place, key in enumerate(keys):
                chosen = self.reader.members(members.get(key, []))
                if not chosen:
                    counts["samples that lack it"] += 1
                    continue
                files = [member.read(file) for member in chosen]
                of_sample = self._of_sample(files, counts)
                lengths[place] = len(of_sample)
                rows[place, : len(of_sample)] = of_sample

        tensors = {"rows": torch.from_numpy(rows), "length": torch.from_numpy(lengths)}
        metadata = {
            "keys": hashlib.sha256("\n".join(keys).encode()).hexdigest(),
            "made_by": json.dumps(self.reader.settings()),
        }
        write_atomically(self.folder / f"{path.stem}.safetensors", as_bytes(tensors, metadata))
        return {"counts": counts}

    def _of_sample(self, files: list[bytes], counts: Counter[str]) -> np.ndarray:
        """[t, F]; none, and counted, where they cannot be used."""
        import numpy as np

        nothing = np.zeros((0, self.reader.shape[1]), np.float16)
        try:
            wide = self.reader.rows(files)
        except ValueError as error:
            counts[f"unreadable: {error}"] += 1
            return nothing
        # float16 ends at 65,504.
        narrow = wide.astype(np.float16)
        if not np.isfinite(narrow).all():
            counts["unreadable: numbers that are not finite in float16"] += 1
            return nothing
        counts["samples with rows"] += 1
        return narrow
