"""Both trainers see the same pairs, start from the same weights and take the same steps."""

import torch

from tests.benchmarks import beside_open_clip


def test_trainers_take_the_same_steps(scenes, tmp_path, monkeypatch):
    architecture = tmp_path / "tiny.json"
    architecture.write_text(
        '{"embed_dim": 16, '
        '"vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, '
        '"head_width": 16}, "text_cfg": {"context_length": 28, "vocab_size": 49408, "width": 32, '
        '"heads": 2, "layers": 1}}'
    )
    recipe = tmp_path / "recipe.yaml"
    text = beside_open_clip.RECIPE.read_text()
    for value, small in {
        "duration: 240": "duration: 8",
        "128": "32",
        "warmup: 10": "warmup: 2",
    }.items():
        assert value in text
        text = text.replace(value, small)
    recipe.write_text(text)
    monkeypatch.setattr(beside_open_clip, "RECIPE", recipe)
    monkeypatch.setattr(beside_open_clip, "ARCHITECTURE", architecture)
    (tmp_path / "scenes").symlink_to(scenes)

    beside_open_clip.prepare(tmp_path, [3], 8)
    n_lines = len(beside_open_clip.order_of(tmp_path, 3, 8).read_text().splitlines())
    assert n_lines == 1 + 8 * 32

    theirs = beside_open_clip.run(beside_open_clip.part_of("open_clip", 3, 8), tmp_path / "theirs")
    ours = beside_open_clip.run(beside_open_clip.part_of("vlp", 3, 8), tmp_path / "ours")
    assert len(theirs["losses"]) == len(ours["losses"]) == 8
    # open_clip logs five digits; an order of its own would differ in the second.
    assert torch.allclose(torch.tensor(theirs["losses"]), torch.tensor(ours["losses"]), atol=1e-3)
