"""The story that ragline is for: an embedding model is swapped behind its name, and nothing is promoted until a person has looked."""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, environment, facts
from generated_corpus import write_corpus
from live_platform import platform, until

from rag_assets.postgres import export, postgres
from rag_serving.releases import Ledger
from rag_serving.settings import load_settings
from rag_serving.store import LocalStore

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

NUMBERS = re.compile(r"drift\\?_holds sensor.*mean cosine 0\.\d{3}", re.DOTALL)
CONFIG = """
default_models = ["encoder", "better"]

[corpus]
source = "beir:beir"

[eval]
source = "beir:beir"

[retrieval.weights]
dense_title = 0.0
bm25_title = 0.0

[gate]
min_queries = 100
warm_up_p95_ms = 5000.0

[[models]]
name = "encoder"
source = "hashing:128"
dims = 128
max_tokens = 256  # encoder

[[models]]
name = "better"
source = "hashing:256"
dims = 256
max_tokens = 256
"""


def make_checkout(root: Path) -> Path:
    """A folder that `ragline` runs in: configuration, Dagster instance and a corpus with its eval set."""
    (root / "dagster_home").mkdir(parents=True)
    shutil.copy(ROOT / "dagster_home" / "dagster.yaml", root / "dagster_home")
    (root / "ragline.toml").write_text(CONFIG, encoding="utf-8")
    write_corpus(root / "beir", queries=160)
    return root


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> dict[str, dict[str, Any]]:
    """The scenes of `story.py`, by name, acted out once."""
    root = make_checkout(tmp_path_factory.mktemp("story") / "checkout")
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "e2e" / "story.py")],
        cwd=root,
        env=environment(root / ".ragline"),
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {facts["scene"]: facts for facts in map(json.loads, done.stdout.splitlines())}


def test_the_champion_is_released_and_a_quiet_week_holds_nothing(scenes):
    """The first model passes every gate and goes live; a weekly run that finds nothing places no hold, and the UI shows the release."""
    first = scenes["released"]
    assert (first["built"], first["promoted"]) == ("", "")
    assert first["champion"].startswith("encoder-")
    assert (first["shown"]["champion"], first["shown"]["no_hold"]) == (first["champion"], "SUCCEEDED")
    assert scenes["a quiet week"]["holds"] == 0


def test_the_swap_is_found_and_held_with_its_numbers(scenes):
    """The weaker model behind the same name misses the floor, the weekly job finds it, and the sensor's hold says how far it is off."""
    swapped = scenes["swapped"]
    assert "mrr_floor" in swapped["rebuilt"]
    assert swapped["better_built"] == ""
    assert "vectors_as_stored" in swapped["week"]
    assert re.search(r"fingerprint \w+ now.* mean cosine 0\.\d{3}", swapped["said"]["drift_holds"])
    assert (swapped["shown"]["held"], swapped["shown"]["no_hold"]) == (1, "FAILED")
    assert "sensor" in swapped["shown"]["holds"]
    assert re.search(r"mean cosine 0\.\d{3}", swapped["shown"]["holds"])


def test_the_same_finding_is_held_once(scenes):
    """Sensors ticked again, without their cursors, place no second hold."""
    assert (scenes["ticked again"]["before"], scenes["ticked again"]["holds"]) == (1, 1)


@pytest.mark.parametrize("way", ["by_job", "by_command", "by_api"])
def test_promotion_is_refused_each_way_with_the_numbers(scenes, way):
    """The UI's job, the command line and the API refuse a snapshot that passed its gate, say who holds and why, and write nothing."""
    refused = scenes["refused"]
    said = refused[way]["said"] if way == "by_command" else refused[way]
    assert re.search(r"a hold blocks every promotion: entry 2 by drift_holds sensor.*mean cosine 0\.\d{3}", said)
    assert refused["by_command"]["code"] == 1
    assert len(refused["by_command"]["said"].splitlines()) == 1
    assert refused["new_entries"] == 0


def test_fixed_and_lifted_the_better_snapshot_is_promoted(scenes):
    """With the row restored the weekly run is clean, a lift needs its reason, no sensor holds again, and the better snapshot goes live."""
    fixed, promoted = scenes["fixed"], scenes["promoted"]
    assert fixed["week"] == ""
    assert fixed["lifted"]["facts"]["entry"]["reason"] == "the row of encoder is restored"
    assert fixed["holds"] == 0
    assert promoted["failure"] == ""
    assert promoted["champion"].startswith("better-")
    assert (promoted["shown"]["champion"], promoted["shown"]["no_hold"]) == (promoted["champion"], "SUCCEEDED")


def test_the_rollback_is_drilled_and_done_in_seconds(scenes):
    """The drill restores the earlier snapshot in under 30 s with the answers that were measured; the rollback itself takes under 2 s."""
    last = scenes["rolled back"]
    assert last["drilled"] == ""
    drill, back = last["drill"], last["back"]["facts"]
    print(f"drill {drill['seconds']:.2f} s for {drill['probes']} probes, rollback {back['seconds']} s")
    assert drill["seconds"] < 30
    assert (drill["compared"], drill["agreement"]) == (50, 1.0)
    assert back["seconds"] < 2
    assert last["champion"] == scenes["released"]["champion"]
    assert last["shown"]["champion"] == last["champion"]


@pytest.mark.heavy
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")  # in the models of MLflow
def test_the_story_with_a_running_daemon_and_webserver(tmp_path, ragline):
    """The same with a daemon that ticks and a webserver whose buttons are pressed: held, refused from the UI, lifted, promoted, rolled back."""
    root = make_checkout(tmp_path / "checkout")
    shutil.copy(ROOT / "workspace.yaml", root)
    config, home = root / "ragline.toml", root / ".ragline"
    settings = load_settings(config, environ={"RAGLINE_HOME": str(home)})
    ledger = Ledger(LocalStore(settings.store_dir))
    with postgres(settings) as databases:
        variables = {**export(databases), "RAGLINE_CONFIG": str(config)}
        with platform(root, environment(home, **variables)) as dagster:
            assert dagster.run("build_and_evaluate", model="encoder") == ""
            assert dagster.run("promote") == ""
            config.write_text(CONFIG.replace("max_tokens = 256  # encoder", "max_tokens = 10  # encoder"), encoding="utf-8")
            assert dagster.run("build_and_evaluate", model="better") == ""
            assert "vectors_as_stored" in dagster.run("weekly_drift")
            started = time.monotonic()
            (hold,) = until(lambda: ledger.state().holds, seconds=180, what="the hold")
            print(f"held {time.monotonic() - started:.0f} s after the weekly run: {hold.reason}")
            until(lambda: NUMBERS.search(str(dagster.shown("release_ledger").get("holds"))), seconds=180, what="the hold in the UI")

            assert NUMBERS.search(dagster.run("promote"))
            refused = ragline(home, "promote", "better", **variables)
            assert refused.returncode == 1
            assert NUMBERS.search(refused.stderr)

            config.write_text(CONFIG, encoding="utf-8")
            facts(ragline(home, "lift", "--reason", "the row is restored", "--json", **variables))
            assert dagster.run("weekly_drift") == ""
            assert dagster.run("promote") == ""
            assert ledger.state().champion.snapshot_id.startswith("better-")
            assert dagster.run("drill") == ""
            back = facts(ragline(home, "rollback", "--json", **variables))
            print(f"rollback took {back['seconds']} s")
            assert back["seconds"] < 2
            assert [entry.action for entry in ledger.entries()] == ["promote", "hold", "lift", "promote", "rollback"]
