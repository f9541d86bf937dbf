"""The documentation tells the truth: every setting, variable and command is in it, with its default."""

import re

import typer.main
from conftest import ROOT
from pydantic import BaseModel

from rag_assets.cli import app
from rag_serving.settings import ModelSpec, Places, Settings, load_settings

CONFIGURATION = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")


def keys(model: type[BaseModel], prefix: str = ""):
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def test_every_setting_is_documented():
    """Each key of ragline.toml, each key of a model row and each RAGLINE_ variable stands in docs/configuration.md."""
    documented = set(re.findall(r"`([A-Za-z0-9_.]+)`", CONFIGURATION))
    suffixes = {key.rpartition(".")[2] for key in documented}
    wanted = [key for key in keys(Settings) if not key.startswith(("root", "places", "models"))]
    assert [key for key in wanted if key not in documented and key.rpartition(".")[2] not in suffixes] == []
    assert [name for name in ModelSpec.model_fields if name not in documented] == []
    assert [name for name in Places.model_fields if f"`RAGLINE_{name.upper()}`" not in CONFIGURATION] == []


def test_ragline_toml_states_the_defaults():
    """What each section of ragline.toml says equals the built-in defaults, so that it is a faithful start."""
    configured, defaults = load_settings(ROOT / "ragline.toml", environ={}), Settings(root=ROOT)
    for section in (
        "corpus",
        "eval",
        "parsing",
        "chunking",
        "index",
        "retrieval",
        "gate",
        "drift",
        "alerts",
        "serving",
        "encoder",
        "embedder",
        "access",
        "admission",
        "canary",
        "telemetry",
        "rerank",
    ):
        assert getattr(configured, section) == getattr(defaults, section), section


def test_every_command_of_the_readme_exists():
    """The README's `ragline` commands are commands."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`ragline ([a-z]+)", readme)) | set(re.findall(r"^ragline ([a-z]+) .*#", readme, re.MULTILINE))
    assert named <= set(typer.main.get_command(app).commands)


def test_the_test_command_of_the_readme_is_what_ci_runs():
    """`.ci/run` calls the test line that the README gives."""
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert re.search(r"^make test\b", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
