"""Our models in mteb, the package of MTEB's and MIEB's tasks: pip install 'vlp[mteb]'.

    import mteb
    from vlp.eval.mteb import wrap

    model = wrap("exported/demo")
    mteb.evaluate(model, mteb.get_tasks(["CIFAR10ZeroShot", "Flickr30kT2IRetrieval"]))

A row is the unit embedding of a text or of a picture. Where an item has both, it is the mean of the
two, made unit: mteb compares by the cosine, so this is the sum that its own wrappers of CLIP give.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlp import __version__
from vlp.data.picture import to_rgb
from vlp.eval.models import Encoder, load
from vlp.joining import local_device

try:
    from mteb.models.abs_encoder import AbsEncoder
    from mteb.models.model_meta import ModelMeta, ScoringFunction
except ImportError as error:
    raise ImportError(f"{error}; install mteb with pip install 'vlp[mteb]'") from error

if TYPE_CHECKING:
    from collections.abc import Iterable


class Embedder(AbsEncoder):
    """An encoder of ours as mteb calls it."""

    def __init__(self, encoder: Encoder, name: str, languages: list[str] | None = None) -> None:
        self.encoder = encoder
        self.mteb_model_meta = about(encoder, name, languages)

    def encode(self, inputs: Iterable[dict[str, Any]], **_: Any) -> Tensor:
        """[n, D] float32 unit rows of all items, in order. `inputs` gives batches with "text"
        (sentences), "image" (pictures) or both.
        """
        return torch.cat([self._rows(batch).cpu() for batch in inputs])

    def _rows(self, batch: dict[str, Any]) -> Tensor:
        rows = []
        if "text" in batch:
            rows.append(self.encoder.encode_texts(list(batch["text"])))
        if "image" in batch:
            decoding = self.encoder.decoding
            images = [to_rgb(picture, decoding) for picture in batch["image"]]
            rows.append(self.encoder.encode_images(images))
        if not rows:
            raise ValueError(
                f"mteb gave items with {sorted(batch)}; expected text or image, which are what a "
                "dual encoder of images and texts embeds"
            )
        return torch.nn.functional.normalize(torch.stack(rows).mean(0), dim=-1)


def wrap(
    model: str | Encoder,
    name: str | None = None,
    device: str = "auto",
    languages: list[str] | None = None,
) -> Embedder:
    """The model that a reference of `vlp eval` names, or an encoder, for `mteb.evaluate`.

    `name`: as mteb files the results, USER/NAME; None: vlp/ and the last part of the reference.
    `languages`: such as ["eng-Latn"]; None: not stated. ModelError for what cannot be loaded.
    """
    encoder = (
        model if isinstance(model, Encoder) else load(model, local_device(device, shared=True))
    )
    last = encoder.name.rstrip("/").rpartition("/")[2] or "model"
    return Embedder(encoder, name or f"vlp/{last}", languages)


def about(encoder: Encoder, name: str, languages: list[str] | None = None) -> ModelMeta:
    """What mteb writes down of a model. Its revision is the hash of weights and preprocessing, so
    that results of two checkpoints are not taken for one another's.
    """
    if name.count("/") != 1:
        raise ValueError(
            f"name is {name!r}; expected USER/NAME, such as vlp/{name.replace('/', '-')}"
        )
    return ModelMeta(
        loader=None,
        name=name,
        revision=encoder.fingerprint[:16] or "in-memory",
        release_date=None,
        languages=languages,
        n_parameters=None,
        memory_usage_mb=None,
        max_tokens=None,
        embed_dim=encoder.encode_texts(["a"]).shape[1],
        license=None,
        open_weights=None,
        public_training_code=None,
        public_training_data=None,
        framework=["PyTorch"],
        similarity_fn_name=ScoringFunction.COSINE,
        use_instructions=False,
        training_datasets=None,
        modalities=["image", "text"],
        experiment_kwargs={"vlp": __version__},
    )
