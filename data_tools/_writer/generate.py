"""A batch of prompts and what a causal or an encoder-decoder model answers to them."""

from __future__ import annotations

import copy
import math
import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from vlp.data_tools._writer.model import Loaded

TOP_P = 0.95  # of the words' probability is drawn from, as LaCLIP's release draws
_EXTRA_TOKENS = 4  # beyond an answer's length, for quotes and a full stop
_NO_END = 1 << 20  # tokens that a model with relative positions is taken to have room for
_MARKS = re.compile(r"^(?:[-*•]|\d+[.)])\s+")  # of lists, before an answer


@dataclass(frozen=True)
class Question:
    """A prompt with its caption filled in, and how long an answer may be: times the caption."""

    prompt: str
    caption: str
    length: float = 2.0


@dataclass(frozen=True)
class Drawing:
    """How many answers a prompt gets and how words are drawn; temperature 0 takes the likeliest."""

    n: int = 1
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n < 1 or self.temperature < 0:
            raise ValueError(
                f"n is {self.n} and temperature {self.temperature}; expected n of at least 1 and "
                "temperature of at least 0"
            )
        if self.n > 1 and not self.temperature:
            raise ValueError(
                f"{self.n} answers at temperature 0 would be equal; set the temperature higher, "
                "or n to 1"
            )


class Generator:
    """Answers to batches of prompts: the first line that the model writes after each."""

    def __init__(self, loaded: Loaded) -> None:
        if loaded.kind == "masked":
            raise ValueError(
                "a masked language model fills in words and answers no prompts; give a causal or "
                "an encoder-decoder one (`vlp data negatives --rewriter` takes a masked one)"
            )
        self.loaded = loaded

        # Answers grow to the right, so that prompts of a batch must end at the same place.
        self.tokenizer = copy.deepcopy(loaded.tokenizer)
        self.tokenizer.padding_side = "right" if loaded.kind == "seq2seq" else "left"
        if self.tokenizer.pad_token_id is None:  # GPT-2 and its like
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def fits(self, question: Question) -> bool:
        """Whether the model's positions hold the prompt and an answer as long as the caption."""
        n_tokens = len(self._ids([question])[0]) + self._n_caption(question)
        return n_tokens + _EXTRA_TOKENS <= self._most_positions

    def answers(self, questions: list[Question], drawing: Drawing, seed: int) -> list[list[str]]:
        """`drawing.n` answers to each question of one batch, "" for an empty one."""
        import torch

        ids = self._ids(questions)
        inputs = self.tokenizer.pad({"input_ids": ids}, return_tensors="pt")
        inputs = inputs.to(self.loaded.device)
        n_prompt = inputs.input_ids.shape[1]

        # One limit for the batch: the longest of what its questions ask for.
        longest = max(math.ceil(q.length * self._n_caption(q)) for q in questions) + _EXTRA_TOKENS
        settings = self._settings(drawing, min(longest, self._most_positions - n_prompt))
        cuda = [self.loaded.device] if self.loaded.device.startswith("cuda") else []
        with torch.random.fork_rng(cuda), torch.inference_mode():
            torch.manual_seed(seed)
            output = self.loaded.model.generate(
                input_ids=inputs.input_ids,
                attention_mask=inputs.attention_mask,
                generation_config=settings,
                stopping_criteria=[self._is_at_line_end(n_prompt)],
            )

        # A decoder's output begins with its start token instead of the prompt.
        written = output if self.loaded.kind == "seq2seq" else output[:, n_prompt:]
        texts = self.tokenizer.batch_decode(written, skip_special_tokens=True)
        lines = [first_line(text) for text in texts]
        return [lines[i : i + drawing.n] for i in range(0, len(lines), drawing.n)]

    @cached_property
    def _most_positions(self) -> int:
        """Tokens that the model has positions for; relative ones have no end."""
        config = self.loaded.model.config.get_text_config()
        return getattr(config, "max_position_embeddings", None) or _NO_END

    @cached_property
    def _line_ends(self) -> Tensor:
        """The tokens with which a line ends."""
        import torch

        n_words = len(self.tokenizer)
        texts = self.tokenizer.batch_decode([[token] for token in range(n_words)])
        ends = [token for token, text in enumerate(texts) if "\n" in text]
        return torch.tensor(ends, dtype=torch.int64, device=self.loaded.device)

    def _is_at_line_end(self, n_prompt: int) -> Any:
        """A criterion of `generate`: a row that has begun to answer is done at its line's end."""
        import torch

        # What a decoder is started with is no answer yet.
        n_before = 1 if self.loaded.kind == "seq2seq" else n_prompt

        def ended(ids: Tensor, scores: Any, **options: Any) -> Tensor:
            is_line_end = torch.isin(ids[:, n_before:], self._line_ends)
            return is_line_end[:, -1] & ~is_line_end.all(1)

        return ended

    def _settings(self, drawing: Drawing, n_new: int) -> Any:
        """The model's own settings of generation, without those that would draw otherwise."""
        settings = copy.deepcopy(self.loaded.model.generation_config)
        settings.update(
            max_new_tokens=max(n_new, 1),
            max_length=None,
            num_return_sequences=drawing.n,
            num_beams=1,
            do_sample=drawing.temperature > 0,
            temperature=drawing.temperature or None,
            top_p=TOP_P if drawing.temperature else None,
            top_k=0 if drawing.temperature else None,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        return settings

    def _ids(self, questions: list[Question]) -> list[list[int]]:
        """The tokens of the prompts, as a turn of a conversation where the model is made for it."""
        texts = [question.prompt for question in questions]
        if not self.tokenizer.chat_template:
            ids: list[list[int]] = self.tokenizer(texts).input_ids
            return ids

        # Reasoning would fill the answer's first line; templates without it pass the word over.
        turns = [
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}],
                add_generation_prompt=True,
                tokenize=False,
                enable_thinking=False,
            )
            for text in texts
        ]
        conversation: list[list[int]] = self.tokenizer(turns, add_special_tokens=False).input_ids
        return conversation

    def _n_caption(self, question: Question) -> int:
        return len(self.tokenizer(question.caption, add_special_tokens=False).input_ids)


def first_line(text: str) -> str:
    """The first line of an answer that holds words, without quotes and the marks of a list."""
    for line in text.splitlines():
        line = _MARKS.sub("", line.strip()).strip().strip('"“”').strip()
        if line:
            return line
    return ""
