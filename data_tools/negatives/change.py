"""What happens to a sample: its negatives are proposed, the valid ones kept, K a caption chosen."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from vlp.data.members import Picture
from vlp.data.wrong_captions import GIVEN
from vlp.data_tools._run.shards import windows
from vlp.data_tools.negatives.fields import valid, with_negatives

if TYPE_CHECKING:
    from vlp.data.members import Content
    from vlp.data_tools._run.shards import Changed
    from vlp.data_tools.negatives.lexicon import Lexicon
    from vlp.data_tools.negatives.rewriter import Rewriter
    from vlp.data_tools.negatives.rules import Negative

_WINDOW = 4  # batches of a language model's captions, whose samples wait in memory


@dataclass
class AddNegatives:
    """The change of a shard's samples (see `vlp.data_tools._run.shards.Change`)."""

    k: int
    kinds: tuple[str, ...]
    seed: int
    lexicon: Lexicon
    given: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    images: dict[str, Path] = field(default_factory=dict)  # of the first given negative
    rewriter: Rewriter | None = None

    def settings(self) -> dict[str, Any]:
        """What the output depends on, besides the input."""
        given = None
        if self.given:
            # Images by name and size, so that they may move, with their file, between two calls.
            images = {key: [path.name, path.stat().st_size] for key, path in self.images.items()}
            given = _digest(json.dumps([self.given, images], sort_keys=True))
        return {
            "k_a_caption": self.k,
            "kinds": self.kinds,
            "seed": self.seed,
            "words": _digest(repr(self.lexicon.entries)),
            "given": given,
            "rewriter": self.rewriter.settings() if self.rewriter else None,
        }

    def __call__(
        self, samples: Iterable[Content], shard: int, counts: Counter[str]
    ) -> Iterator[Changed]:
        from vlp.data_tools._run.shards import Changed

        for sample, chosen in self.chosen(samples, shard, counts):
            self._picture(sample, chosen, counts)
            meta = with_negatives(sample.meta, chosen, counts)
            yield Changed(sample, list(sample.captions), meta)

    def chosen(
        self, samples: Iterable[Content], shard: int, counts: Counter[str]
    ) -> Iterator[tuple[Content, list[tuple[Negative, int]]]]:
        """Each sample with its (negative, number of its caption) pairs."""
        # A language model reads the captions of many samples at once.
        n_window, rewrite = 1, None
        if self.rewriter:
            n_window = _WINDOW * self.rewriter.model.batch
            rewrite = self.rewriter.of_shard(shard, self.seed)

        for window in windows(samples, n_window):
            rewritten: dict[str, list[Negative]] = {}
            if rewrite:
                of_samples = [_heads(sample.captions) for sample in window]
                heads = list(dict.fromkeys(itertools.chain.from_iterable(of_samples)))
                rewritten = rewrite(heads)
            for sample in window:
                yield sample, self.choose(sample.key, list(sample.captions), counts, rewritten)

    def _picture(
        self, sample: Content, chosen: list[tuple[Negative, int]], counts: Counter[str]
    ) -> None:
        """Give the sample the image of its first negative; those of earlier negatives go with
        them.
        """
        sample.negative_images = {}
        image = self.images.get(sample.key)
        if image is None:
            return

        # The image shows the first given negative and no other.
        first = self.given[sample.key][0][0].strip()
        stays = bool(chosen) and chosen[0][1] == GIVEN and chosen[0][0].text == first
        if stays:
            picture = Picture(image.read_bytes(), image.suffix.lower()[1:])
            sample.negative_images = {0: picture}
            counts["negative images written"] += 1
        else:
            counts["dropped: negative images whose caption was dropped"] += 1

    def choose(
        self,
        key: str,
        captions: list[str],
        counts: Counter[str],
        rewritten: Mapping[str, list[Negative]] = MappingProxyType({}),  # by a language model
    ) -> list[tuple[Negative, int]]:
        """(negative, number of its caption) pairs, at most K that belong to a caption.

        The given ones come first and belong to every caption; then come each caption's own, its
        kinds in turn.
        """
        # By the sample's key, so that neither processes nor the order of shards change a choice.
        rng = random.Random(f"{self.seed}/{key}")
        heads = _heads(captions)
        candidates = self._candidates(key, heads, rng, counts, rewritten)
        pool = valid(candidates, heads, counts)

        # Given ones belong to every caption, so each caption has so many fewer of its own.
        chosen = [(negative, number) for negative, number in pool if number == GIVEN][: self.k]
        n_left = self.k - len(chosen)
        for i, caption in enumerate(captions):
            tail = caption[len(heads[i]) :]
            of_caption = [negative for negative, number in pool if number == i]
            for negative in _in_turn(of_caption, rng)[:n_left]:
                chosen.append((replace(negative, text=negative.text + tail), i))
        return chosen

    def _candidates(
        self,
        key: str,
        captions: list[str],
        rng: random.Random,
        counts: Counter[str],
        rewritten: Mapping[str, list[Negative]],
    ) -> list[tuple[Negative, int]]:
        from vlp.data_tools.negatives.rules import Negative, propose

        # What a file gives belongs to the picture, and so to every caption of it.
        given = self.given.get(key, [])
        if given:
            counts["given: keys used"] += 1

        candidates = [(Negative(kind, text.strip()), GIVEN) for text, kind in given]

        for i, caption in enumerate(captions):
            if caption in captions[:i]:
                continue  # said twice: what is made from it belongs to both

            passed: Counter[str] = Counter()
            negatives = propose(caption, self.lexicon, rng, self.kinds, passed)
            negatives += rewritten.get(caption, [])
            candidates += [(negative, i) for negative in negatives]

            counts["captions read"] += 1
            kinds = {negative.kind for negative in negatives}
            counts.update(f"captions with {kind}" for kind in kinds)
            counts.update({f"passed over: {reason}": n for reason, n in passed.items()})
            if not negatives:
                counts["captions without negatives"] += 1
        return candidates


def _heads(captions: Iterable[str]) -> list[str]:
    """The parts of captions that are changed."""
    from vlp.data_tools.negatives.rules import head

    return [head(caption) for caption in captions]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _in_turn(negatives: list[Negative], rng: random.Random) -> list[Negative]:
    """All of them in random order, the kinds in turn."""
    kinds: dict[str, list[Negative]] = {}
    for negative in negatives:
        # The four shuffles are one kind here, or they would take four turns of a round.
        kind = "order" if negative.kind.startswith("order") else negative.kind
        kinds.setdefault(kind, []).append(negative)
    queues = [rng.sample(queue, len(queue)) for queue in kinds.values()]

    rng.shuffle(queues)

    result: list[Negative] = []
    while any(queues):
        result += [queue.pop() for queue in queues if queue]
    return result
