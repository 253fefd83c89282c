"""Our models as mteb runs them: its tasks of every kind, and our own figures on one set."""

import mteb
import pytest
import torch
from datasets import Dataset
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.mocks import mock_tasks
from PIL import Image

from tests.eval.material import direction, known_encoder, picture
from tests.eval.parity import mteb_tasks
from vlp.eval import metrics
from vlp.eval.mteb import wrap

KINDS = (
    "Any2AnyRetrievalI2T", "Any2AnyRetrievalT2I", "AsymCustomTextImagePairClassification",
    "ImageClassification", "ImageMultilabelClassification", "ImageTextPairClassification",
    "PairImageClassification", "ZeroShotClassification",
)  # fmt: skip
N = 24


def noisy(number: int, kind: str) -> torch.Tensor:
    """A direction that pictures and texts of one number share in part."""
    rows = direction(number) + 1.2 * direction(number, kind)
    return torch.nn.functional.normalize(rows, dim=0)


def encoder():
    def text(sentence):
        number = sentence.rpartition(" ")[2]
        return noisy(int(number), "text") if number.isdigit() else direction(sentence)

    return known_encoder(lambda number: noisy(number, "image"), text)


class Local(AbsTaskRetrieval):
    """Captions look for their pictures; two captions a picture."""

    metadata = mteb_tasks.metadata("LocalT2I", "Any2AnyRetrieval", "t2i", ["text", "image"])

    def load_data(self, num_proc=None, **kwargs):
        captions = [f"{article} picture {i}" for i in range(N) for article in ("a", "the")]
        queries = {"id": [f"q{i}" for i in range(2 * N)], "text": captions}
        corpus = {"id": [f"d{i}" for i in range(N)], "image": [picture(i) for i in range(N)]}
        right = {f"q{i}": {f"d{i // 2}": 1} for i in range(2 * N)}
        of_split = RetrievalSplitData(
            queries=Dataset.from_dict(queries),
            corpus=Dataset.from_dict(corpus),
            relevant_docs=right,
            top_ranked=None,
        )
        self.dataset = {"default": {"test": of_split}}
        self.data_loaded = True


def run(model, task):
    (result,) = mteb.evaluate(model, task, cache=None, show_progress_bar=False).task_results
    return result


def test_recall_equals_ours():
    known = encoder()
    result = run(wrap(known), Local())
    scores = result.scores["test"][0]

    images = known.encode_images([picture(i) for i in range(N)])
    texts = known.encode_texts([f"{a} picture {i}" for i in range(N) for a in ("a", "the")])
    owner = torch.arange(N).repeat_interleave(2)
    _, ranks = metrics.retrieval_ranks(images, texts, owner)
    for k in (1, 5, 10):
        ours = float((ranks <= k).double().mean())
        assert scores[f"recall_at_{k}"] == pytest.approx(ours, abs=1e-5)
    assert 0.2 < scores["recall_at_1"] < 1  # neither nothing nor all


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_task_with_pictures_runs(kind, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names = [name for name in dir(mock_tasks) if name.startswith(f"Mock{kind}Task")]
    assert len(names) == 1
    model = wrap(encoder(), name="us/known")
    result = run(model, getattr(mock_tasks, names[0])())
    assert 0 <= result.get_score() <= 1


def test_a_picture_with_a_text_is_the_mean_of_both():
    known = encoder()
    rows = wrap(known).encode([{"text": ["a picture 3"], "image": [picture(3)]}])
    both = known.encode_texts(["a picture 3"]) + known.encode_images([picture(3)])
    torch.testing.assert_close(rows, torch.nn.functional.normalize(both, dim=1))

    # Transparency lies on white, as everywhere here.
    clear = Image.new("RGBA", (8, 8), (1, 0, 7, 0))
    opaque = Image.new("RGB", (8, 8), (255, 255, 255))
    given = [wrap(known).encode([{"image": [image]}]) for image in (clear, opaque)]
    torch.testing.assert_close(*given)


def test_what_mteb_cannot_file_is_refused():
    with pytest.raises(ValueError, match="expected USER/NAME"):
        wrap(encoder(), name="known")
    with pytest.raises(ValueError, match="expected text or image"):
        wrap(encoder()).encode([{"audio": [0]}])
