"""Any folder in: mixed and hostile files through the line, good ones found again, bad ones quarantined by name and reason."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, command, environment, facts
from mixed_files import GOOD_SUFFIXES, good_file, hostile_files, hostile_links

from rag_assets import steps
from rag_assets.corpus import read_table
from rag_assets.sources import open_source
from rag_assets.workbench import Workbench
from rag_serving.settings import ModelSpec, load_settings
from rag_serving.store import LocalStore

SPEC = ModelSpec(name="hashing-64", source="hashing:64", dims=64, max_tokens=256)


def fill(folder: Path, *, good: int, hostile: int) -> tuple[set[str], dict[str, str]]:
    """`good` files of all formats in nested folders, and `hostile` ones among them: names of the good, uri -> reasons of the bad."""
    names = set()
    for number in range(good):
        suffix = GOOD_SUFFIXES[number % len(GOOD_SUFFIXES)]
        name = f"part{number % 7}/sub{number % 3}/file{number}{suffix}"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(
            good_file(suffix, f"Title of {number}", f"pebble{number} and quartz & more words about topic{number % 50}")
        )
        names.add(name)
    links = hostile_links(folder, folder.parent / "secret.md")
    bad = dict(list(links.items())[:hostile])
    for name in set(links) - set(bad):
        (folder / name).unlink()
    files = sorted(hostile_files().items())
    step = max(1, len(files) // max(1, hostile - len(bad)))
    for place, (name, (data, reasons)) in enumerate(files[::step] if hostile < 60 else files):
        uri = f"part{place % 7}/{name}"
        (folder / uri).parent.mkdir(parents=True, exist_ok=True)
        (folder / uri).write_bytes(data)
        bad[uri] = reasons
    return names, bad


def check(store: LocalStore, good: set[str], bad: dict[str, str]) -> Counter[str]:
    """Every good file is a document that holds its own word, every bad one is quarantined for its reason; how many for which."""
    documents, refused = (read_table(store, name)[1].to_pylist() for name in ("documents", "quarantine"))
    assert {row["doc_id"] for row in documents} == good
    for row in documents:
        number = re.search(r"(\d+)\.\w+$", row["doc_id"])[1]
        assert re.search(rf"pebble{number}\b", row["text"])
    found = {row["item"]: row["reason"] for row in refused}
    assert {uri: reason for uri, reason in found.items() if uri not in bad or reason not in bad[uri].split("|")} == {}
    assert set(found) == set(bad)
    assert all(row["detail"] for row in refused)
    return Counter(found.values())


def test_a_mixed_folder_becomes_a_snapshot(tmp_path):
    """44 good files of all formats and a sample of the hostile ones: a snapshot of the good, a quarantine of the bad, answers from it."""
    folder = tmp_path / "docs"
    folder.mkdir()
    good, bad = fill(folder, good=44, hostile=20)
    settings = load_settings(ROOT / "ragline.toml", environ={"RAGLINE_CORPUS": f"folder:{folder}"})
    settings = settings.model_copy(update={"models": (SPEC,), "default_models": (SPEC.name,)})
    bench = Workbench(settings, store=LocalStore(tmp_path / "store"))
    steps.ingest_corpus(bench)
    print(check(bench.store, good, bad))
    manifest = steps.snapshot_corpus(bench, SPEC.name).manifest
    assert manifest.documents == len(good)
    from rag_assets.demo import search_snapshot

    _, hits = search_snapshot(bench, "pebble17 quartz", k=3, named=SPEC.name)
    assert hits[0].doc_id.endswith("/file17" + GOOD_SUFFIXES[17 % len(GOOD_SUFFIXES)])


@pytest.fixture
def hashed(tmp_path: Path) -> dict[str, str]:
    """The variables of a line with the hashed model in a configuration of its own."""
    model = 'name = "hashing-64"\nsource = "hashing:64"\ndims = 64\nmax_tokens = 256\n'
    (tmp_path / "ragline.toml").write_text(f'default_models = ["hashing-64"]\n[[models]]\n{model}', encoding="utf-8")
    (tmp_path / "dagster_home").mkdir()
    (tmp_path / "dagster_home" / "dagster.yaml").write_bytes((ROOT / "dagster_home" / "dagster.yaml").read_bytes())
    return {"RAGLINE_CONFIG": str(tmp_path / "ragline.toml")}


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_our_own_docs_are_built_and_asked_without_an_eval_set(ragline, tmp_path, hashed):
    """`ragline run --source DOCS` without an eval set builds a snapshot, releases nothing and says what to do; it can be asked at once.

    Only an override makes it the first release.
    """
    home = tmp_path / "home"
    done = ragline(home, "run", "--source", str(ROOT / "docs"), **hashed)
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    assert "There is no eval set for" in said
    assert "docs/evalsets.md" in said
    assert 'ragline search --snapshot hashing-64 "a question"' in said
    found = facts(
        ragline(home, "search", "--snapshot", "hashing-64", "which setting is the largest item that is parsed", "--json", **hashed)
    )
    assert found["hits"][0]["doc_id"] in {"configuration.md", "sources.md"}
    assert facts(ragline(home, "status", "--json", **hashed))["release"] == 0
    refused = ragline(home, "promote", "hashing-64", **hashed)
    assert refused.returncode == 1
    facts(ragline(home, "promote", "hashing-64", "--override", "--reason", "own documents, no judgments yet", "--json", **hashed))
    assert facts(ragline(home, "status", "--json", **hashed))["release"] == 1


def recipes() -> dict[str, str]:
    """The Python snippets of docs/sources.md by the heading they stand under."""
    text = (ROOT / "docs" / "sources.md").read_text(encoding="utf-8")
    return dict(re.findall(r"^### ([^\n]+)\n(?:(?!^#).)*?^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))


def test_the_recipe_of_a_dagster_asset_feeds_ragline(tmp_path, monkeypatch):
    """The snippet of docs/sources.md runs as it stands: its asset writes JSON Lines, and `jsonl:` reads the rows as documents."""
    import dagster as dg

    monkeypatch.chdir(tmp_path)
    snippet = recipes()["A Dagster asset"]
    assert len(snippet.strip().splitlines()) <= 14
    scope: dict[str, object] = {}
    exec(compile(snippet, "docs/sources.md", "exec"), scope)  # noqa: S102 - the promise is that this very text runs
    (asset,) = [each for each in scope.values() if isinstance(each, dg.AssetsDefinition)]
    assert dg.materialize([asset]).success
    items = list(open_source("jsonl:tickets.jsonl", root=tmp_path).items())
    assert [json.loads(item.read())["title"] for item in items] == ["Printer is on fire", "Password forgotten"]


def sampled(arguments: list[str], home: Path, variables: dict[str, str]) -> tuple[subprocess.CompletedProcess[str], float, float]:
    """Run a command; its result, seconds, and the peak of the memory of it and its parser process together, in MiB."""
    process = subprocess.Popen(
        command(*arguments),
        cwd=ROOT,
        env=environment(home, **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    peak = 0

    def watch() -> None:
        nonlocal peak
        own = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                parsers = [each for each in own.children() if "rag_assets.parser_process" in each.cmdline()]
                peak = max(peak, sum(each.memory_info().rss for each in [own, *parsers]))
            except psutil.Error:
                pass
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    started = time.perf_counter()
    watcher.start()
    out, err = process.communicate(timeout=1500)
    watcher.join()
    return subprocess.CompletedProcess(arguments, process.returncode, out, err), time.perf_counter() - started, peak / 2**20


@pytest.mark.heavy
@pytest.mark.timeout(1800)
def test_two_thousand_mixed_files_with_sixty_hostile_ones(tmp_path, hashed):
    """The whole line over 2,000 files of all formats, 60 hostile: all good ones in, all bad ones named, at most 1 GiB above an empty run."""
    small, folder = tmp_path / "small", tmp_path / "docs"
    small.mkdir()
    folder.mkdir()
    (small / "one.md").write_text("# One\n\nonly a few words", encoding="utf-8")
    good, bad = fill(folder, good=1940, hostile=60)
    if sys.platform != "darwin":
        (folder / os.fsdecode(b"caf\xe9.md")).write_text("# bad name")
        bad["caf\\xe9.md"] = "name_not_utf8"
    assert len(bad) >= 59
    _, _, base = sampled(["run", "--source", str(small), "--json"], tmp_path / "home1", hashed)
    done, seconds, peak = sampled(["run", "--source", str(folder), "--json"], tmp_path / "home2", hashed)
    assert done.returncode == 0, done.stderr
    reasons = check(LocalStore(tmp_path / "home2" / "store"), good, bad)
    again, again_seconds, _ = sampled(["run", "--source", str(folder), "--json"], tmp_path / "home2", hashed)
    print(
        f"{len(good)} good and {len(bad)} hostile files: {seconds:.0f} s, again {again_seconds:.0f} s; peak {peak:.0f} MiB,"
        f" {peak - base:.0f} above a run on one file; {dict(reasons.most_common())}"
    )
    assert json.loads(again.stdout)["embedded"] == 0
    assert peak - base <= 1024
