"""Embeddings of pictures and texts: each once, dealt to the ranks batch by batch, kept on disk by
content.

Batches are the same whatever the number of ranks: batch k goes to rank k mod W, so two ranks give
the same bits as one. Every rank runs its model equally often (a rank without a batch repeats one
and drops the result), because a sharded model (FSDP, ZeRO-3) talks to the other ranks in its
forward pass.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save
from torch import Tensor

from vlp import caches, dist
from vlp.data.cores import cores
from vlp.eval import legible, metrics
from vlp.eval.describers import describe
from vlp.eval.models import Encoder
from vlp.eval.pictures import Contents, DataError, Picture
from vlp.files import write_atomically
from vlp.lifetime import Interrupted, give_way
from vlp.models.describe import Search

CACHE_VERSION = 2  # 2: transparency on white, Exif orientation, gray of 16 bits
GATHERED = 64  # batches a rank that one exchange brings together
PROGRESS_S = 5  # seconds between lines of progress


def _usual_workers() -> int:
    return min(8, cores())


def usual_batch(device: str | torch.device) -> int:
    """Pictures or texts a forward pass inside training, which has its memory to itself then."""
    # A GPU idles with fewer; a CPU is no faster with more, and waits longer for the first.
    return 256 if torch.device(device).type == "cuda" else 64


@dataclass(frozen=True)
class Context:
    """How an evaluation is carried out; nothing in here may change a score."""

    batch: int = 64  # pictures or texts a forward pass
    workers: int = field(default_factory=_usual_workers)  # threads that decode, a rank
    cache: Path | None = None  # where embeddings are kept; None: nowhere
    cache_bytes: int = 20 * 10**9  # of all that is kept there
    progress: bool = False  # lines on stderr, from the first rank
    contents: Contents | None = None  # content hashes; None: data are not hashed (inside training)
    # of each list of texts, by its hash
    readings: dict[int, legible.Reading] = field(default_factory=dict)
    # takes name -> reason of pictures, embedded as plain gray; None: an error
    unreadable: dict[str, str] | None = None

    def digest(self, pictures: Sequence[Picture], *annotations: Any) -> str:
        """Content hash of an evaluation set: its pictures and whatever is annotated; "" without
        `contents`.
        """
        if self.contents is None:
            return ""

        # The files are read once, by the first rank.
        of_pictures = self.contents.digest(pictures) if dist.is_main() else ""
        of_pictures = dist.broadcast_object(of_pictures)
        return hashlib.sha256((of_pictures + repr(annotations)).encode()).hexdigest()


# --- what tasks call ------------------------------------------------------------------------------


def images(encoder: Encoder, pictures: Sequence[Picture], context: Context) -> Tensor:
    """[n, D] float32 unit rows on the CPU of every rank, in the order of `pictures`; equal pictures
    are embedded once.
    """
    unique = list(dict.fromkeys(pictures))
    key = _key(encoder, "image", context, lambda: context.digest(unique))

    def encode(batch: list[Tensor]) -> Tensor:
        return encoder.encode_images(torch.stack(batch))

    rows = _kept(key, context, "images", unique, _opening(encoder, context), encode)
    return _spread(rows, unique, pictures)


def captions(
    encoder: Encoder, pictures: Sequence[Picture], search: Search, context: Context
) -> Tensor:
    """[n, max_tokens] token ids of a caption of each picture, on the CPU of every rank."""

    def encode(batch: list[Tensor]) -> Tensor:
        return describe(encoder, torch.stack(batch), search)

    return _embed(list(pictures), _opening(encoder, context), encode, "captions", context)


def _opening(encoder: Encoder, context: Context) -> Callable[[Picture], Tensor]:
    """What makes pixels of a picture; one that cannot be read is plain gray, where that is
    counted.
    """

    def prepare(picture: Picture) -> Tensor:
        try:
            image = picture.open(encoder.decoding)
        except (DataError, OSError) as error:  # OSError: a file that is gone
            if context.unreadable is None:
                raise
            context.unreadable[picture.name] = str(error)
            image = Image.new("RGB", (64, 64), (127, 127, 127))
        return encoder.prepare(image)

    return prepare


def texts(encoder: Encoder, captions: Sequence[str], context: Context) -> Tensor:
    """[n, D] float32 unit rows on the CPU of every rank, in the order of `captions`; equal texts
    are embedded once.
    """
    unique = list(dict.fromkeys(captions))
    # Counted also where the embeddings are kept.
    legible.note(encoder, unique, context)
    key = _key(encoder, "text", context, lambda: hashlib.sha256(repr(unique).encode()).hexdigest())
    rows = _kept(key, context, "texts", unique, None, encoder.encode_texts)
    return _spread(rows, unique, captions)


def joint(
    encoder: Encoder, items: Sequence[tuple[Picture, tuple[str, str]]], context: Context
) -> Tensor:
    """[n, D] float32 unit rows of pictures between two texts each, as `images`; not kept on disk.
    The encoder reads both as one.
    """
    unique = list(dict.fromkeys(items))
    legible.note(encoder, list(dict.fromkeys("".join(around) for _, around in unique)), context)
    opened = _opening(encoder, context)

    def encode(batch: list[tuple[Tensor, tuple[str, str]]]) -> Tensor:
        pixels, texts = zip(*batch)
        return encoder.encode_joint(torch.stack(pixels), list(texts))

    rows = others(unique, lambda item: (opened(item[0]), item[1]), encode, context)
    metrics.check_unit_rows(rows, "query")
    return _spread(rows, unique, items)


def others(
    items: Sequence[Any],
    prepare: Callable[[Any], Any],
    encode: Callable[[list], Tensor],
    context: Context,
) -> Tensor:
    """[n, width] float32 of anything else, on the CPU of every rank, in the order of `items`; not
    kept on disk.
    """
    return _embed(list(items), prepare, encode, "samples", context)


def _spread(rows: Tensor, unique: list, items: Sequence) -> Tensor:
    """The rows of `items`, from those of the different ones among them."""
    if len(unique) == len(items):
        return rows
    place = {item: i for i, item in enumerate(unique)}
    return rows[torch.tensor([place[item] for item in items])]


# --- kept on disk ---------------------------------------------------------------------------------


def _key(encoder: Encoder, kind: str, context: Context, content: Callable[[], str]) -> str:
    """What decides about the embeddings, as one hash; "" where none are kept."""
    if context.cache is None or not encoder.fingerprint:
        return ""

    # Whatever changes an embedding is in here; whatever does not (batch, ranks) is not.
    parts = (
        CACHE_VERSION,
        kind,
        encoder.fingerprint,
        repr(encoder.decoding),
        str(encoder.autocast),
        content(),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _kept(
    key: str,  # "": embed now, keep nothing
    context: Context,
    kind: str,  # "images" or "texts", for messages
    items: list,
    prepare: Callable | None,
    encode: Callable,
) -> Tensor:
    """[len(items), D] unit rows: what is kept under `key`, or embedded now and kept."""
    path = context.cache / f"{key}.safetensors" if key and context.cache else None
    rows = _recall(path, len(items)) if path else None
    if rows is not None:
        return rows

    rows = _embed(items, prepare, encode, kind, context)

    # A diverged model is an error here, not a score of 0 later.
    metrics.check_unit_rows(rows, kind.rstrip("s"))

    # Rows of plain gray are not kept: the next call would not know of them.
    if path and not any(dist.gather_objects(bool(context.unreadable))) and dist.is_main():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, save({"rows": rows}))
        caches.bound(path.parent, context.cache_bytes)
    return rows


def _recall(path: Path, n: int) -> Tensor | None:
    """What is kept, if every rank can read it: ranks must agree on whether there is work to do."""
    rows = None
    if path.exists():
        try:
            rows = load_file(path)["rows"]
            caches.touch(path)
        except Exception as error:
            print(
                f"vlp eval: kept embeddings {path} cannot be read ({error}); computing them again",
                file=sys.stderr,
            )

    # A file of another length does not belong to these items.
    is_whole = rows is not None and len(rows) == n
    return rows if all(dist.gather_objects(is_whole)) else None


# --- embedding ------------------------------------------------------------------------------------


def _embed(
    items: list, prepare: Callable | None, encode: Callable, kind: str, context: Context
) -> Tensor:
    """[len(items), D] rows on the CPU of every rank. Collective."""
    if not items:
        raise DataError(f"no {kind} to embed; check the path and the split")

    # Batch k is the same pictures on any number of ranks, so that any number gives the same bits.
    group = dist.world()
    batches = [items[i : i + context.batch] for i in range(0, len(items), context.batch)]
    rounds = -(-len(batches) // group.size)

    # A rank without a batch repeats the first one: every rank runs its model equally often.
    batches_of_rank = [
        batches[k] if k < len(batches) else batches[0]
        for k in range(group.index, rounds * group.size, group.size)
    ]

    rows, device = torch.empty(0), torch.device("cpu")
    problem: Exception | None = None
    prepared = _prepared(prepare, batches_of_rank, context.workers)
    try:
        with torch.no_grad():
            reported = _reported(prepared, kind, len(items), group.size, context)
            for k, batch in enumerate(reported):
                give_way()
                encoded = encode(batch)
                # One block for all: a list of batches, joined in the end, takes twice the memory.
                if k == 0:
                    shape = (rounds, context.batch, encoded.shape[1])
                    rows = torch.zeros(shape, dtype=encoded.dtype)
                    device = encoded.device
                # The last batch may be short; the rest of its place stays 0.
                rows[k, : len(encoded)] = encoded
    except (DataError, Interrupted) as error:
        problem = error
    except Exception as error:
        # Only inside training: a command shows the traceback of what nobody foresaw.
        if context.unreadable is None:
            raise
        problem = DataError(f"{type(error).__name__}: {error}")
    _agree_on(problem)

    if group.size > 1:
        rows = _dealt_back(rows, device, group)
    return rows.reshape(-1, rows.shape[-1])[: len(items)]


def _dealt_back(
    rows: Tensor,  # [rounds, batch, D] of this rank
    device: torch.device,  # of the encoder, which is where ranks can exchange
    group: dist.Group,
) -> Tensor:  # [rounds · W, batch, D] of all ranks
    """Every rank's batches in the order of the items: batch k was made by rank k mod W."""
    in_order = torch.empty(len(rows), group.size, *rows.shape[1:], dtype=rows.dtype)
    # Part by part, so that the device never holds all.
    for first in range(0, len(rows), GATHERED):
        part = rows[first : first + GATHERED]
        gathered = dist.all_gather(part.to(device), group)  # [W · rounds of the part, batch, D]
        of_ranks = gathered.view(group.size, *part.shape)
        in_order[first : first + GATHERED] = of_ranks.transpose(0, 1)
    return in_order.flatten(0, 1)


def _agree_on(problem: Exception | None) -> None:
    """Raise on every rank what any rank met: one alone must not leave the others waiting."""
    problems = [met for met in dist.gather_objects(problem) if met is not None]
    if any(isinstance(met, Interrupted) for met in problems):
        raise Interrupted
    if problems:
        raise DataError("\n".join(dict.fromkeys(map(str, problems))))


def _prepared(prepare: Callable | None, batches: list[list], workers: int) -> Iterator[list]:
    """The batches with `prepare` applied to each item, by threads (PIL decodes outside the
    interpreter's lock).
    """
    if prepare is None:
        yield from batches
        return
    if workers == 0:
        yield from ([prepare(item) for item in batch] for batch in batches)
        return

    pool = ThreadPoolExecutor(workers)
    waiting: deque[list[Future[Any]]] = deque()
    try:
        for batch in batches:
            # Futures in the order of the batch: threads may finish in any.
            waiting.append([pool.submit(prepare, item) for item in batch])
            # Two batches ahead: enough to keep the model fed, little enough to hold.
            if len(waiting) > 2:
                yield [future.result() for future in waiting.popleft()]
        while waiting:
            yield [future.result() for future in waiting.popleft()]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _reported(
    batches: Iterator[list], kind: str, total: int, n_ranks: int, context: Context
) -> Iterator[list]:
    """The batches, with a line of progress every few seconds and at the end of what took longer."""
    start = last_line = time.monotonic()
    n_done = 0
    for batch in batches:
        yield batch
        n_done = min(total, n_done + len(batch) * n_ranks)
        if not (context.progress and dist.is_main()):
            continue

        now = time.monotonic()
        ends_long_work = n_done == total and now - start > PROGRESS_S
        if now - last_line > PROGRESS_S or ends_long_work:
            last_line = now
            print(
                f"  {kind} {n_done:,}/{total:,}  {n_done / (now - start):,.0f}/s",
                file=sys.stderr,
                flush=True,
            )
