"""The format of a shard: a webdataset tar in img2dataset's layout, and the writer that every tool
uses.

    folder/00000.tar          members of one sample follow one another, in this order:
        000000000.jpg         the image, bytes as they came: .jpg .png .webp .gif .bmp
        000000000.negative.jpg  an image that the first of the JSON's "negatives" is true of,
                              where there is one; of the second 000000000.negative.1.jpg, …
        000000000.txt         the first caption, on one line
        000000000.json        {"captions": […], "class": name where known, "origin": the same for
                              the variations of one picture, which follow one another, …}:
                              everything else that is known
        000000000.cls         the class number, where known
        000000000.wav         a member of a further modality (vlp.data.further_members)
    folder/00000_stats.json   counts, and a digest of every sample (vlp.data.digests); written after
                              its tar, so a tar without it may be unfinished
    folder/_index.bin         vlp.data.index; rebuilt whenever missing or out of date
    folder/_members.bin       vlp.data.member_file; made when a run reads sounds or frames

A key is five digits of the shard and four (or more) of the sample. Foreign shards are read with any
keys, member order and missing texts; `vlp.data.members` says what counts. Tars are reproducible (no
times, owners or modes of the machine) and appear whole or not at all. Only the standard library is
needed here.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any
from uuid import uuid4

from vlp.data import member_index
from vlp.data.captions import MAX_CLASS, MAX_TEXT_BYTES
from vlp.data.digests import as_json, digest_of, stats_of
from vlp.data.index import index, piece_of
from vlp.data.index_file import NAME, save_index
from vlp.data.members import IMAGE_TYPES, MAX_IMAGE_BYTES, Picture, negative_member, parse_name
from vlp.data.scan import scan
from vlp.data.stored import StoredPath
from vlp.files import naming, sync, write_atomically

__all__ = ["IMAGE_TYPES", "ShardWriter", "index", "index_written"]


class ShardWriter:
    """Writes samples into numbered shards of `samples_per_shard`; a context manager.

    Samples of one origin that follow one another stay in one shard, which may grow beyond that for
    them.

        with ShardWriter("data/train") as writer:
            writer.add(None, image, "jpg", ["a red cube"], {"class": "cube"})

    An exception inside the block leaves the finished shards and removes the unfinished one. Several
    processes may write into one folder when their ranges of shard numbers (`first_shard`) do not
    meet. `overwrite=False` refuses a folder that already holds tars.
    """

    def __init__(
        self,
        folder: str | Path,
        samples_per_shard: int = 10_000,
        *,
        first_shard: int = 0,
        overwrite: bool = False,
        shard_name: str = "{:05d}",  # clip_benchmark counts 0.tar, 1.tar, …
        # False: whoever finishes the folder indexes it, once instead of after every shard
        indexed: bool = True,
    ) -> None:
        if samples_per_shard < 1:
            raise ValueError(f"samples_per_shard is {samples_per_shard}; expected at least 1")
        self.folder = folder if isinstance(folder, Path) else Path(folder)
        self.samples_per_shard = samples_per_shard
        self.shard_name = shard_name
        self.indexed = indexed
        self.paths: list[Path] = []  # finished shards
        self.n_samples = 0

        # A process that was taken for lost may still write what another one does again.
        self._token = uuid4().hex[:12]
        self._number = first_shard
        self._digits = max(4, len(str(samples_per_shard - 1)))
        self._tar: tarfile.TarFile | None = None
        self._digests: dict[str, int] = {}  # of the samples of the shard that is being written
        self._totals: Counter[str] = Counter()  # of its samples' numbers
        self._origin: Any = None  # of the last sample; a shard ends only where it changes

        # Of several processes only the first one can tell a folder that was full before.
        self.folder.mkdir(parents=True, exist_ok=True)
        if not overwrite and first_shard == 0 and any(self.folder.glob("*.tar")):
            raise FileExistsError(
                f"{self.folder} already holds shards; choose another folder or overwrite"
            )

    def add(
        self,
        key: str | None,  # None: the next number, as img2dataset counts
        image: bytes,
        ext: str,  # one of IMAGE_TYPES
        captions: list[str],
        meta: dict[str, Any] | None = None,
        cls: int | None = None,
        *,
        txt: str | None = None,  # other text for the .txt; default: the first caption
        # Images that negatives are true of, by their place in the JSON's list.
        negative_images: Mapping[int, Picture] = MappingProxyType({}),
        # Numbers of this sample, whose sums stand in the shard's statistics.
        numbers: Mapping[str, int] = MappingProxyType({}),
        # Members of further modalities by what follows the key, such as "wav".
        further: Mapping[str, bytes] = MappingProxyType({}),
    ) -> str:
        """Append one sample and return its key; raises ValueError for what cannot be read back."""
        meta = meta or {}
        origin = meta.get("origin")
        if len(self._digests) >= self.samples_per_shard and origin != self._origin:
            self._finish()

        ext = ext.lower().lstrip(".")
        if key is None:
            key = f"{self._number:05d}{len(self._digests):0{self._digits}d}"
        self._check(key, image, ext, captions)
        for picture in negative_images.values():
            self._check(key, *picture, captions)
        if cls is not None and not is_class_number(cls):
            raise ValueError(
                f"the class number of {key!r} is {cls!r}; "
                f"expected a whole number from 0 to {MAX_CLASS - 1}"
            )

        # In the order of the layout above.
        members = [(ext, image)]
        for place, picture in sorted(negative_images.items()):
            members.append((negative_member(place, picture.extension), picture.data))
        if captions and txt is None:
            txt = " ".join(captions[0].split())
        if txt is not None:
            members.append(("txt", _encode(txt, f"the .txt of {key!r}")))
        record = {**meta, "key": key, "captions": list(captions)}
        members.append(("json", _encode(_json(record), f"the JSON of {key!r}")))
        if cls is not None:
            members.append(("cls", str(cls).encode()))

        named = {f"{key}.{extension}": data for extension, data in members}
        self._append(named | {f"{key}.{ending}": data for ending, data in further.items()})

        read_back = {_as_read(name): data for name, data in named.items()}
        self._digests[_as_read(key)] = digest_of(read_back)
        self._totals.update(numbers)
        self._origin = origin
        self.n_samples += 1

        # A family of one origin may go on beyond the limit.
        if len(self._digests) >= self.samples_per_shard and origin is None:
            self._finish()
        return key

    def _append(self, members: dict[str, bytes]) -> None:
        """Write members to the tar; an OSError names the shard."""
        with naming(self._path()):
            tar = self._tar or self._start()
            for name, data in members.items():
                info = tarfile.TarInfo(name)  # mtime, uid and gid are 0, mode is 0644
                info.size = len(data)
                tar.addfile(info, BytesIO(data))

    def make_room(self, n: int) -> None:
        """Begin a new shard unless the next `n` samples, which belong together, fit into this."""
        if self._digests and len(self._digests) + n > self.samples_per_shard:
            self._finish()

    def _check(self, key: str, image: bytes, ext: str, captions: list[str]) -> None:
        """Raise ValueError for a sample that readers would refuse."""
        if ext not in IMAGE_TYPES:
            raise ValueError(
                f"image type {ext!r} of {key!r} is not one of {', '.join(sorted(IMAGE_TYPES))}; "
                "convert it"
            )

        # A key that reading takes apart otherwise would come back as another sample's.
        if parse_name(f"{key}.{ext}") != (key, "image", ext) or "." in key.rpartition("/")[2]:
            raise ValueError(f"key {key!r} is not usable; it must be a relative path without dots")
        if _as_read(key) in self._digests:
            raise ValueError(f"key {key!r} appears twice in shard {self._number}")

        if not 0 < len(image) <= MAX_IMAGE_BYTES:
            raise ValueError(
                f"the image of {key!r} has {len(image)} bytes; expected 1 to {MAX_IMAGE_BYTES}"
            )
        if not all(isinstance(caption, str) for caption in captions):
            raise ValueError(f"captions of {key!r} are {captions!r}; expected a list of texts")

    def _start(self) -> tarfile.TarFile:
        self._tar = tarfile.open(self._temporary(), "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115
        return self._tar

    def _name(self) -> str:
        return self.shard_name.format(self._number)

    def _path(self) -> Path:
        return self.folder / f"{self._name()}.tar"

    def _temporary(self) -> Path:
        return self.folder / f".{self._name()}.{self._token}.tar.tmp"

    def _finish(self) -> None:
        """Put the shard in its place, and its statistics beside it."""
        path = self._path()
        assert self._tar is not None
        with naming(path):
            self._tar.close()
            sync(self._temporary())

        # An overwritten shard must not be vouched for by the old statistics.
        stats_path = stats_of(path)
        stats_path.unlink(missing_ok=True)
        if isinstance(path, StoredPath):
            self._index_piece(path)
        self._temporary().replace(path)

        # img2dataset's names of what it counts, so that its tools read ours.
        n = len(self._digests)
        stats: dict[str, Any] = {
            "count": n,
            "successes": n,
            "failed_to_download": 0,
            "failed_to_resize": 0,
            "status_dict": {"success": n},
            "digests": as_json(self._digests),
        }
        if self._totals:
            stats["totals"] = dict(self._totals)
        write_atomically(stats_path, (json.dumps(stats, indent=1) + "\n").encode())

        self.paths.append(path)
        self._tar, self._digests, self._totals = None, {}, Counter()
        self._number += 1

    def _index_piece(self, path: Path) -> None:
        """Index the unfinished shard, while it lies on this machine."""
        shard = scan(self._temporary())
        shard.name = path.name
        save_index(piece_of(path), {path.name: shard})
        member_index.save_piece(path, self._temporary(), shard)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None and self._tar is not None:
                self._finish()
        finally:
            self._give_up()

        # Reading all shards once more also finds what the disk did not keep.
        if self.paths and self.indexed:
            index_written(self.paths)

    def _give_up(self) -> None:
        """Remove an unfinished shard. Closing it writes its end, which a full disk refuses once
        more.
        """
        if self._tar is None:
            return

        with suppress(OSError):
            self._tar.fileobj.close()
        self._tar = None
        self._temporary().unlink(missing_ok=True)


def index_written(paths: list[Path]) -> None:
    """Index the shards of a folder that is finished."""
    shards = index(paths)
    stored = [path for path in paths if isinstance(path, StoredPath)]
    if not stored:
        return

    member_index.join_pieces(paths, shards)
    # Whoever read the folder before has an index of it in the cache, which others do not see.
    beside = stored[0].parent / NAME
    if not beside.is_file():
        save_index(beside, {path.name: shard for path, shard in zip(paths, shards)})
    for path in stored:
        piece_of(path).unlink(missing_ok=True)


def _as_read(name: str) -> str:
    """A name as it will come back: bytes of a file system that are no UTF-8 cannot."""
    return name.encode(errors="surrogateescape").decode(errors="replace")


def is_class_number(value: Any) -> bool:
    """Whether a .cls can hold this value."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_CLASS


def _json(record: dict[str, Any]) -> str:
    """JSON that UTF-8 can hold: a lone surrogate, which JSON can hold too, stays as its escape."""
    text = json.dumps(record, ensure_ascii=False, sort_keys=True)
    if re.search("[\ud800-\udfff]", text):
        return json.dumps(record, sort_keys=True)
    return text


def _encode(text: str, name: str) -> bytes:
    """UTF-8; what stands for no character becomes a question mark."""
    encoded = text.encode(errors="surrogatepass").decode(errors="replace").encode()
    if len(encoded) > MAX_TEXT_BYTES:
        raise ValueError(f"{name} has {len(encoded)} bytes, more than {MAX_TEXT_BYTES}")
    return encoded
