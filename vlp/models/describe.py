"""Captions that a model with a text decoder writes of pictures: greedy, or by beam search.

The search is transformers' own (`GenerationMixin.generate`), because open_clip's imports parts that
transformers 5 no longer has. Here is the model that it asks for the next token: the tokens of both
towers through the decoder, the whole caption anew for each one, because captions are short and
open_clip's blocks keep no keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from open_clip.transformer import MultimodalTransformer
from torch import Tensor, nn

from vlp.data.text import Frame
from vlp.models.decoder import next_logits


@dataclass(frozen=True)
class Search:
    """How captions are searched for."""

    beams: int = 1  # hypotheses that are kept; 1: the likeliest token at each place (greedy)
    min_tokens: int = 5  # in front of the end token, begin token included
    max_tokens: int = 30  # of a caption, begin and end token included
    # of beams: a hypothesis of n tokens is worth log p / n^length_penalty
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.beams < 1:
            raise ValueError(f"beams is {self.beams}; expected at least 1 (1: greedy)")
        if not 1 <= self.min_tokens < self.max_tokens:
            raise ValueError(
                f"min_tokens is {self.min_tokens} and max_tokens {self.max_tokens}; expected "
                "1 <= min_tokens < max_tokens"
            )
        if self.beams == 1 and self.length_penalty != 1:
            raise ValueError(
                f"length_penalty is {self.length_penalty}, by which hypotheses are compared, and "
                "greedy search has one; set beams to 2 or more, or leave it out"
            )


GREEDY = Search()


@torch.no_grad()
def write(
    image_tokens: Tensor,  # [n, places, width]
    text: nn.Module,  # ids [n, l] → (features, tokens [n, l, width])
    decoder: MultimodalTransformer,
    frame: Frame,
    search: Search,
) -> Tensor:
    """Token ids [n, l ≤ max_tokens] of a caption for each picture: begin, words, end, padding.

    Of the parts of a DualEncoder or of open_clip's CoCa, in evaluation mode. Rows that reach
    max_tokens end there with the end token.
    """
    network = _network_class()(text, decoder)
    begin = image_tokens.new_full((len(image_tokens), 1), frame.begin, dtype=torch.long)
    return network.generate(
        input_ids=begin,
        image_tokens=image_tokens,
        generation_config=_settings(frame, search, decoder.text_projection.shape[1]),
    )


def _settings(frame: Frame, search: Search, n_logits: int) -> Any:
    from transformers import GenerationConfig

    # No word in the place of one: coca_base has 14,592 ids more than its tokenizer.
    no_words = [frame.begin, frame.padding, *range(frame.n_ids, n_logits)]
    return GenerationConfig(
        num_beams=search.beams,
        min_length=search.min_tokens,
        max_length=search.max_tokens,
        length_penalty=search.length_penalty,
        bos_token_id=frame.begin,
        eos_token_id=frame.end,
        forced_eos_token_id=frame.end,
        pad_token_id=frame.padding,
        suppress_tokens=no_words,
        do_sample=False,
        use_cache=False,
    )


@cache
def _network_class() -> Any:
    """The class that `generate` works on; made at the first call, because transformers' models take
    a second to import.
    """
    from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutput

    class Writer(PreTrainedModel, GenerationMixin):
        """The next token of a caption, for transformers' search."""

        config_class = PretrainedConfig
        main_input_name = "input_ids"

        def __init__(self, text: Any, decoder: Any) -> None:
            super().__init__(PretrainedConfig())
            # In a tuple, so that they do not become parts of this module.
            self.parts = (text, decoder)

        @property
        def device(self) -> torch.device:
            return next(self.parts[1].parameters()).device

        def forward(self, input_ids: Tensor, image_tokens: Tensor, **_: Any) -> Any:
            text, decoder = self.parts
            _, text_tokens = text(input_ids)
            # Of the last place alone: a vocabulary for each place would take most of the memory.
            logits = next_logits(decoder, image_tokens, text_tokens)
            return CausalLMOutput(logits=logits.unsqueeze(1))

        def prepare_inputs_for_generation(  # type: ignore[override]  # its keywords are the caller's
            self, input_ids: Tensor, image_tokens: Tensor, **_: Any
        ) -> dict[str, Tensor]:
            return {"input_ids": input_ids, "image_tokens": image_tokens}

    return Writer
