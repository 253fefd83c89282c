"""A language model as the text tower: what a caption becomes, what its tokens see, and where it is
read.
"""

import pytest
import torch

from tests.models.languages import FAMILIES, language_model
from tests.models.tiny import WORDS, inputs, tiny, tokenizer
from tests.models.tiny import language_model as bert
from vlp.data import text as tokenizers
from vlp.data.prompted import PADDING, unmarked
from vlp.models.build import from_description
from vlp.models.language import LatentAttention
from vlp.models.recomputing import recompute_activations

TEXTS = ["a photo of two red circles", "dog", "a blue square", "red dog red cat red dog"]
PROMPT = "photo of {} two words"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each family, made once."""
    made = {}
    for family in FAMILIES:
        made[family] = language_model(tmp_path_factory.mktemp(family), family)
    return made


def tower(folder, **options):
    """A model with such a text tower, in evaluation mode."""
    options = {"name": "llm", "model": str(folder), "context_length": 16} | options
    return tiny(text_tower=options)


def ids_of(model, texts):
    return tokenizers.build(model.text_spec)(texts)


def left_padded(ids):
    """The same rows with their padding before the tokens."""
    rows = [torch.cat([row[row == PADDING], row[row != PADDING]]) for row in ids]
    return torch.stack(rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_single_cut_and_either_padding_give_one_embedding(folders, family):
    n_compared = 0
    for pool in ("last", "mean", "eos", "latent"):
        for attention in ("causal", "bidirectional"):
            model = tower(
                folders[family], pool=pool, attention=attention, prompt=PROMPT, latents=6, heads=2
            )
            ids = ids_of(model, TEXTS)
            with torch.no_grad():
                together = model.encode_text(ids)
                alone = torch.cat([model.encode_text(row[None, row != PADDING]) for row in ids])
                padded_left = model.encode_text(left_padded(ids))
                cut = model.cut(ids.repeat(8, 1).numpy(), ids.device, 32)
                in_parts = model(text=ids.repeat(8, 1), cut=cut).text[:4]
            assert len(cut.parts) > 1
            for other in (alone, padded_left, in_parts):
                torch.testing.assert_close(other, together, rtol=0, atol=2e-5)
                n_compared += 1
    assert n_compared == 24


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_token_sees_the_last_only_bidirectionally(folders, family):
    changes = {}
    for attention in ("causal", "bidirectional"):
        trunk = tower(folders[family], attention=attention).text
        tokens = torch.tensor([[3, 4, 5, 6], [3, 4, 5, 9]])
        with torch.no_grad():
            hidden = trunk._hidden(tokens, torch.ones_like(tokens, dtype=torch.bool))
        changes[attention] = (hidden[0, 0] - hidden[1, 0]).abs().max().item()
    assert changes["causal"] < 1e-5 and changes["bidirectional"] > 1e-3


def test_transformers_itself_gives_the_last_token(folders):
    """The published way: one text, no mask, the last hidden state."""
    from transformers import AutoModel, AutoTokenizer

    n_compared = 0
    for folder in folders.values():
        model = tower(folder, prompt=PROMPT)
        theirs, words = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        for text in TEXTS:
            tokens = words(PROMPT.format(text), return_tensors="pt").input_ids
            with torch.no_grad():
                expected = theirs(tokens).last_hidden_state[0, -1]
                pooled = model.text.pooled(ids_of(model, [text]))[0]
            torch.testing.assert_close(pooled, expected, rtol=1e-5, atol=1e-5)
            n_compared += 1
    assert n_compared == 20


def test_the_mean_is_of_the_captions_tokens(folders):
    model = tower(folders["llama"], pool="mean", prompt=PROMPT)
    ids = ids_of(model, TEXTS)
    tokens, is_token, is_read = unmarked(ids)
    with torch.no_grad():
        hidden = model.text._hidden(tokens, is_token)
        pooled = model.text.pooled(ids)
    for row, text in enumerate(TEXTS):
        n_words = len(text.split())
        places = slice(2, 2 + n_words)  # behind "photo of"
        assert is_read[row].nonzero().flatten().tolist() == list(range(2, 2 + n_words))
        torch.testing.assert_close(pooled[row], hidden[row, places].mean(dim=0))


def test_latent_attention_is_its_formula():
    """Against a loop over tokens and heads, on an odd size."""
    torch.manual_seed(0)
    layer, hidden = LatentAttention(6, 5, 3), torch.randn(2, 4, 6)
    keys, values = layer.key_value(layer.latent_norm(layer.latents)).chunk(2, dim=-1)
    query = layer.query(layer.norm(hidden))
    for row in range(2):
        for place in range(4):
            parts = []
            for head in range(3):
                part = slice(2 * head, 2 * head + 2)
                scores = keys[:, part] @ query[row, place, part] / 2**0.5
                parts.append(scores.softmax(dim=0) @ values[:, part])
            passed = hidden[row, place] + layer.out(torch.cat(parts))
            expected = passed + layer.mlp(passed)
            torch.testing.assert_close(layer(hidden)[row, place], expected)


def test_a_long_caption_loses_words_and_not_the_prompt(folders):
    for pool, n_end in (("last", 1), ("eos", 1)):  # the tokenizer closes each text itself
        model = tower(folders["llama"], pool=pool, prompt=PROMPT, context_length=8)
        tokenizer = tokenizers.build(model.text_spec)
        ids, n_truncated = tokenizer.tokenize(["red dog", "a blue cat of two red dog", ""])
        assert n_truncated == 1 and ids.shape == (3, 8)
        first, cut, empty = (row[row != PADDING].tolist() for row in ids)
        assert first == [4, 5, 6, 12, 8, 2, 1] and len(cut) == 8
        assert cut == [4, 5, 3, 7, 13, 8, 2, 1] and empty == [4, 5, 8, 2, n_end]


def test_a_special_token_in_a_caption_is_spelled_out(folders):
    model = tower(folders["llama"], pool="eos")
    ids = ids_of(model, ["a </s> dog", "a dog"])
    assert (ids == 1).sum(dim=1).tolist() == [1, 1]
    assert (ids[0] != PADDING).sum() > (ids[1] != PADDING).sum()


def test_every_weight_trains_and_a_lock_keeps_the_language_model(folders):
    adaptor = {"layers": 2, "width": 48}
    n_models = 0
    for family in FAMILIES:
        for pool in ("last", "latent"):
            model = tower(folders[family], pool=pool, adaptor=adaptor, latents=4, heads=2).train()
            features = model(*inputs(model))
            (features.scale * (features.image * features.text).sum()).backward()
            assert [name for name, p in model.named_parameters() if p.grad is None] == []
            n_blocks = sum("AdaptorBlock" in type(block).__name__ for block in model.blocks())
            assert len(model.blocks()) == 2 + 2 + n_blocks and n_blocks == 2
            n_models += 1
    assert n_models == 10

    locked = tower(folders["gpt2"], locked=True, adaptor=adaptor).train()
    learning = {name.split(".")[1] for name, p in locked.text.named_parameters() if p.requires_grad}
    kept = [p.requires_grad for p in locked.text.transformer.parameters()]
    assert not any(kept) and not locked.text.transformer.training and learning


def test_recomputed_activations_give_the_same_gradients(folders):
    gradients = []
    for recomputed in (False, True):
        model = tower(folders["qwen3"]).train()
        recompute_activations(model, recomputed)
        features = model(*inputs(model))
        (features.image * features.text).sum().backward()
        gradients.append([p.grad for p in model.text.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain)


def test_the_weights_are_those_of_the_folder(folders):
    from transformers import AutoModel

    model, random = tower(folders["gpt2"]), tower(folders["gpt2"], pretrained=False)
    for name, value in AutoModel.from_pretrained(folders["gpt2"]).state_dict().items():
        assert torch.equal(model.text.transformer.state_dict()[name], value)
    assert not torch.equal(random.text.transformer.wte.weight, model.text.transformer.wte.weight)
    again = from_description(model.description())
    assert again.text.transformer.wte.weight.shape == model.text.transformer.wte.weight.shape


BAD = {
    "no place for the caption": ({"prompt": "a word"}, "expected one {} where the caption stands"),
    "two places": ({"prompt": "{} {}"}, "expected one {} where the caption stands"),
    "heads that do not divide": ({"pool": "latent", "heads": 5}, "heads 5 does not divide .*32"),
    "no such folder": ({"model": "/none/here"}, "no Hugging Face model configuration at"),
    "an adaptor of nothing": ({"adaptor": {"layers": 0}}, "layers 0 and width 2048"),
    "a stretched context": ({"context": {"length": 99}}, "has positions of its own"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_is_refused(folders, case):
    options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        tower(folders["llama"], **options)


def test_a_family_without_the_switch_is_refused(folders, tmp_path):
    """Its layers know no mask: state-space and convolution models see what came before alone."""
    from transformers import MambaConfig

    MambaConfig(vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=1).save_pretrained(
        tmp_path
    )
    tokenizer(tmp_path)
    tower(tmp_path, pretrained=False)
    with pytest.raises(ValueError, match="MambaModel can only be causal: set attention: causal"):
        tower(tmp_path, pretrained=False, attention="bidirectional")

    encoder = bert(tmp_path / "bert")
    tower(encoder, attention="bidirectional", pretrained=False)
    with pytest.raises(ValueError, match="can only be bidirectional: set attention: bidirectional"):
        tower(encoder, pretrained=False)


def test_an_incomplete_folder_is_refused(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    with pytest.raises(ValueError, match=r"no language model at .*bert"):
        tower(bert(tmp_path / "bert"), attention="bidirectional")  # a configuration alone

    broken = language_model(tmp_path / "broken")
    file = broken / "model.safetensors"
    weights = load_file(file)
    del weights["norm.weight"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lack norm\.weight"):
        tower(broken)

    with pytest.raises(ValueError, match="prompt alone takes 5 tokens of context_length 4"):
        ids_of(tower(folders["llama"], prompt=PROMPT, context_length=4), ["dog"])
