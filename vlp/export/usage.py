"""The code of a model card: how each library loads the model."""

from __future__ import annotations

import json

from vlp.export.dual_form import FOLDER

# of a folder; a repository has a name by which open_clip finds the text tower
BY_PATH = (
    "open_clip: finds the text tower by this folder's path; vlp reads it wherever the folder is "
    "moved"
)


def blocks(name: str, form: str | None, libraries: set[str], length: int) -> str:
    """How each library loads the model, as code that runs where the folder lies; `published` makes
    it the repository's.
    """
    # Every block is run by the tests, against a Hub of their own.
    shown = [_open_clip_block(name)] if "open_clip" in libraries else []
    if form is not None:
        shown.append(_transformers_block(name, form, length))
    if "sentence-transformers" in libraries:
        shown.append(_sentence_transformers_block(name))
    shown.append(vlp_block(name))
    if "ONNX" in libraries:
        inputs = "normalised pixels and token ids"
        if "open_clip" in libraries:
            inputs = "what open_clip's `preprocess` and `tokenizer` give"
        shown.append(f"`onnx/image.onnx` and `onnx/text.onnx` take {inputs}.")
    return "\n\n".join(shown)


def _open_clip_block(name: str) -> str:
    return f"""```python
import open_clip
import torch
from PIL import Image

model, preprocess = open_clip.create_model_from_pretrained({_local(name)})
tokenizer = open_clip.get_tokenizer({_local(name)})
model.eval()
with torch.no_grad():
    pixels = preprocess(Image.open("photo.jpg").convert("RGB")).unsqueeze(0)
    image = model.encode_image(pixels, normalize=True)
    text = model.encode_text(tokenizer(["a cat", "a dog"]), normalize=True)
print(image @ text.T)
```"""


def _transformers_block(name: str, form: str, length: int) -> str:
    siglip = form == "SiglipModel"
    place = _quoted(name)
    if form == "VisionTextDualEncoderModel":
        place += f', subfolder="{FOLDER}"'
    padding = '"max_length"' if siglip else "True"
    to_probabilities = "sigmoid()" if siglip else "softmax(dim=-1)"
    # Fewer raise there, and more change the embedding: the last token is pooled. 5.23 drops its
    # documented argument tokenizer_kwargs, so that its parameters have to be set.
    kwargs = f'dict(padding="max_length", max_length={length}, truncation=True)'
    pipeline = f"""

transformers' pipeline gives a SiglipModel 64 tokens, unless told that this one takes {length}:

```python
from transformers import pipeline

classify = pipeline("zero-shot-image-classification", model={_quoted(name)})
classify._preprocess_params["tokenizer_kwargs"] = {kwargs}
print(classify("photo.jpg", candidate_labels=["cat", "dog"]))
```"""
    return f"""```python
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained({place})
processor = AutoProcessor.from_pretrained({place})
image = Image.open("photo.jpg").convert("RGB")
texts = dict(text=["a cat", "a dog"], padding={padding}, truncation=True)
inputs = processor(images=image, return_tensors="pt", **texts)
with torch.no_grad():
    print(model(**inputs).logits_per_image.{to_probabilities})
```{pipeline if siglip and length != 64 else ""}"""


def _sentence_transformers_block(name: str) -> str:
    return f"""```python
from PIL import Image
from sentence_transformers import SentenceTransformer

model = SentenceTransformer({_quoted(name)})
image = model.encode([Image.open("photo.jpg").convert("RGB")])
text = model.encode(["a cat", "a dog"])
print(model.similarity(image, text))
```"""


def vlp_block(name: str) -> str:
    return f"""```python
from vlp.models.load import load

model = load({_local(name)}).eval()
```"""


def published(card: str, name: str, repository: str) -> str:
    """The card of the folder `name` as it stands in a repository: its code loads from there."""
    card = card.replace(f"- {BY_PATH}\n", "")
    # By its quotes: the name alone may stand in a sentence.
    card = card.replace(_local(name), f'"hf-hub:{repository}"')
    card = card.replace(f"model={_quoted(name)})", f'model="{repository}")')
    for end in (")", ", subfolder="):
        card = card.replace(f"({_quoted(name)}{end}", f'("{repository}"{end}')
    return card


def _local(name: str) -> str:
    """The folder `name` as open_clip and vlp are told that it is one, in Python."""
    return _quoted(f"local-dir:{name}")


def _quoted(text: str) -> str:
    """Text as Python writes it, in double quotes."""
    return json.dumps(text, ensure_ascii=False)
