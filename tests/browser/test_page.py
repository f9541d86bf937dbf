"""The web page in a real headless Chromium: what is asked is shown with its sources, by keyboard and on a phone, and nothing in a corpus runs."""

import re
import shutil
from pathlib import Path
from urllib.parse import urlencode

import pytest
from headless import chromium
from scripted_model import scripted, with_model
from small_service import PAGES, build, embedding, name_canary, release, serving, settings_for, two_snapshots, until

from rag_serving.edge.keys import create_key
from rag_serving.releases import Action, Ledger
from rag_serving.store import LocalStore

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome") or ""
pytestmark = pytest.mark.skipif(not PROGRAM, reason="needs a browser: apt-get install chromium")

HOSTILE = {
    "evil.Title": (
        "<script>window.ran = 1</script><img src=x onerror='window.ran = 2'>",
        "Hostile wombat text. <img src=x onerror=\"window.ran = 3\"> <a href='javascript:window.ran = 4'>wombat</a> [7]",
    ),
}
ANSWERED = "document.getElementById('main').dataset.state === 'answered'"
BEGINNINGS = """{
  window.beginnings = 0;
  const made = document.querySelector('#answer .made');
  new MutationObserver(() => { if (!made.querySelector('.notes')) window.beginnings += 1; }).observe(made, { childList: true });
}"""
FAILED = "document.getElementById('main').dataset.state === 'failed'"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The address of a service over a small corpus with a hostile document, and a tab."""
    root = tmp_path_factory.mktemp("page")
    store, settings = LocalStore(root / "store"), settings_for(root)
    release(store, build(store, settings, PAGES | HOSTILE))
    with (
        embedding(settings) as url,
        serving(settings_for(root, embedder_url=url), store) as client,
        chromium(PROGRAM, root / "profile") as tab,
    ):
        yield f"{client.base_url}", tab


def asked(base: str, query: str) -> str:
    return f"{str(base).rstrip('/')}/?{urlencode({'q': query})}"


def troubles(tab) -> list[dict]:
    """Exceptions, blocked content and failed loads that the browser told since the last look."""
    wrong = ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled", "Page.javascriptDialogOpening")
    found = [event for event in tab.heard if event.get("method") in wrong]
    tab.heard.clear()
    return found


def test_deep_link_is_answered(page):
    """/?q=... asks at load and shows the answer, its citation, ranked hits with signals, timings, snapshot and release, without a complaint."""
    base, tab = page
    troubles(tab)
    tab.show(asked(base, "How do I delete a bucket?"))
    tab.wait(ANSWERED)
    assert "All objects in the bucket must be deleted" in tab.run("document.querySelector('#answer .text').innerText")
    assert tab.run("document.querySelector('#answer .citations a').innerText") == "Delete Bucket"
    assert tab.run("document.querySelectorAll('#hits > li').length") == 5
    assert tab.run("document.querySelectorAll('#hits > li:first-child .signal').length") >= 4
    assert tab.run("[...document.querySelectorAll('#waterfall .phase')].map(each => each.innerText).join()") == (
        "admit,encode,retrieve,rerank,assemble,generate,total"
    )
    assert "5 passages, best" in tab.run("document.getElementById('waterfall').innerText")
    assert "hashing-" in tab.run("document.getElementById('facts').innerText")
    tab.wait("document.getElementById('history').innerText.includes('promote')")
    assert "Release 1" in tab.run("document.getElementById('live').innerText")
    assert troubles(tab) == []


def test_citation_opens_its_passage(page):
    """A citation opens its passage with the quote marked and takes the focus there; Escape closes it and the focus returns to the citation."""
    base, tab = page
    tab.show(asked(base, "How do I delete a bucket?"))
    tab.wait(ANSWERED)
    tab.run("document.querySelector('.marker').focus()")
    tab.press("Enter", code=13, text="\r")
    tab.wait("document.getElementById('reader').open")
    assert "All objects in the bucket must be deleted" in tab.run("document.querySelector('#reader .passage').innerText")
    assert tab.run("document.querySelectorAll('#reader mark').length") >= 1
    assert tab.run("document.querySelector('#reader .source a').href") == "https://docs.example/s3.DeleteBucket"
    assert tab.run("document.activeElement.id") == "reader-title"
    tab.press("Escape", code=27)
    tab.wait("!document.getElementById('reader').open")
    assert tab.run("document.activeElement.className") == "marker"


def test_passages_show_their_signals(page):
    """A passage opens in place, by keyboard, with its text, where it comes from and what its score is made of."""
    base, tab = page
    tab.show(asked(base, "How do I delete a bucket?"))
    tab.wait(ANSWERED)
    tab.run("document.querySelector('#hits summary').focus()")
    tab.press("Enter", code=13, text="\r")
    tab.wait("document.querySelector('#hits details[open]') !== null")
    shown = tab.run("document.querySelector('#hits details[open]').innerText")
    assert "Text, meaning" in shown
    assert "characters 0 to" in shown
    assert "cited as 1" in shown


def test_a_thumb_is_kept(page):
    """A thumb marks itself, says that the question waits for a judgment, and another for the same question says that it is known."""
    base, tab = page
    tab.show(asked(base, "How do I stop an instance?"))
    tab.wait(ANSWERED)
    tab.run("document.getElementById('down').click()")
    tab.wait("document.getElementById('thanks').innerText.includes('waits')")
    assert tab.run("document.getElementById('down').getAttribute('aria-pressed')") == "true"
    tab.run("document.getElementById('up').click()")
    tab.wait("document.getElementById('thanks').innerText.includes('known')")
    assert tab.run("document.getElementById('down').getAttribute('aria-pressed')") == "false"


def test_by_keyboard(page):
    """A question is asked and a passage opened without a mouse: / to the field, Enter to ask, Tab to the answer, Enter to its source."""
    base, tab = page
    tab.show(str(base).rstrip("/") + "/")
    tab.press("/", code=191, text="/")
    tab.wait("document.activeElement.id === 'question'")
    tab.type("How do I delete a bucket?")
    tab.press("Enter", code=13, text="\r")
    tab.wait(ANSWERED)
    assert "q=How" in tab.run("location.search")
    for _ in range(2):
        tab.press("Tab", code=9)
    assert tab.run("document.activeElement.closest('.text') !== null")
    tab.press("Enter", code=13, text="\r")
    tab.wait("document.getElementById('reader').open")
    tab.press("Escape", code=27)
    tab.run("history.back()")
    tab.wait("location.search === ''")


def test_markup_in_a_corpus_is_text(page):
    """Script, image and link markup in titles, texts and questions is shown as it is written and never runs."""
    base, tab = page
    query = "hostile wombat <script>window.ran = 5</script><img src=x onerror='window.ran = 6'>"
    troubles(tab)
    tab.show(asked(base, query))
    tab.wait(ANSWERED)
    tab.run("document.querySelectorAll('details').forEach(each => { each.open = true })")
    tab.run("document.querySelector('.marker')?.click()")
    text = tab.run("document.body.innerText")
    assert "<script>window.ran = 1</script>" in text
    assert 'onerror="window.ran = 3"' in text
    assert tab.run("document.getElementById('question').value") == query
    assert tab.run("document.querySelectorAll('main script, main img, dialog img, a[href^=javascript]').length") == 0
    assert tab.run("typeof window.ran") == "undefined"
    assert troubles(tab) == []


def test_inline_code_is_blocked(page):
    """Should markup ever get in, the content security policy stops it: an inserted inline handler and script do not run."""
    base, tab = page
    tab.show(str(base).rstrip("/") + "/")
    tab.run("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.ran = 7\">')")
    tab.run("{const made = document.createElement('script'); made.textContent = 'window.ran = 8'; document.body.append(made)}")
    tab.wait("[...document.images].every(each => each.complete)")
    assert tab.run("typeof window.ran") == "undefined"
    assert any("Content Security Policy" in str(event) for event in troubles(tab))


def test_abstention_and_refusal_are_shown(page):
    """An abstention is a plain sentence without citations; a refused question shows what to do and its trace."""
    base, tab = page
    tab.show(asked(base, "Who won the football world cup?"))
    tab.wait(ANSWERED)
    assert tab.run("document.querySelectorAll('#answer .text a, #answer .citations li').length") == 0
    assert tab.run("document.querySelector('#answer .text').innerText.endsWith('.')")
    tab.show(asked(base, "bad \x07 bell"))
    tab.wait(FAILED)
    shown = tab.run("document.getElementById('problem').innerText")
    assert "control character" in shown
    assert "Trace" in shown


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_fits_and_can_be_read(page, width, dark):
    """At phone and desktop width nothing runs over the edge, and text has a contrast of 4.5 to its background in both schemes."""
    base, tab = page
    tab.show(asked(base, "hostile wombat"), width=width, dark=dark)
    tab.wait(ANSWERED)
    tab.run("document.querySelectorAll('details').forEach(each => { each.open = true })")
    assert tab.run("document.documentElement.scrollWidth") <= width
    contrast = """(() => {
      const light = (text) => text.match(/[\\d.]+/g).slice(0, 3).map(Number)
        .map(each => each / 255).map(each => each <= 0.04045 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4)
        .reduce((sum, each, at) => sum + each * [0.2126, 0.7152, 0.0722][at], 0);
      const page = getComputedStyle(document.body).backgroundColor;
      return Math.min(...[...document.querySelectorAll('main *')].filter(each => each.childNodes.length && each.offsetParent
          && [...each.childNodes].some(node => node.nodeType === 3 && node.data.trim())).map(each => {
        let box = each;
        while (box && getComputedStyle(box).backgroundColor === 'rgba(0, 0, 0, 0)') box = box.parentElement;
        const [one, two] = [light(getComputedStyle(each).color), light(box ? getComputedStyle(box).backgroundColor : page)];
        return (Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05);
      }));
    })()"""
    assert tab.run(contrast) >= 4.5


def test_what_was_done_without_is_said(page, tmp_path):
    """Without the embedding service the answer says that it was found by words alone, and so does the phase."""
    _, tab = page
    store, settings = LocalStore(tmp_path / "store"), settings_for(tmp_path)
    release(store, build(store, settings))
    with serving(settings, store) as client:
        tab.show(asked(str(client.base_url), "How do I delete a bucket?"))
        tab.wait(ANSWERED)
        assert "found by words alone" in tab.run("document.querySelector('#answer .notes').innerText")
        assert "no vector" in tab.run("document.getElementById('waterfall').innerText")
        tab.show("about:blank")


def test_a_written_answer_streams_and_its_markup_is_text(page, tmp_path):
    """What a language model writes appears, with its citations as links and its share of grounded words; markup in it never runs."""
    _, tab = page
    store = LocalStore(tmp_path / "store")
    release(store, build(store, settings_for(tmp_path)))

    with embedding(settings_for(tmp_path)) as url, scripted() as (model, script):
        settings = with_model(settings_for(tmp_path, embedder_url=url), model)
        with serving(settings, store) as client:
            tab.show(str(client.base_url).rstrip("/") + "/")
            tab.run(BEGINNINGS)
            tab.run("document.getElementById('question').value = 'How do I delete a bucket?'")
            tab.run("document.querySelector('.field button').click()")
            tab.wait(ANSWERED)
            assert "Written by a language model" in tab.run("document.querySelector('#answer .notes').innerText")
            assert "Confidence medium: " in tab.run("document.querySelector('#answer .notes').innerText")
            assert tab.run("document.querySelectorAll('#answer .marker').length") == 1
            assert tab.run("window.beginnings") >= 1
            script.mode = "markup"
            tab.run("document.querySelector('.field button').click()")
            tab.wait("document.querySelector('#answer .guarded') !== null")
            assert "Markup was taken out" in tab.run("document.querySelector('#answer .notes').innerText")
            assert tab.run("document.querySelectorAll('main img').length") == 0
            assert tab.run("typeof window.ran") == "undefined"
            tab.show("about:blank")


def test_live_and_canary_side_by_side(page, tmp_path):
    """While a canary is tried, both can be asked: two answers, whose they are, and how their passages moved."""
    _, tab = page
    store, champion, challenger = two_snapshots(tmp_path / "store")
    release(store, champion)
    name_canary(store, challenger)
    with embedding(settings_for(tmp_path)) as url, serving(settings_for(tmp_path, embedder_url=url), store) as client:
        until(client, "/v1/release", holds=lambda reply: reply.json()["canary"] and not reply.json()["canary_problem"])
        tab.show(str(client.base_url).rstrip("/") + "/")
        tab.wait("!document.getElementById('beside').hidden")
        tab.run("document.getElementById('compare').click()")
        tab.run("document.getElementById('question').value = 'How do I delete a bucket?'")
        tab.run("document.querySelector('.field button').click()")
        tab.wait(ANSWERED)
        tab.wait("!document.getElementById('canary-answer').hidden")
        assert champion.snapshot_id in tab.run("document.getElementById('answer-heading').innerText")
        assert challenger.snapshot_id in tab.run("document.getElementById('canary-heading').innerText")
        assert tab.run("document.querySelectorAll('#canary-answer .ranking li').length") == 5
        assert "canary" in tab.run("document.getElementById('live').innerText")
        tab.show("about:blank")


def test_a_key_is_asked_for(page, tmp_path):
    """A service with API keys refuses; the page asks for one, keeps it for the tab, and the same question is answered."""
    _, tab = page
    store = LocalStore(tmp_path / "store")
    release(store, build(store, settings_for(tmp_path)))
    token, _ = create_key(store, "reader", scopes=("query", "read", "feedback"), actor="tester")
    with embedding(settings_for(tmp_path)) as url, serving(settings_for(tmp_path, embedder_url=url), store) as client:
        tab.show(asked(str(client.base_url), "How do I delete a bucket?"))
        tab.wait(FAILED)
        tab.wait("document.activeElement.id === 'key'")
        tab.type(token)
        tab.press("Enter", code=13, text="\r")
        tab.wait(ANSWERED)
        assert token not in tab.run("document.documentElement.outerHTML")
        tab.run("sessionStorage.clear()")
        tab.show("about:blank")


def test_releases_show_their_quality(page, tmp_path):
    """The history names what each promotion's verdict measured, and draws it once there are two."""
    _, tab = page
    store, first, second = two_snapshots(tmp_path / "store")
    ledger = Ledger(store)
    for number, (manifest, mrr) in enumerate(((first, 0.84), (second, 0.91))):
        rules = [{"name": "mrr_floor", "passed": True, "observed": mrr, "required": 0.8, "detail": ""}]
        named = {"snapshot_id": manifest.snapshot_id, "manifest_sha256": manifest.sha256}
        ledger.append(Action.PROMOTE, after=number, actor="tester", reason="better", evidence={"verdict": {"rules": rules}}, **named)
    with serving(settings_for(tmp_path), store) as client:
        tab.show(str(client.base_url).rstrip("/") + "/")
        tab.wait("document.querySelectorAll('#history li').length === 2")
        assert "MRR 0.910" in tab.run("document.getElementById('history').innerText")
        assert tab.run("document.querySelector('#quality svg').getAttribute('aria-label')") == "MRR of the last 2 promotions: 0.840, 0.910"
        tab.show("about:blank")


def test_nothing_released(page, tmp_path):
    """Before the first release the page says what to run, and a question is told the same."""
    _, tab = page
    with serving(settings_for(tmp_path), LocalStore(tmp_path / "none"), ready=False) as client:
        tab.show(asked(str(client.base_url), "anything"))
        tab.wait(FAILED)
        assert "ragline run" in tab.run("document.getElementById('problem').innerText")
        tab.wait("document.getElementById('live').innerText.includes('ragline run')")
        tab.show("about:blank")


def test_page_is_packaged():
    """The page's files are inside the package that is installed."""
    folder = Path(__file__).parents[2] / "rag_serving" / "page"
    assert {path.name for path in folder.iterdir()} == {
        *("index.html", "app.css", "icon.svg", "app.js", "answer.js", "api.js", "dom.js", "trace.js")
    }
    assert "style=" not in (folder / "index.html").read_text(encoding="utf-8")
    for script in folder.glob("*.js"):
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", script.read_text(encoding="utf-8")), script
