"""A language model of transformers by name: which kind it is, where it computes, what its weights
are.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple

Kind = Literal["masked", "causal", "seq2seq"]
_CLASSES = {
    "masked": "AutoModelForMaskedLM",
    "causal": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
}


class Loaded(NamedTuple):
    """A model that is ready to compute."""

    model: Any  # of transformers, which says no types
    tokenizer: Any
    kind: Kind
    device: str
    fingerprint: str  # of the weights


@dataclass(frozen=True)
class LanguageModel:
    """A language model by name; each process loads it when it first needs it."""

    ref: str
    device: str = "auto"
    batch: int = 64
    bf16: bool = False

    @classmethod
    def of(cls, args: argparse.Namespace, ref: str) -> LanguageModel:
        """The model that the options name; raises ValueError where it cannot be loaded."""
        if args.batch < 1:
            raise ValueError(f"--batch {args.batch} must be at least 1")
        model = cls(ref, args.device, args.batch, args.bf16)

        # What is wrong with it shows now, not in the first shard.
        model.load()
        return model

    def settings(self) -> dict[str, str | bool | int]:
        """What its answers depend on: also the batch, whose shape moves the last bits of scores."""
        weights = self.load().fingerprint[:16]
        return {"model": self.ref, "weights": weights, "bf16": self.bf16, "batch": self.batch}

    def load(self) -> Loaded:
        """The model, loaded once a process; raises ValueError."""
        return _load(self.ref, self.device, self.bf16)


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a tool that uses a language model, besides its name."""
    add = parser.add_argument
    add(
        "--device",
        default="auto",
        help="of the language model; auto: the GPU of the launcher's local rank, or the CPU "
        "(default: %(default)s)",
    )
    add(
        "--batch",
        type=int,
        default=64,
        metavar="N",
        help="prompts that the language model reads at once (default: %(default)s)",
    )
    add(
        "--bf16",
        action="store_true",
        help="compute in bfloat16: faster, half the memory; some answers change",
    )


@cache
def _load(ref: str, device: str, bf16: bool) -> Loaded:
    import torch
    import transformers

    from vlp.joining import local_device
    from vlp.pretrained import places
    from vlp.pretrained.configurations import FILE, reason
    from vlp.pretrained.fingerprints import glance
    from vlp.pretrained.tokenizers import tokenizer

    # A mistyped folder shows before anything is read or asked for.
    try:
        place = places.locate(ref, file=FILE)
    except ValueError as error:
        raise ValueError(f"language model {ref!r}: {error}") from None
    kind = _kind_of(ref, place)
    on_device = local_device(device, shared=True)
    dtype = torch.bfloat16 if bf16 else torch.float32

    # A folder may hold a configuration and neither words nor weights.
    try:
        words = tokenizer(place, ref)
        model_class = getattr(transformers, _CLASSES[kind])
        model = model_class.from_pretrained(place, trust_remote_code=False, dtype=dtype)
    except Exception as error:  # transformers', safetensors' and torch's own kinds
        raise ValueError(
            f"language model {ref!r} cannot be loaded ({reason(error)}); give a folder or a "
            "model of the Hub with weights and a tokenizer"
        ) from None

    model = model.eval().to(on_device)
    return Loaded(model, words, kind, on_device, glance(model))


def _kind_of(ref: str, place: str) -> Kind:
    """By the class that the weights were saved from: names of models tell nothing."""
    from vlp.pretrained.configurations import configuration

    try:
        config = configuration(place)
    except ValueError as error:
        raise ValueError(f"language model {ref!r} has no configuration: {error}") from None

    architectures = config.architectures or []
    if any(name.endswith("ForMaskedLM") for name in architectures):
        return "masked"
    if any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures):
        return "causal"
    if config.is_encoder_decoder and any(name.endswith("Generation") for name in architectures):
        return "seq2seq"

    name = ", ".join(architectures) or "model of no named kind"
    raise ValueError(
        f"language model {ref!r} is a {name}; expected a masked, a causal or an encoder-decoder "
        "language model"
    )
