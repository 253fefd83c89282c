"""Secrets stay in the process: what is hidden, what is left alone, and how a run goes on that wrote
none of them down.
"""

import pytest
import yaml

from vlp import config, privacy, schema
from vlp.resume import changes

HIDDEN = [
    "cannot fetch https://anna:PLANTED@host/x/a.tar"
    "?X-Amz-Credential=AKIA/2026&X-Amz-Signature=PLANTED (4 tries): no",
    "https://anna:a@PLANTED@host/a.tar",
    "https://host/a.tar?PLANTED::https://host/b.tar?sig=PLANTED&download=true",
    "az://container/a.tar?sv=2026&sig=PLANTED",
    "pipe:curl -u anna:PLANTED -H 'Authorization: Bearer PLANTED' https://host/a.tar#PLANTED",
    "override 'data.sources.0.storage.secret=PLANTED' "
    "leads through something that is not a mapping",
    "found {'X-Api-Key': 'PLANTED-0123456', 'token': 'PLANTED-0123456'}, expected text",
    "Authorization: Basic PLANTED0123=",
    "the variable holds value-of-PLANTED-variable",
    "the configuration's own is learned-PLANTED",
    "hf_PLANTED0123456789",
    "ya29.PLANTED0123456789",
    "bad connection: AccountName=me;AccountKey=PLANTED/0123+4==;EndpointSuffix=core.windows.net",
    "BlobEndpoint=https://me.host/x;SharedAccessSignature=sv=2026&sig=PLANTED%2B0123%3D",
    "the token sv=2026&ss=b&sig=PLANTED%2B0123%3D&se=2027 has ended",
]
LEFT_ALONE = [
    "https://host/a.tar?download=true and s3://bucket/000??.tar::file:///data/{0..9}.tar",
    "log in with `hf auth login` or set HF_TOKEN to a token that may write there",
    "TextSpec(tokenizer='clip', strip_sep_token=True, max_tokens=77), "
    "a basic transform, key=value, token: hf auth login",
    "user/name, hf-hub:user/name, ViT-B-32:laion2b_s34b_b79k, "
    "/home/anna/data, a key: the first column",
]


@pytest.fixture(autouse=True)
def learned(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "value-of-PLANTED-variable")
    monkeypatch.setattr(privacy, "_remembered", set())
    privacy.remember({"storage": {"profile": "default", "secret": "learned-PLANTED"}})


def test_messages_hide_secrets_and_nothing_else():
    left = [
        text
        for text in HIDDEN
        if "PLANTED" in privacy.scrubbed(text) or "PLANTED" in privacy.private(text)
    ]
    assert not left and len(HIDDEN) == 15
    assert [privacy.scrubbed(text) for text in LEFT_ALONE] == LEFT_ALONE
    assert privacy.scrubbed(privacy.scrubbed(HIDDEN[2])) == privacy.scrubbed(HIDDEN[2])


@pytest.mark.parametrize("place", ["environment", "storage"])
def test_the_key_in_a_connection_string_is_a_secret_of_its_own(place, monkeypatch):
    key = "PLANTED/0123+4567=="
    whole = f"AccountName=me;AccountKey={key};EndpointSuffix=core.windows.net"
    assert privacy.scrubbed(f"refused: {key}") == f"refused: {key}"
    if place == "environment":
        monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", whole)
    else:
        privacy.remember({"connection_string": whole}, "storage")
    assert privacy.scrubbed(f"refused: {key}") == "refused: ***"
    assert "PLANTED" not in privacy.scrubbed(f"with {whole}")


TREE = {
    "path": "https://anna:PLANTED@host/{0..3}.tar?sig=PLANTED",
    "weight": 1,
    "storage": {
        "anon": False,
        "retries": 5,
        "password": 123456,
        "profile": "default",
        "client_kwargs": {"headers": {"X-Mine": "PLANTED"}},
    },
    "api_token": "PLANTED",
    "strip_sep_token": True,
    "max_tokens": 77,
    "key": "",
}


def test_configurations_keep_their_form():
    kept = privacy.without_secrets(TREE)
    assert kept["storage"] == {
        "anon": False,
        "retries": 5,
        "password": "***",
        "profile": "***",
        "client_kwargs": {"headers": {"X-Mine": "***"}},
    }
    assert kept["path"] == "https://host/{0..3}.tar?***" and kept["api_token"] == "***"
    assert [kept[name] for name in ("weight", "strip_sep_token", "max_tokens", "key")] == [
        1,
        True,
        77,
        "",
    ]
    hidden = [
        "path",
        "storage.password",
        "storage.profile",
        "storage.client_kwargs.headers.X-Mine",
        "api_token",
    ]
    assert list(privacy.hidden_keys(kept)) == hidden
    assert not list(privacy.hidden_keys({"template": "a *** photo of {}"}))
    assert privacy.shareable(TREE) == {
        "path": "https://host/{0..3}.tar",
        "weight": 1,
        "strip_sep_token": True,
        "max_tokens": 77,
        "key": "",
    }


def test_one_file_has_one_address():
    signed = [
        f"https://{user}host/x/a.tar?X-Amz-Date=1&X-Amz-Signature={s}"
        for user, s in (("", "a/b"), ("anna:pw@", "c"))
    ]
    assert {privacy.address(url) for url in signed} == {"https://host/x/a.tar"}
    assert privacy.address("https://host/a.tar?versionId=3") == "https://host/a.tar?versionId=3"


def test_shipped_configurations_have_no_secrets():
    files = config.shipped()
    for path in files.values():
        loaded = config.load(path)
        assert config.shown(loaded) == schema.plain(loaded), path
    assert len(files) >= 19


@pytest.fixture
def written(tmp_path):
    """A configuration with secrets, and what a run writes down of it."""
    path, kept = tmp_path / "mine.yaml", tmp_path / "config.yaml"
    tree = yaml.safe_load(config.find("demo").read_text())
    source = {
        "name": "remote",
        "path": "https://host/0.tar?sig=PLANTED",
        "storage": {"headers": {"X": "PLANTED"}},
    }
    tree["data"]["sources"] = [source]
    path.write_text(yaml.safe_dump(tree))
    kept.write_text(config.dump(config.load(path)))
    return path, kept


def test_a_run_goes_on_where_its_secrets_are_given_again(written):
    path, kept = written
    assert "PLANTED" not in kept.read_text()
    assert changes(config.recorded(kept), config.load(path)) == {}
    with pytest.raises(
        config.ConfigError,
        match=r"leaves out secrets.*sources\.0\.path=… data\.sources\.0\.storage\.headers\.X=…",
    ):
        config.load(kept)
    again = [
        "data.sources.0.path=https://host/0.tar?sig=NEW",
        "data.sources.0.storage.headers.X=NEW",
    ]
    loaded = config.load(kept, again)
    assert loaded.data.sources[0].options.storage == {"headers": {"X": "NEW"}}
    assert changes(config.recorded(kept), loaded) == {}  # a new signature is no other setting
