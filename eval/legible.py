"""How much of the texts a model reads: what its context cuts, and what its tokenizer does not know.

A tokenizer of another language gives one token, such as [UNK], for whatever it has no piece for,
and captions that differ become alike: MiniLM's does so with most of Chinese. Tokenizers that spell
out bytes, such as CLIP's, know everything. A score of texts that nobody read is a score all the
same, at chance, and one set of many: it is counted and said, not refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlp import dist, log

if TYPE_CHECKING:
    from vlp.eval.embed import Context
    from vlp.eval.models import Encoder

CHUNK = 8192  # texts that are tokenized at once
TOLD = 0.01  # the share of unknown tokens from which there is a warning
_CUT = (
    "texts were cut to the model's context: {}; the scores of long captions are those of their "
    "beginnings"
)
_UNKNOWN = (
    "tokens are unknown to the tokenizer: {}; a model of another language does not read these texts"
)
_BLIND = (
    "the tokenizer does not know the script of texts such as {}; the scores are no better than "
    "guessing. Evaluate a model that was trained with this language"
)


@dataclass(frozen=True)
class Vocabulary:
    """What tells the tokens that a tokenizer does not know from others."""

    ids: Callable[[list[str]], Tensor]  # n sentences -> int64 [n, L]
    unknown: int  # the id of whatever it does not know
    special: tuple[int, ...]  # ids that stand for no part of a text, such as padding


def vocabulary_of(tokenizer: Any, ids: Callable[[list[str]], Tensor]) -> Vocabulary | None:
    """Of a Hugging Face tokenizer; None for one that knows everything."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    frame = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    # CLIP's names its end token: it spells bytes, and never needs another.
    if unknown is None or unknown in frame:
        return None
    special = tuple(number for number in tokenizer.all_special_ids if number != unknown)
    return Vocabulary(ids, unknown, special)


@dataclass(frozen=True)
class Reading:
    """How a list of different texts is read."""

    n_texts: int
    n_truncated: int  # texts
    n_unknown: int = 0  # tokens
    n_tokens: int = 0  # without padding and the like; 0: not counted
    n_alike: int = 0  # texts whose tokens are those of an earlier one

    @property
    def is_blind(self) -> bool:
        """Whether no token is known, or all texts are read alike."""
        is_one = self.n_texts > 1 and self.n_alike == self.n_texts - 1
        return bool(self.n_unknown) and (is_one or self.n_unknown == self.n_tokens)


def read(encoder: Encoder, texts: Sequence[str]) -> Reading:
    """How different texts are read."""
    chunks = [list(texts[i : i + CHUNK]) for i in range(0, len(texts), CHUNK)]
    n_truncated = sum(encoder.n_truncated(chunk) for chunk in chunks)
    vocabulary = encoder.vocabulary
    if vocabulary is None:
        return Reading(len(texts), n_truncated)

    special = torch.tensor(vocabulary.special, dtype=torch.int64)
    n_unknown = n_tokens = 0
    distinct: set[int] = set()
    for chunk in chunks:
        ids = vocabulary.ids(chunk)
        n_unknown += int((ids == vocabulary.unknown).sum())
        n_tokens += int((~torch.isin(ids, special)).sum())
        # Their hashes: the tokens of a million texts would take gigabytes.
        distinct.update(hash(row.numpy().tobytes()) for row in ids)

    n_alike = len(texts) - len(distinct)
    return Reading(len(texts), n_truncated, n_unknown, n_tokens, n_alike)


def count(readings: Sequence[Reading]) -> dict[str, int]:
    """The counts of a result: what was cut or not known, where anything was."""
    counts = {
        "truncated_texts": sum(reading.n_truncated for reading in readings),
        "unknown_tokens": sum(reading.n_unknown for reading in readings),
        "texts_read_alike": sum(reading.n_alike for reading in readings if reading.n_unknown),
    }
    return {name: number for name, number in counts.items() if number}


def tell(of_tasks: dict[str, list[Reading]]) -> None:
    """Warn of texts that were cut, and of tokens that are not known, once a process: training
    evaluates many times.
    """
    cut: list[str] = []
    unknown: list[str] = []
    for label, readings in of_tasks.items():
        counts = count(readings)
        n_texts = sum(reading.n_texts for reading in readings)
        n_tokens = sum(reading.n_tokens for reading in readings)
        if "truncated_texts" in counts:
            cut.append(f"{counts['truncated_texts']:,} of {n_texts:,} in {label}")
        if counts.get("unknown_tokens", 0) >= TOLD * n_tokens > 0:
            alike = counts.get("texts_read_alike", 0)
            unknown.append(
                f"{counts['unknown_tokens']:,} of {n_tokens:,} in {label}, whose {n_texts:,} texts "
                f"become {n_texts - alike:,}"
            )

    _warn(cut, _CUT)
    _warn(unknown, _UNKNOWN)


def _warn(lines: list[str], sentence: str) -> None:
    """Say what has not been said before in this process."""
    new = [line for line in lines if line not in _told]
    _told.update(new)
    if new and dist.is_main():
        log.warn(sentence.replace("{}", "; ".join(new)))


_told: set[str] = set()


def note(encoder: Encoder, texts: Sequence[str], context: Context) -> None:
    """Read different texts and keep the result under them, so that no list counts twice.

    Warns at once where the model can read none of them: pictures may take hours.
    """
    reading = read(encoder, texts)
    context.readings[hash(tuple(texts))] = reading
    if reading.is_blind:
        n_left = reading.n_texts - reading.n_alike
        told = (
            f"{texts[0][:40]!r} ({encoder.name}: {reading.n_unknown:,} of {reading.n_tokens:,} "
            f"tokens are unknown, and {reading.n_texts:,} texts become {n_left:,})"
        )
        _warn([told], _BLIND)
