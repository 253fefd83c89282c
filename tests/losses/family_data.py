"""Inputs of every objective, uneven over ranks, and the gradients of them that tests compare."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlp import dist

B, D, K, J, C, TEACHER = 8, 5, 3, 2, 2, 4
V, Q, R, L, WORDS, CONCEPTS, OTHERS = 2, 11, 3, 4, 6, 3, 2
PATCHES, TOKENS = 4, 3
CANDIDATES = range(B)


def data() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(11)

    def rows(*shape: int) -> Tensor:
        return F.normalize(
            torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1
        ).requires_grad_()

    given = {name: rows(B, D) for name in ("image", "text", "ema_image", "ema_text")}
    given |= {
        "negatives": rows(B, K, D),
        "negative_images": rows(B, J, D),
        "ema_negatives": rows(B, K, D),
        "counterfactual": rows(B, C, D),
    }
    given |= {
        "teacher_image": rows(B, TEACHER),
        "teacher_text": rows(B, TEACHER),
        "teacher_scores": rows(B, K),
    }
    given |= {name: rows(V, B, D) for name in ("image_views", "text_views")}
    given |= {name: rows(Q, D) for name in ("queue_image", "queue_text")}
    given |= {"caption_logits": rows(B, L, WORDS), "concept_logits": rows(B, CONCEPTS)}
    for name, value in (("scale", 5.0), ("bias", -3.0), ("view_scale", 4.0)):
        given[name] = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    # last, so that what the others draw stays as it was
    given["captions"] = rows(B, K, D)
    given |= {name: 2 * rows(B, TEACHER) for name in ("projected_image", "projected_text")}
    given["interactive_scale"] = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    given |= {name: rows(Q, TEACHER) for name in ("queue_teacher_image", "queue_teacher_text")}
    given |= {name: rows(B, R) for name in ("candidate_text_scores", "candidate_image_scores")}
    given |= {name: rows(B, D) for name in ("predicted_image", "predicted_text")}
    given |= of_places()
    given["others"] = rows(OTHERS, B, D)
    for name in ("image_concentration", "text_concentration"):
        given[name] = (3 + 40 * torch.rand(B, generator=generator).double()).requires_grad_()
    # of text to image and to the others, and back
    given |= {name: rows(2 * (1 + OTHERS), B, D) for name in ("translated", "cycled")}
    with torch.no_grad():
        given["queue_image"][:2] = given["queue_text"][5] = 0  # still empty
        given["queue_teacher_image"][:2] = given["queue_teacher_text"][5] = 0
    return given | {
        "teacher_scale": torch.tensor(8.0, dtype=torch.float64),
        # uneven: the first rank of four has no valid caption at all, the third has all
        "negatives_valid": torch.tensor([0, 0, 5, 2, 7, 7, 4, 0])
        .unsqueeze(1)
        .bitwise_and(torch.tensor([4, 2, 1]))
        .bool(),
        # one sample without any caption, one column of the first rank with a single one
        "captions_valid": torch.tensor([4, 6, 7, 0, 7, 5, 3, 1])
        .unsqueeze(1)
        .bitwise_and(torch.tensor([4, 2, 1]))
        .bool(),
        # of the second rank of four none is valid, of the third all are
        "negative_images_valid": torch.tensor([1, 3, 0, 0, 3, 3, 2, 1])
        .unsqueeze(1)
        .bitwise_and(torch.tensor([1, 2]))
        .bool(),
        # of the last rank of four no sample has both modalities
        "others_valid": torch.tensor([[1, 1, 1, 1, 1, 0, 0, 1], [1, 0, 1, 1, 1, 1, 1, 0]]).bool(),
        "counterfactual_valid": torch.tensor([0, 0, 0, 1, 1, 1, 0, 1]).bool(),
        "score": torch.tensor([0, 0.5, 2, 1, 0.1, 3, 1, 0.7], dtype=torch.float64),
        "caption_ids": torch.randint(1, WORDS, (B, L), generator=generator)
        * (torch.arange(L) < torch.arange(B).view(B, 1) - 2),
        # The next rows; of the last two samples none is valid, of the third one.
        "candidate_texts": (torch.arange(B).view(B, 1) + torch.arange(1, R + 1)) % B,
        "candidate_images": (torch.arange(B).view(B, 1) + torch.tensor([5, 2, 3])) % B,
        "pair_score": torch.tensor([0, -1, 0.4, 0, -1, 0.2, 9, 9], dtype=torch.float64),
        "concept_targets": (torch.arange(B * CONCEPTS) % 4).view(B, CONCEPTS).double()
        * (torch.arange(B) % 3 > 0).unsqueeze(1),
    }


def of_places() -> dict[str, Tensor]:
    """Patches and tokens, drawn by themselves, and which of them take part."""
    generator = torch.Generator().manual_seed(12)

    def rows(*shape: int) -> Tensor:
        drawn = torch.randn(*shape, D, generator=generator, dtype=torch.float64)
        return F.normalize(drawn, dim=-1).requires_grad_()

    def mask(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator) > 0.3

    given = {
        "image_tokens": rows(B, PATCHES),
        "text_tokens": rows(B, TOKENS),
        "negative_tokens": rows(B, K, TOKENS),
        "attended_captions": rows(B, K),
        "patch_distances": torch.rand(B, dtype=torch.float64, generator=generator).requires_grad_(),
        "region_scale": torch.tensor(6.0, dtype=torch.float64, requires_grad=True),
        "image_tokens_valid": mask(B, PATCHES),
        "text_tokens_valid": mask(B, TOKENS),
        "negative_tokens_valid": mask(B, K, TOKENS),
    }
    # a picture of one patch, and one without any; a text and a valid hard caption without a token
    given["image_tokens_valid"][4] = torch.tensor([False, True, False, False])
    given["image_tokens_valid"][6] = False
    given["text_tokens_valid"][3] = given["negative_tokens_valid"][2, 0] = False
    return given


LEAVES = (
    "image", "text", "scale", "bias", "negatives", "negative_images", "counterfactual",
    "image_views", "text_views", "view_scale", "caption_logits", "concept_logits", "captions",
    "projected_image", "projected_text", "interactive_scale", "predicted_image", "predicted_text",
    "image_tokens", "text_tokens", "negative_tokens", "attended_captions", "patch_distances",
    "region_scale",
    "others",
    "image_concentration", "text_concentration",
    "translated", "cycled",
)  # fmt: skip
# Teachers get no gradient.
NEVER = (
    "ema_image", "ema_text", "ema_negatives", "teacher_image", "teacher_text", "teacher_scores",
    "queue_image", "queue_text", "queue_teacher_image", "queue_teacher_text",
    "candidate_text_scores", "candidate_image_scores",
)  # fmt: skip
# Rows are counted by the second dimension, as those of views are.
_SECOND = ("others", "others_valid", "translated", "cycled")
PLANS = [(impl, topology) for impl in ("dense", "tiled") for topology in ("global", "ring")]


def gradients_of(value: Tensor, d: dict[str, Tensor]) -> list:
    assert not any(
        g is not None and g.any()
        for g in torch.autograd.grad(
            value, [d[name] for name in NEVER], retain_graph=True, allow_unused=True
        )
    )
    found = torch.autograd.grad(value, [d[name] for name in LEAVES], materialize_grads=True)
    return [value.item(), *(g.tolist() for g in found)]


def own_rows(d: dict[str, Tensor]) -> dict[str, Tensor]:
    mine = slice(dist.rank() * B // dist.world_size(), (dist.rank() + 1) * B // dist.world_size())

    def cut(name: str, value: Tensor) -> Tensor:
        if not value.dim() or name.startswith("queue_"):
            return value
        second = name.endswith("_views") or name in _SECOND
        return value[:, mine] if second else value[mine]

    return {name: cut(name, value) for name, value in d.items()}
