"""Any dual encoder behind one small interface: pictures and sentences in, unit rows out, its own
preprocessing inside.

    load("runs/demo")      every reference of vlp.pretrained.references: runs, exports, folders and
                           tags of open_clip, ARCHITECTURE:FILE, transformers folders,
                           hf-hub:user/name
    from_model(model)      a vlp.models.dual_encoder.DualEncoder in memory, inside training

vlp's own models are run by vlp. Foreign ones are run by the library they come from, with its own
pixels (vlp.eval.foreign).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from vlp.eval import describers, foreign, model_tokenizers
from vlp.eval.encoder import Encoder as Encoder
from vlp.eval.encoder import ModelError as ModelError
from vlp.pretrained import references
from vlp.pretrained.fingerprints import fingerprint
from vlp.pretrained.runs import CheckpointError

if TYPE_CHECKING:
    from vlp.models.concatenated import Concatenated
    from vlp.models.dual_encoder import DualEncoder


def load(
    ref: str, device: str | torch.device = "cpu", autocast: torch.dtype | None = None
) -> Encoder:
    """The encoder that `ref` names (vlp.pretrained.references); a ModelError says what was found
    and what would work.
    """
    usable = _usable(device)
    try:
        return _load(ref, usable, autocast)
    except ModelError:
        raise
    except (ValueError, CheckpointError) as error:
        raise ModelError(str(error)) from error


def _usable(device: str | torch.device) -> torch.device:
    """The device by name; a ModelError for one that there is not here."""
    # One number is put there and read back: `meta` takes whatever it is given and has nothing.
    try:
        usable = torch.device(device)
        torch.zeros(1, device=usable).item()
    except Exception as error:  # each backend's own kinds
        reason = str(error).partition("\n")[0][:200]
        raise ModelError(
            f"device is {str(device)!r}, which cannot be used here ({reason}); "
            f"expected cpu, or one of the {torch.cuda.device_count()} GPUs: cuda, cuda:1, …"
        ) from None
    return usable


def _load(ref: str, device: torch.device, autocast: torch.dtype | None) -> Encoder:
    """The encoder of a reference, by whichever library its weights belong to."""
    reference = references.resolve(ref)

    # Weights of others are run by the library that they were made with.
    if reference.kind == "tag":
        return foreign.of_tag(reference, device, autocast)
    if reference.kind == "transformers":
        return foreign.of_transformers(reference, device, autocast)
    if reference.kind == "open_clip" and "vlp" not in references.read_config(reference.path):
        return foreign.of_folder(reference, device, autocast)

    from vlp.checkpoint import load_any

    return from_model(
        load_any(reference),
        name=ref,
        device=device,
        autocast=autocast,
        keep=True,
    )


# --- models of ours -------------------------------------------------------------------------------


def from_model(
    model: DualEncoder | Concatenated,
    name: str = "vlp",
    device: str | torch.device | None = None,
    autocast: torch.dtype | None = None,
    keep: bool = False,
) -> Encoder:
    """A model of ours; `keep` hashes its weights so that embeddings may be kept on disk (not while
    it is training).

    The caller decides about `model.eval()`; `vlp.eval.evaluation.in_training` does so and puts the
    mode back.
    """
    from vlp.data import text as tokenizers
    from vlp.data.decode import eval_transform

    device = torch.device(device) if device is not None else next(model.parameters()).device
    if keep:
        model = model.to(device).eval()

    # Only fixed weights get a fingerprint: embeddings of a model in training must not be kept.
    tokenizer = model_tokenizers.checked(lambda: tokenizers.build(model.text_spec), name)
    preprocessing = repr((model.image_spec, model.text_spec))
    with torch.no_grad():
        scale = float(model().scale)

    def tokens(texts: list[str]) -> dict[str, Any]:
        ids = tokenizer(texts)
        return {"text": ids.to(device), "cut": model.cut(ids.numpy(), device, len(ids))}

    # Of several models as one nobody says how certain the whole is.
    certainty = None
    heads: Any = getattr(model, "heads", None)
    if heads is not None and heads.concentration is not None:
        whole: Any = model
        certainty = whole.image_certainty, lambda texts: whole.text_certainty(**tokens(texts))
    return Encoder(
        name=name,
        pretrained="",
        prepare=lambda picture: eval_transform(picture, model.image_spec),
        image=lambda pixels: model(image=pixels).image,
        tower=getattr(model, "visual", None),
        features=getattr(model, "image_features", None),
        text=lambda texts: model(**tokens(texts)).text,
        joint=_joint(model),
        certainty=certainty,
        scale=scale,
        device=device,
        n_truncated=lambda texts: tokenizer.tokenize(texts)[1],
        vocabulary=model_tokenizers.vocabulary(tokenizer),
        fingerprint=fingerprint(model.state_dict(), preprocessing) if keep else "",
        autocast=autocast,
        decoding=model.image_spec.decoding,
        others=lambda rows, lengths, frames=None: (
            model(
                modalities=rows,
                modality_lengths=lengths,
                frames=None if frames is None else frames.flatten(0, 1),
            ).others
        ),
        prepare_frame=lambda data: eval_transform(data, model.image_spec),
        frame_shape=(3, *model.image_spec.size),
        modality_shapes=getattr(model, "modality_shapes", {}),
        decoded_modalities=getattr(model, "decoded_modalities", {}),
        describer=describers.of_model(model, tokenizer),
    )


def _joint(
    model: DualEncoder | Concatenated,
) -> Callable[[Tensor, list[tuple[str, str]]], Tensor] | None:
    """What embeds pictures between texts, where the model reads pictures among its tokens."""
    from vlp.models.multimodal import ImageTower

    tower, whole = getattr(model, "visual", None), cast(Any, model)
    if not isinstance(tower, ImageTower):
        return None
    return lambda pixels, texts: whole(image=pixels, prompts=tower.prompts(texts)).image
