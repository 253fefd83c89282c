"""Negatives by a language model of transformers that the user names: a masked one fills in other
words, a causal one continues a prompt. Nothing vouches that they are false; `vlp data negatives`
drops only what captions show to be true.
"""

from __future__ import annotations

import random
from functools import cache

from vlp.data_tools._english.shuffles import FUNCTION_WORDS
from vlp.data_tools._english.words import edit, words
from vlp.data_tools.negatives.rules import Negative

N_WORDS = 2  # words of a caption that a masked model is asked for
N_LIKELY = 20  # its most likely words to choose from; beyond them sentences fall apart


class Masked:
    """Replaces content words by others that a masked language model finds likely."""

    def __init__(self, name: str) -> None:
        from transformers import AutoModelForMaskedLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(name)
        self.model = AutoModelForMaskedLM.from_pretrained(name).eval()
        # How the vocabulary tells a word's beginning: a mark of its own, or the lack of a mark on
        # continuations.
        vocabulary = self.tokenizer.get_vocab()
        self.mark = ""
        for mark in ("Ġ", "▁"):
            if not self.mark and any(token.startswith(mark) for token in vocabulary):
                self.mark = mark

    def __call__(self, caption: str, rng: random.Random) -> list[Negative]:
        import torch

        content = [w for w in words(caption) if w.text not in FUNCTION_WORDS and w.text.isalpha()]
        negatives = []
        for word in rng.sample(content, min(N_WORDS, len(content))):
            masked = caption[: word.start] + self.tokenizer.mask_token + caption[word.end :]
            inputs = self.tokenizer(masked, return_tensors="pt", truncation=True)
            place = (inputs.input_ids[0] == self.tokenizer.mask_token_id).nonzero()
            if not len(place):
                continue  # cut off with the end of a long caption

            with torch.inference_mode():
                logits = self.model(**inputs).logits[0, place[0, 0]]
            likely = logits.topk(min(N_LIKELY, len(logits))).indices.tolist()

            # One at random of the likely words: the likeliest is most often the true one.
            candidates = [self._word(token, caption) for token in likely]
            candidates = [text for text in candidates if text]
            if candidates:
                new = rng.choice(candidates)
                text = edit(caption, [(word.start, word.end, new)])
                negatives.append(Negative("masked", text, frozenset({new})))
        return negatives

    def _word(self, token: int, caption: str) -> str:
        """A token as a whole word that the caption does not hold yet, else ""."""
        text = str(self.tokenizer.decode([token])).strip().lower()
        piece = str(self.tokenizer.convert_ids_to_tokens(token))
        is_whole = text.isalpha() and piece.startswith(self.mark) and not piece.startswith("##")

        # Not a word that is there already: it would say nothing new, or the same twice.
        in_caption = text in {word.text for word in words(caption)}
        is_special = token in self.tokenizer.all_special_ids
        if not is_whole or in_caption or is_special or text in FUNCTION_WORDS:
            return ""
        return text


class Causal:
    """Takes the first line with which a causal language model continues the prompt (greedily, so
    always the same).
    """

    def __init__(self, name: str, prompt: str) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(name)
        self.model = AutoModelForCausalLM.from_pretrained(name).eval()
        self.prompt = prompt

    def __call__(self, caption: str, rng: random.Random) -> list[Negative]:
        import torch

        inputs = self.tokenizer(self.prompt.replace("{}", caption), return_tensors="pt")
        n_prompt = inputs.input_ids.shape[1]

        # A rewritten caption is about as long as the caption; twice that leaves room.
        n_new = 2 * len(self.tokenizer(caption).input_ids) + 4
        pad = self.tokenizer.pad_token_id
        if pad is None:  # GPT-2 and its like have none, and generate() would warn every time
            pad = self.tokenizer.eos_token_id
        with torch.inference_mode():
            output = self.model.generate(
                inputs.input_ids,
                attention_mask=inputs.attention_mask,
                max_new_tokens=n_new,
                do_sample=False,
                pad_token_id=pad,
            )

        answer = str(self.tokenizer.decode(output[0, n_prompt:], skip_special_tokens=True))
        lines = answer.strip().splitlines()
        if not lines or not lines[0].strip():
            return []
        return [Negative("rewritten", lines[0].strip().strip('"'))]


@cache
def load(name: str, prompt: str) -> Masked | Causal:
    """The rewriter for a model's name or folder; raises ValueError for a model that is neither
    masked nor causal.
    """
    from transformers import AutoConfig

    try:
        architectures = AutoConfig.from_pretrained(name).architectures or []
    except OSError as error:
        raise ValueError(
            f"rewriter {name!r} is neither a folder nor a reachable model of the Hub: {error}"
        ) from None

    # By the class that the weights were saved from: names of models tell nothing.
    if any(kind.endswith("ForMaskedLM") for kind in architectures):
        return Masked(name)
    if any(kind.endswith(("ForCausalLM", "LMHeadModel")) for kind in architectures):
        return Causal(name, prompt)
    kind = ", ".join(architectures) or "model of no named kind"
    raise ValueError(f"rewriter {name!r} is a {kind}; expected a masked or a causal language model")
