"""A multimodal language model as both towers: LLaVA, Qwen2-VL and others of transformers' AutoModel
that take a picture among their tokens.

Picture and caption stand each in a prompt, and are read at the last token; the hidden state is the
embedding. So do E5-V (Jiang et al. 2024, arXiv 2407.12580) and VLM2Vec (Jiang et al. 2024,
arXiv 2410.05160), whose instruction is part of the prompt of pictures alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from vlp.pretrained import places
from vlp.pretrained.configurations import reason
from vlp.towers.huggingface import language_config

BOTH_TOWERS = True  # no other tower stands beside it
SECTION = "vlp_image"  # of vision_cfg, what `described` gives
# What a processor would do to a picture and the data have done; it lays out the patches.
DONE_BY_DATA = (
    *("do_resize", "do_center_crop", "do_pad"),
    *("do_rescale", "do_normalize", "do_convert_rgb"),
)


@dataclass(frozen=True)
class Options:
    # Hub name, local folder, or package:NAME/FOLDER of an installed package: the model with its
    # tokenizer and image processor
    model: str
    image_size: int = 336  # pixels, square; more of them are more tokens of a picture
    # the picture stands for {}; an instruction of the task belongs here
    prompt_image: str = "{}\nSummarize above image in one word: "
    # the caption stands for {}
    prompt_text: str = "{}\nSummarize above sentence in one word: "
    context_length: int = 77  # L of a caption, the prompt included
    pretrained: bool = True  # the model's weights; false: random
    # none: the hidden state is the embedding, of the model's width; linear: a layer a side
    proj: Literal["none", "linear"] = "none"
    # how captions are cleaned before they become tokens
    clean: Literal["lower", "whitespace", "canonicalize"] = "whitespace"

    def __post_init__(self) -> None:
        for name in ("prompt_image", "prompt_text"):
            prompt = getattr(self, name)
            if prompt.count("{}") != 1:
                stands = "picture" if name == "prompt_image" else "caption"
                raise ValueError(
                    f"{name} is {prompt!r}; expected one {{}} where the {stands} stands"
                )
        if min(self.image_size, self.context_length) < 3:
            raise ValueError(
                f"image_size is {self.image_size} and context_length {self.context_length}; "
                "expected at least 3"
            )


def shared_cfg(options: Options) -> dict[str, Any]:
    return {} if options.proj == "linear" else {"embed_dim": _width(options)}


def vision_cfg(options: Options) -> dict[str, Any]:
    picture = described(options.model, options.prompt_image, options.image_size)
    return {
        "image_size": options.image_size,
        # Read by vlp.models.multimodal; open_clip has no such tower.
        SECTION: picture | {"projected": options.proj == "linear"},
    }


def text_cfg(options: Options) -> dict[str, Any]:
    config = language_config(options.model).get_text_config()
    words = options.prompt_text.replace("{}", " ")
    _check_tokens(processor(options.model).tokenizer, options.model, words)
    return {
        "hf_model_name": places.bare(options.model),
        "hf_model_pretrained": options.pretrained,
        "hf_tokenizer_name": places.bare(options.model),
        "context_length": options.context_length,
        "tokenizer_kwargs": {
            "clean": options.clean,
            "prompt": options.prompt_text,
            "end": False,
            "mark": False,
        },
        "vlp_text": {
            "width": config.hidden_size,
            "vocab_size": config.vocab_size,
            "pool": "last",
            "attention": "causal",
            "adaptor": None,
        },
    }


def preprocess_cfg(options: Options) -> dict[str, Any]:
    pixels = processor(options.model).image_processor
    return {
        "mean": list(pixels.image_mean),
        "std": list(pixels.image_std),
        "interpolation": "bicubic",
        # Whole pictures, as models with tiles or any resolution see them.
        "resize_mode": "squash",
    }


def _width(options: Options) -> int:
    width: int = language_config(options.model).get_text_config().hidden_size
    return width


# --- pictures as the model takes them -------------------------------------------------------------


def described(name: str, prompt: str, image_size: int) -> dict[str, Any]:
    """The tokens of a picture of that size in its prompt, and what comes with them, as JSON values;
    ValueError where the model, or its tokenizer, cannot read it.
    """
    of_model = processor(name)
    token = getattr(of_model, "image_token", None)
    if token is None:
        raise ValueError(
            f"the processor of {name!r} ({type(of_model).__name__}) names no token for a picture; "
            "expected a model like LLaVA or Qwen2-VL, whose processor has an image_token"
        )
    _check_tokens(of_model.tokenizer, name, prompt.replace("{}", token))
    before, _, after = prompt.partition("{}")
    return laid_out(name, before, after, image_size)


def laid_out(name: str, before: str, after: str, image_size: int) -> dict[str, Any]:
    """The tokens of a picture of that size between two texts, and what comes with them, as JSON
    values; ValueError where the model cannot read it.
    """
    from PIL import Image

    of_model = processor(name)
    picture = Image.new("RGB", (image_size, image_size))
    token = _framed(of_model.tokenizer, of_model.image_token, before + after)
    options = {key: False for key in DONE_BY_DATA[:2] if hasattr(of_model.image_processor, key)}
    try:
        row = of_model(
            images=picture, text=f"{before}{token}{after}", return_tensors="pt", **options
        )
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{name!r} cannot read a picture of {image_size} pixels: {reason(error)}; image_size "
            "must be a multiple of its patches (of Qwen2-VL 28, of LLaVA-1.5 the 336 of its tower)"
        ) from None
    kinds = row.get("mm_token_type_ids")
    return {
        "ids": row["input_ids"][0].tolist(),
        "kinds": None if kinds is None else kinds[0].tolist(),
    }


def without_special_tokens(name: str, text: str) -> str:
    """A text whose words are none of the tokens that stand for a picture, an end or a turn."""
    tokenizer = processor(name).tokenizer
    for token in {*tokenizer.all_special_tokens, processor(name).image_token}:
        text = text.replace(token, " ")
    return text


def fitting(name: str, before: str, after: str, n_tokens: int) -> tuple[str, str]:
    """Two texts around a picture without what is beyond so many tokens of both."""
    tokenizer = processor(name).tokenizer
    words = before + after
    read = tokenizer(words, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    spans = read["offset_mapping"]
    if len(spans) <= n_tokens:
        return before, after
    end = spans[n_tokens - 1][1] if n_tokens else 0
    return before[:end], after[: max(0, end - len(before))]


def _framed(tokenizer: Any, token: str, prompt: str) -> str:
    """The picture's token, between Qwen's marks where the prompt does not write them."""
    begin, end = "<|vision_start|>", "<|vision_end|>"
    has_marks = {begin, end} <= set(tokenizer.get_added_vocab())
    return f"{begin}{token}{end}" if has_marks and begin not in prompt else token


def _check_tokens(tokenizer: Any, name: str, prompt: str) -> None:
    """Refuse a prompt that the tokenizer can only spell with its unknown token."""
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown not in tokenizer(prompt)["input_ids"]:
        return
    words = [word for word in prompt.split() if unknown in tokenizer(word)["input_ids"]]
    raise ValueError(
        f"the tokenizer of {name!r} does not know {', '.join(map(repr, words[:5]))} of the prompt "
        f"{prompt!r}; write the prompt in tokens that it has"
    )


def processor(name: str) -> Any:
    """transformers' processor of a model: its tokenizer, and how it lays out pictures."""
    language_config(name)  # says what is wrong with the folder or name
    place = places.locate(name)
    # Of a folder whole: a relative name is another folder where the process stands elsewhere.
    whole = str(Path(place).resolve()) if Path(place).is_dir() else place
    return _processor(whole, name)


@lru_cache(maxsize=4)
def _processor(place: str, name: str) -> Any:
    from transformers import AutoProcessor

    try:
        made = AutoProcessor.from_pretrained(place, trust_remote_code=False)
    except (ImportError, OSError, TypeError, ValueError) as error:
        raise ValueError(
            f"no processor of pictures and texts at {name!r}: {reason(error)}; expected a "
            "multimodal model's folder or Hub name"
        ) from None
    if not hasattr(made, "image_processor") or not hasattr(made, "tokenizer"):
        raise ValueError(
            f"{name!r} has a {type(made).__name__}, for texts or pictures alone; expected a "
            "multimodal language model. A language model is the text tower llm"
        )
    return made
