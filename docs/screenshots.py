"""The pictures in docs/images, taken from a running Dagster UI and the page of a running service: `make screenshots`, with Chromium installed.

A line on the small sample is acted out first, in a folder of its own: three weeks of tuning, measured and
released, then an embedding model that is swapped behind its name. With a folder as argument the acted line is kept there and used again.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlencode

import httpx2

if TYPE_CHECKING:
    from headless import Tab

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
WEEKS = ({"[retrieval]": '[retrieval]\nfusion = "rank"'}, {"pool = 30": "pool = 0"}, {})  # each against the ragline.toml of the checkout
CHAMPION = "all-MiniLM-L6-v2"
QUESTION = "How do I copy a snapshot to another region?"
WEAKER = ("max_tokens = 256", "max_tokens = 12")
sys.path[:0] = [str(ROOT / "tests" / folder) for folder in ("e2e", "browser", "")]


def prepare(folder: Path) -> None:
    """A checkout in small, and the variables that make it the place where everything here happens."""
    (folder / "dagster_home").mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "dagster_home" / "dagster.yaml", folder / "dagster_home")
    shutil.copy(ROOT / "workspace.yaml", folder)
    configure(folder, {})
    small = {"RAGLINE_CORPUS": "sample:small", "RAGLINE_EVAL_SET": "sample:small", "RAGLINE_MODELS_DIR": str(ROOT / ".ragline" / "models")}
    os.environ.update({"RAGLINE_HOME": str(folder / ".ragline"), "RAGLINE_ACTOR": "alice", **small})
    os.chdir(folder)


def configure(folder: Path, changes: dict[str, str]) -> None:
    text = (ROOT / "ragline.toml").read_text(encoding="utf-8").replace("warm_up_p95_ms = 10.0", "warm_up_p95_ms = 5000.0")
    for before, after in changes.items():
        text = text.replace('fusion = "score"\n', "", 1) if "fusion" in after else text
        text = text.replace(before, after, 1)
    (folder / "ragline.toml").write_text(text, encoding="utf-8")


def act(folder: Path) -> None:
    """Three weeks of building and measuring, a release a week, a quiet weekly run, and one with a swapped model."""
    import dagster as dg
    from story import Stage

    with dg.DagsterInstance.get() as instance:
        stage = Stage(instance)
        for changes in WEEKS:
            configure(folder, changes)
            for model in ("wordllama-256", CHAMPION):
                told(f"build_and_evaluate {model}", stage.run("build_and_evaluate", model=model))
            told("promote", stage.run("promote"))
            stage.tick()
        told("weekly_drift", stage.run("weekly_drift"))
        configure(folder, {WEAKER[0]: WEAKER[1]})
        told("weekly_drift", stage.run("weekly_drift"))
        told("drift_holds", stage.tick()["drift_holds"])
        told("promote", stage.run("promote"))
        stage.tick()


def told(what: str, failure: str) -> None:
    sys.stdout.write(f"{what}: {failure or 'done'}\n")
    sys.stdout.flush()


@contextmanager
def webserver() -> Iterator[str]:
    """The Dagster UI on a free port, over the definitions of this folder."""
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).parent / "dagster-webserver"), "--host", "127.0.0.1", "--port", str(port), "-w", "workspace.yaml"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=30) as client:
            deadline = time.monotonic() + 180
            while not answers(client):
                if time.monotonic() > deadline or process.poll() is not None:
                    raise SystemExit("dagster-webserver did not start")
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=30)


def answers(client: httpx2.Client) -> bool:
    try:
        return client.get("/server_info").is_success
    except httpx2.TransportError:
        return False


# name of the picture, page, a text that the complete page has, what is clicked then, height in pixels
PICTURES = (
    ("mrr-over-time", "/assets/model_leaderboard?view=overview", "quality_against_latency", "Plots", 1125),
    ("gate-failed", "/assets/quality_gate?view=checks&checkDetail=wordllama_256", "below the champion", "", 850),
    ("held", "/assets/release_ledger?view=overview", "held by", "", 876),
)
CLICK = "(text => [...document.querySelectorAll('button, a, span')].filter(each => each.innerText === text).at(-1).click())"


@contextmanager
def browser() -> Iterator["Tab"]:
    from headless import chromium

    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        raise SystemExit("needs a browser: apt-get install chromium")
    with tempfile.TemporaryDirectory() as profile, chromium(program, Path(profile)) as tab:
        yield tab


GRAPH = "/asset-groups?expanded=global@global:"
WIDE = """{
  [...document.querySelectorAll('button')].find(each => each.innerText === 'Hide navigation').click();
  let place = document.querySelector('input[placeholder^=Jump]');
  while (!place.parentElement.querySelector('button')) place = place.parentElement;
  place.parentElement.querySelector('button').click();
}"""


def draw(base: str, tab: "Tab") -> None:
    """The asset graph with the groups evaluation and release unfolded. It is fitted to the page when a group unfolds, so the side bars go first."""
    tab.show(f"{base}{GRAPH}evaluation", width=1600, height=740)
    tab.wait("document.body.innerText.includes('model_leaderboard')", seconds=120)
    tab.run(WIDE)
    time.sleep(2)
    tab.run(f"history.pushState({{}}, '', {GRAPH + 'evaluation,global@global:release'!r}); dispatchEvent(new PopStateEvent('popstate'))")
    tab.wait("document.body.innerText.includes('quality_gate')", seconds=60)
    time.sleep(5)
    tab.picture(IMAGES / "dagster.png")
    told("docs/images/dagster.png", "")


def shoot(base: str) -> None:
    with browser() as tab:
        draw(base, tab)
        for name, page, text, click, height in PICTURES:
            tab.show(base + page, width=1400, height=height)
            tab.wait(f"document.body.innerText.includes({text!r})", seconds=120)
            if click:
                tab.run(f"{CLICK}({click!r})")
            time.sleep(5)  # plots and lists grow into place
            tab.picture(IMAGES / f"{name}.png")
            told(f"docs/images/{name}.png", "")


def ask(folder: Path) -> None:
    """The page of a query service over the release, after a question that was asked before: models are loaded, files are read."""
    from live_server import running

    from rag_serving import app, embedder
    from rag_serving.settings import load_settings

    configure(folder, {})
    settings = load_settings()
    with running(embedder.create_app(settings, preload=[CHAMPION]), ready_path="/readyz") as url:
        places = settings.places.model_copy(update={"embedder_url": url})
        serving = app.create_app(settings.model_copy(update={"places": places}))
        with running(serving, ready_path="/readyz") as base, browser() as tab:
            for question in ("How do I stop an instance?", QUESTION):
                tab.show(f"{base}/?{urlencode({'q': question})}", width=1180, height=1290)
                tab.wait("document.getElementById('main').dataset.state === 'answered'")
            tab.run("document.activeElement.blur()")
            time.sleep(1)
            tab.picture(IMAGES / "page.png")
            told("docs/images/page.png", "")


def main() -> None:
    kept = Path(sys.argv[1]).absolute() if len(sys.argv) > 1 else None
    with tempfile.TemporaryDirectory() as scratch:
        folder = kept or Path(scratch) / "line"
        acted = (folder / ".ragline" / "store" / "releases").exists()
        prepare(folder)
        from rag_assets.postgres import export, postgres
        from rag_serving.settings import load_settings

        with postgres(load_settings()) as databases:
            os.environ.update(export(databases))
            if not acted:
                act(folder)
            with webserver() as base:
                shoot(base)
        ask(folder)


if __name__ == "__main__":
    main()
