"""Runs for the report's tests, and a reader of its pages."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import torch

from tests.eval.material import OUR_CONFIG, our_model
from vlp import checkpoint, config

SECTIONS = [
    "summary",
    "curves",
    "scores",
    "space",
    "confusion",
    "retrieval",
    "ask",
    "examples",
    "configuration",
    "environment",
]


class Reader(HTMLParser):
    """Collects what the tests ask about, and checks that elements nest."""

    VOID = ("meta", "img", "input", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.sections, self.texts, self.resources = [], [], {}, [], []
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        self.resources += [
            attrs[k] for k in ("src", "href", "xlink:href", "srcset", "data") if k in attrs
        ]
        assert not any(name.startswith("on") for name in attrs), (tag, attrs)
        if tag == "section":
            self.sections[attrs["id"]] = ""
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.texts.append(data)
            if "section" in self.open:
                last = next(reversed(self.sections))
                self.sections[last] += f" {data}"

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.texts))

    def count(self, tag, **attrs):
        return sum(
            t == tag and all(a.get(k.rstrip("_")) == v for k, v in attrs.items())
            for t, a in self.tags
        )


def read(file):
    text = Path(file).read_text(encoding="utf-8")
    got = Reader(text)
    assert list(got.sections) == SECTIONS
    assert all(r.startswith(("#", "data:image/webp;base64,")) for r in got.resources), got.resources
    assert got.count("script") == got.count("style") == 1
    assert not re.search(r"@import|url\(|https?://", text)
    return got


def make_run(folder, data=None, steps=6, evals=(3, 6), checkpoints=True, **changes):
    """A run's folder as training leaves it, without the training: a random model and invented
    curves.
    """
    tree = {**OUR_CONFIG, "out": str(folder), "train": {"duration": 6, "batch": 4}, **changes}
    if data is not None:
        tree["eval"] = {
            "zeroshot": {"data": str(data / "zeroshot")},
            "retrieval": {"data": str(data / "retrieval")},
        }
    parsed = config.parse(tree)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config.dump(parsed))
    records = [
        {
            "step": s,
            "kind": "train",
            "loss": 3 / s,
            "infonce": 2 / s,
            "uniformity": 1 / s,
            "scale": 14.0 + s,
            "lr": 1e-3 / s,
            "grad_norm": 1.0,
            "samples_s": 100.0 + s,
            "data_wait": 0.01,
            "waited_s": 0.1,
            "bad_samples": 0,
        }
        for s in range(1, steps + 1)
    ]
    scores = {
        "zeroshot.acc1": 0.3,
        "retrieval.text_retrieval_recall@1": 0.2,
        "representation.modality_gap": 0.8,
    }
    records += [{"step": s, "kind": "eval", **scores} for s in evals if s <= steps]
    records.sort(key=lambda r: r["step"])
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    if evals and steps >= 6:
        record = {
            "label": "zeroshot",
            "dataset": "zeroshot",
            "metrics": {"acc1": 0.3},
            "chance": {"acc1": 0.02},
            "intervals_95": {"acc1": [0.2, 0.4]},
        }
        (folder / "results.json").write_text(json.dumps([record]))
    if checkpoints:
        model = our_model()
        state = {"step": steps, "loader": {"samples": 40}, "versions": {"torch": "9.9.9"}}
        contents = checkpoint.Contents(
            model.state_dict(),
            {"x": torch.ones(1)},
            {"x": torch.ones(1)},
            state,
            config.dump(parsed),
            model.description(),
        )
        checkpoint.save(folder, steps, contents, keep=2)
    return folder
