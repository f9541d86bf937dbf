"""The labelling page in a real headless Chromium: a question is judged by keyboard, and hostile text stays text."""

import json
import shutil
from pathlib import Path

import pytest
from generated_corpus import released, settings_for
from headless import chromium
from live_server import running

from evals.collections import load_beir
from rag_assets.labelling_app import create_app
from rag_assets.workbench import Workbench
from rag_serving.feedback import propose, waiting_queries

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome") or ""
pytestmark = pytest.mark.skipif(not PROGRAM, reason="needs a browser: apt-get install chromium")
SHOWN = "document.getElementById('query').innerText.length > 0 && !document.getElementById('task').hidden"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page over a small release whose documents hold markup, with two waiting questions; its workbench, folder, and a tab."""
    root = tmp_path_factory.mktemp("label")
    (root / "beir" / "qrels").mkdir(parents=True)
    words = ["alpha", "beta", "gamma", "delta", "omega", "sigma"]
    text = "<img src=x onerror='window.ran=1'> {0} page about {0}{1}"
    rows = [{"_id": f"d{n}", "title": f"<b>{word}</b>", "text": text.format(word, n)} for n, word in enumerate(words * 10)]
    queries = [{"_id": f"q{n}", "text": f"{word}{n} page"} for n, word in enumerate(words * 10)]
    (root / "beir" / "corpus.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (root / "beir" / "queries.jsonl").write_text("\n".join(map(json.dumps, queries)))
    (root / "beir" / "qrels" / "test.tsv").write_text("".join(f"q{n}\td{n}\t1\n" for n in range(60)))
    bench = Workbench(settings_for(root))
    released(bench, "hashing-256")
    propose(bench.store, "alpha0 <script>window.ran=2</script> page", "feedback", verdict="down", comment="<i>wrong</i>")
    propose(bench.store, "beta1 page please", "log")
    with running(create_app(bench, root / "living", actor="me"), ready_path="/next") as url, chromium(PROGRAM, root / "profile") as tab:
        yield url, tab, bench, root / "living"


def test_judging_by_keyboard(page):
    """2 grades the second passage, Enter saves, S skips, and the end of the queue is said; text of a corpus is never markup."""
    url, tab, bench, folder = page
    tab.show(url + "/", width=390)
    tab.wait(SHOWN)
    assert tab.run("document.getElementById('query').innerText") == "alpha0 <script>window.ran=2</script> page"
    assert "<i>wrong</i>" in tab.run("document.getElementById('origin').innerText")
    assert tab.run("document.querySelectorAll('#candidates > li').length") == 10
    assert "<img src=x" in tab.run("document.getElementById('candidates').innerText")
    assert tab.run("document.documentElement.scrollWidth") <= 390
    tab.press("2", code=50, text="2")
    assert tab.run("document.querySelectorAll('#candidates button')[1].innerText") == "relevant"
    assert "1 relevant" in tab.run("document.getElementById('save').innerText")
    tab.press("Enter", code=13, text="\r")
    tab.wait("document.getElementById('query').innerText.startsWith('beta1')")
    tab.press("s", code=83, text="s")
    tab.wait("!document.getElementById('done').hidden")
    assert tab.run("typeof window.ran") == "undefined"
    assert len(load_beir(folder).queries) == 1
    assert waiting_queries(bench.store) == []


def test_the_page_is_packaged():
    """The page's files are inside the package, without inline code."""
    folder = Path(__file__).parents[2] / "rag_assets" / "label_page"
    assert {path.name for path in folder.iterdir()} == {"index.html", "label.css", "label.js"}
    assert "innerHTML" not in (folder / "label.js").read_text(encoding="utf-8")
