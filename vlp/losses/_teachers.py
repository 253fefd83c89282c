"""The rows of one teacher, or of several one after another, as the forms of `distill` read them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vlp.losses._inputs import Inputs
from vlp.pairwise import in_students_dtype, number, widened


@dataclass(frozen=True)
class Rows:
    """What one teacher gives, without gradient, and what the student holds against it."""

    image: Tensor  # [b, D'] unit rows
    text: Tensor  # [b, D']
    scale: Tensor  # []

    # [b, D'] the student's rows in the teacher's space, of any norm
    projected_image: Tensor
    projected_text: Tensor
    interactive_scale: Tensor  # []

    # [Q, D'] of earlier steps; None where the term reads none
    queue_image: Tensor | None = None
    queue_text: Tensor | None = None

    def student(self, side: str) -> Tensor:
        """The student's rows of one side, "image" or "text", in the teacher's space, unit."""
        rows = F.normalize(widened(getattr(self, f"projected_{side}")), dim=-1)
        return rows.to(self.image.dtype)


def each(inputs: Inputs, *, projected: bool) -> Iterator[Rows]:
    """The teachers of a call, by their number; `projected`: the student meets their rows.

    ValueError where it has another width and nothing maps it to theirs.
    """
    # A teacher alone is the first of one.
    sides = [_apart(inputs.teacher_image), _apart(inputs.teacher_text)]
    n_teachers = sides[0].shape[1]
    scales = torch.as_tensor(inputs.teacher_scale).detach().reshape(-1).expand(n_teachers)
    scale = inputs.scale if inputs.interactive_scale is None else inputs.interactive_scale

    for place in range(n_teachers):
        image, text = (
            in_students_dtype(inputs.image, side[:, place].detach().contiguous()) for side in sides
        )
        in_their_space = inputs.image, inputs.text
        if projected:
            in_their_space = _projected(inputs, place, image.shape[1])
        yield Rows(
            image,
            text,
            number(scales[place], inputs.image),
            *in_their_space,
            number(scale, inputs.image),
            *_queues(inputs, place),
        )


def _apart(rows: Tensor) -> Tensor:
    """[b, D'] or [b, T, D'] as [b, T, D']."""
    return rows.unsqueeze(1) if rows.dim() == 2 else rows


def _projected(inputs: Inputs, place: int, width: int) -> tuple[Tensor, Tensor]:
    """The student's images and texts in the space of a teacher."""
    if inputs.projected_image is not None:
        image, text = inputs.projected_image, inputs.projected_text
        return _apart(image)[:, place], _apart(text)[:, place]

    student_width = inputs.image.shape[1]
    if student_width != width:
        raise ValueError(
            f"the teacher's rows have width {width}, the student's {student_width}: "
            f"set model.heads.teacher to {width}, which maps them (in a call: projected_image and "
            "projected_text)"
        )
    return inputs.image, inputs.text


def _queues(inputs: Inputs, place: int) -> tuple[Tensor | None, Tensor | None]:
    image, text = inputs.queue_teacher_image, inputs.queue_teacher_text
    if image is None or text is None:
        return None, None
    return _apart(image)[:, place], _apart(text)[:, place]
