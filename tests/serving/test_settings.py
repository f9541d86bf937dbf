"""Settings: typos are named, values are checked, the environment says where."""

from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from rag_serving.errors import ConfigError
from rag_serving.settings import Places, Retrieval, Settings, load_settings

MODELS = '[[models]]\nname = "small"\nsource = "hashing:64"\ndims = 64\nmax_tokens = 64\n'


@pytest.fixture
def load(tmp_path):
    def loaded(text: str, **environ: str) -> Settings:
        config = tmp_path / "ragline.toml"
        config.write_text(text)
        return load_settings(config, environ=environ)

    return loaded


def test_repository_configuration_loads():
    """The ragline.toml of this repository is valid, and its default models are configured."""
    settings = load_settings(Path(__file__).parents[2] / "ragline.toml", environ={})
    assert settings.default_models
    assert all(settings.model(name).dims > 0 for name in settings.default_models)


@pytest.mark.parametrize(
    ("text", "key", "nearest"),
    [
        ("[gaet]\n", "gaet", "gate"),
        ("[gate]\nmrr_flor = 0.5\n", "gate.mrr_flor", "mrr_floor"),
        ("[retrieval.weights]\ndense_txt = 1\n", "retrieval.weights.dense_txt", "dense_text"),
        (MODELS.replace("source", "sorce"), "models.0.sorce", "source"),
    ],
)
def test_unknown_key_names_the_nearest(load, text, key, nearest):
    """A typo anywhere in the file is an error that names the key and the one that was meant."""
    with pytest.raises(ConfigError) as caught:
        load(text)
    assert repr(key) in caught.value.what
    assert caught.value.fix == f"Did you mean {nearest!r}?"


def test_internal_parts_are_not_keys(load):
    """`root` and `places` are set by ragline, never by the file."""
    for key in ("root", "places"):
        with pytest.raises(ConfigError, match=f"unknown key '{key}'"):
            load(f'{key} = "x"\n')


def test_unknown_variable_names_the_nearest(load):
    """A mistyped RAGLINE_ variable never silently means the default."""
    with pytest.raises(ConfigError, match=r"unknown variable RAGLINE_STROE\. Did you mean 'RAGLINE_STORE'\?"):
        load("", RAGLINE_STROE="x")
    assert load("", OTHER_STROE="x").places == Places()


@pytest.mark.parametrize(
    ("text", "environ", "key"),
    [
        ("[gate]\nmrr_floor = 1.5\n", {}, "gate.mrr_floor"),
        ("[gate]\nmrr_floor = nan\n", {}, "gate.mrr_floor"),
        ("[retrieval.weights]\nbm25_text = inf\n", {}, "retrieval.weights.bm25_text"),
        ("corpus = 3\n", {"RAGLINE_CORPUS": "sample:"}, "corpus"),
        (MODELS.replace("hashing:64", "elsewhere"), {}, "models.0.source"),
        (MODELS.replace('"small"', '"small\\n"'), {}, "models.0.name"),
        ("", {"RAGLINE_SERVING_PORT": "99999"}, "serving_port"),
    ],
)
def test_bad_value_is_named(load, text, environ, key):
    """A value out of range, of the wrong kind or not finite is refused with its key."""
    with pytest.raises(ConfigError, match=f"^{key!r} in "):
        load(text, **environ)


def test_broken_file_is_named(load, tmp_path):
    """A file that is not TOML, or is not there although it was named, is a ConfigError with its path."""
    with pytest.raises(ConfigError, match=r"ragline\.toml is not valid TOML"):
        load("gate = [")
    absent = tmp_path / "absent.toml"
    for arguments in ({"config": absent, "environ": {}}, {"environ": {"RAGLINE_CONFIG": str(absent)}}):
        with pytest.raises(ConfigError, match="no configuration file at"):
            load_settings(**arguments)


def test_absent_default_file_means_defaults(tmp_path, monkeypatch):
    """A serving machine without a file gets the defaults, without models."""
    monkeypatch.chdir(tmp_path)
    settings = load_settings(environ={})
    assert settings == Settings(root=tmp_path)
    assert settings.store_dir == tmp_path / ".ragline" / "store"


def test_models_are_checked(load):
    """Two models of one name, and a default model that is not configured, are refused; the nearest name is offered."""
    with pytest.raises(ConfigError, match="two models share a name"):
        load(MODELS + MODELS)
    with pytest.raises(ConfigError, match=r"no embedding model 'smal' .* Did you mean 'small'\?"):
        load('default_models = ["smal"]\n' + MODELS)


def test_environment_overrides_sources_only(load):
    """RAGLINE_CORPUS and RAGLINE_EVAL_SET replace the source and leave the rest of their section; an empty variable means unset."""
    settings = load(
        '[corpus]\nsource = "folder:a"\n[eval]\nsource = "beir:a"\nk = 7\n', RAGLINE_CORPUS="folder:b", RAGLINE_EVAL_SET="beir:b"
    )
    assert (settings.corpus.source, settings.eval.source, settings.eval.k) == ("folder:b", "beir:b", 7)
    assert load('[corpus]\nsource = "folder:a"\n', RAGLINE_CORPUS="").corpus.source == "folder:a"


def test_environment_names_hosts(load):
    """RAGLINE_ALLOWED_HOSTS replaces access.allowed_hosts with the names between its commas and leaves the rest of the section."""
    table = '[access]\nallowed_hosts = ["a"]\nrequests_per_minute = 7\n'
    settings = load(table, RAGLINE_ALLOWED_HOSTS="b.example, c,")
    assert (settings.access.allowed_hosts, settings.access.requests_per_minute) == (("b.example", "c"), 7)
    assert load(table).access.allowed_hosts == ("a",)


def test_places_are_relative_to_the_file(load, tmp_path):
    """Relative places start at the folder of ragline.toml, absolute ones stay, and a secret is not printed."""
    settings = load("", RAGLINE_HOME="state", RAGLINE_STORE="/elsewhere/store", RAGLINE_POSTGRES_URL="postgresql://u:hunter2@h/d")
    assert settings.home == tmp_path / "state"
    assert settings.store_dir == Path("/elsewhere/store")
    assert settings.models_dir == tmp_path / "state" / "models"
    assert "hunter2" not in repr(settings)


def test_everything_is_frozen(load):
    """No part of the settings can be changed after it was read."""

    def parts(value: BaseModel):
        yield value
        for name in type(value).model_fields:
            each = getattr(value, name)
            for inner in each if isinstance(each, tuple) else (each,):
                if isinstance(inner, BaseModel):
                    yield from parts(inner)

    found = list(parts(load(MODELS)))
    assert len(found) >= 11
    for part in found:
        name = next(iter(type(part).model_fields))
        with pytest.raises(ValidationError, match="frozen"):
            setattr(part, name, getattr(part, name))


def test_a_dense_scale_changes_dense_weights_alone():
    """A model's dense_scale multiplies what its cosines count for, and nothing else."""
    scaled = Retrieval().scaled(0.5)
    assert scaled.weights.dense_text == Retrieval().weights.dense_text / 2
    assert scaled.weights.dense_title == Retrieval().weights.dense_title / 2
    assert (scaled.weights.bm25_text, scaled.wording) == (Retrieval().weights.bm25_text, Retrieval().wording)
    assert Retrieval().scaled(1.0) == Retrieval()


def test_model_folders_are_relative_to_the_file(load, tmp_path, monkeypatch):
    """A relative path: source starts at the folder of ragline.toml wherever ragline runs; ~ is the home; other sources stay."""
    row = '[[models]]\nname = "{}"\nsource = "{}"\ndims = 64\nmax_tokens = 64\n'
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    sources = {"near": "path:models/a", "far": "path:/models/a", "mine": "path:~/a", "none": "hashing:64"}
    settings = load("".join(row.format(name, source) for name, source in sources.items()))
    assert [spec.source for spec in settings.models] == [f"path:{tmp_path}/models/a", "path:/models/a", "path:/home/me/a", "hashing:64"]
    with pytest.raises(ConfigError, match="model 'lost' has source 'path:~nobody-here/a'"):
        load(row.format("lost", "path:~nobody-here/a"))
