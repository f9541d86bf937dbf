"""The documentation tells the truth: every setting, variable and command is in it, with its default."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main
from conftest import ROOT
from pydantic import BaseModel

from rag_assets.cli import app
from rag_serving.settings import ModelSpec, Places, Settings, load_settings

CONFIGURATION = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\((?!https?:)([^)\s]*)\)")


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
    for section in Settings.model_fields.keys() - {"root", "places", "models", "default_models"}:
        assert getattr(configured, section) == getattr(defaults, section), section


def commands_of(page: Path) -> Iterator[str]:
    """What follows `ragline` in the shell blocks of a page, which name sh, console or nothing, and in its text between backquotes."""
    kind = None
    for line in page.read_text(encoding="utf-8").replace("\\\n", " ").splitlines():
        if line.startswith("```"):
            kind = line.strip("` ") if kind is None else None
        elif kind in {"", "sh", "console"}:
            yield from re.findall(r"(?:^|[ (])ragline ([a-z].*?)(?: #|\)|$)", line)
        elif kind is None:
            yield from re.findall(r"`ragline ([a-z][^`]*)`", line)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_on_a_page_exists(page):
    """Each `ragline` command line of a page names commands and options that are there."""
    for line in commands_of(page):
        words = [word.strip("[]()") for word in line.split()]
        command = typer.main.get_command(app)
        while words and words[0] in getattr(command, "commands", {}):
            command = command.commands[words.pop(0)]
        assert not hasattr(command, "commands") or words in ([], ["…"]), line
        options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        assert {word.partition("=")[0] for word in words if word.startswith("--")} <= options, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_make_target_on_a_page_exists(page):
    """Each `make TARGET` of a page is a target of the Makefile."""
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)\s*make ([a-z]+)", page.read_text(encoding="utf-8"), re.MULTILINE)) <= targets


def anchors(page: Path) -> set[str]:
    """The names by which the headings of a page are linked to."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    """Each relative link of a page leads to a file of the checkout, and to a heading where it names one."""
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_and_picture_is_linked():
    """Each page of docs/ stands in the table of the README, and each picture of docs/images on some page."""
    table = set(LINK.findall(README.partition("## Documentation")[2]))
    assert {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")} - table == set()
    shown = {(page.parent / link).resolve() for page in PAGES for link in LINK.findall(page.read_text(encoding="utf-8"))}
    assert {picture.name for picture in (ROOT / "docs" / "images").iterdir() if picture.resolve() not in shown} == set()


def test_the_test_command_of_the_readme_is_what_ci_runs():
    """`.ci/run` calls the test line that the README gives."""
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert re.search(r"^make test\b", README, re.MULTILINE)
