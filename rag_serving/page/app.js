"use strict";

const SIGNALS = {
  dense_text: ["Text, meaning", 2],
  dense_title: ["Title, meaning", 2],
  bm25_text: ["Text, words", 1],
  bm25_title: ["Title, words", 1],
  wording: ["Wording", 2],
};
const RELEASE_SECONDS = 5;

const at = (id) => document.getElementById(id);
let asked = 0;
let answered = null;

/** An element with a class, children and attributes; strings become text nodes, never markup. */
function element(tag, className, children = [], attributes = {}) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...[children].flat());
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

const isolated = (text) => element("bdi", "", text);

function bar(share, offset = 0) {
  const fill = element("span");
  fill.style.left = `${100 * offset}%`;
  fill.style.width = `${100 * Math.max(0, Math.min(1, share))}%`;
  return element("span", "track", fill, { "aria-hidden": "true" });
}

/** A link for web addresses; anything else stays text. */
function source(uri) {
  if (!/^https?:\/\//i.test(uri)) return isolated(uri);
  return element("a", "", uri, { href: uri, rel: "noopener noreferrer" });
}

const milliseconds = (value) => `${value < 10 ? value.toFixed(1) : Math.round(value)} ms`;
const moment = (iso) => new Date(iso).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
const passageId = (chunkId) => `passage-${chunkId}`;

function open(chunkId) {
  const item = at(passageId(chunkId));
  if (!item) return;
  const details = item.querySelector("details");
  details.open = true;
  item.scrollIntoView({ block: "start" });
  details.querySelector("summary").focus({ preventScroll: true });
}

function citationLink(citation, label) {
  const link = element("a", "", label, { href: `#${passageId(citation.chunk_id)}` });
  link.addEventListener("click", (event) => {
    event.preventDefault();
    open(citation.chunk_id);
  });
  return link;
}

function showAnswer(reply) {
  const byNumber = new Map(reply.citations.map((citation) => [citation.number, citation]));
  const parts = reply.quotes.flatMap((quote, index) => {
    const next = reply.quotes[index + 1];
    if (next && next.number === quote.number) return [isolated(quote.text), " "];
    const marker = citationLink(byNumber.get(quote.number), `${quote.number}`);
    marker.setAttribute("aria-label", `Citation ${quote.number}`);
    return [isolated(quote.text), marker, " "];
  });
  at("text").replaceChildren(...(parts.length ? parts : [reply.answer]));
  at("text").classList.toggle("abstained", reply.abstained);
  at("citations").replaceChildren(
    ...reply.citations.map((each) => element("li", "", [element("span", "", `${each.number}`), citationLink(each, isolated(each.title || each.doc_id))]))
  );
  at("degraded").hidden = !reply.degraded.includes("embedding");
  at("answer").hidden = false;
}

/** The text with each quote marked where it stands. */
function marked(text, quotes) {
  const spots = quotes.map((quote) => [text.indexOf(quote), quote.length]).filter(([start]) => start >= 0).sort((a, b) => a[0] - b[0]);
  const parts = [];
  let done = 0;
  for (const [start, length] of spots) {
    if (start < done) continue;
    parts.push(text.slice(done, start), element("mark", "", text.slice(start, start + length)));
    done = start + length;
  }
  return [...parts, text.slice(done)];
}

/** Cosines fill their bar at 1, other signals at the best value among the hits. */
function signalBars(signals, best) {
  return Object.entries(signals).map(([name, value]) => {
    const [label, digits] = SIGNALS[name] || [name, 2];
    const share = value / (name.startsWith("dense") ? 1 : best[name] || 1);
    return element("div", "signal", [element("div", "", [element("span", "", label), element("span", "", value.toFixed(digits))]), bar(share)]);
  });
}

function showHits(reply) {
  const numbers = new Map(reply.citations.map((citation) => [citation.chunk_id, citation.number]));
  const best = {};
  for (const hit of reply.hits) for (const [name, value] of Object.entries(hit.signals)) best[name] = Math.max(best[name] || 0, value);
  const items = reply.hits.map((hit, index) => {
    const number = numbers.get(hit.chunk_id);
    const quotes = reply.quotes.filter((quote) => quote.number === number).map((quote) => quote.text);
    const heading = [element("span", "title", isolated(hit.title || hit.doc_id))];
    if (number) heading.push(element("span", "cited", `cited as ${number}`));
    if (hit.heading_path) heading.push(element("span", "heading", isolated(hit.heading_path)));
    heading.push(element("span", "snippet", isolated(hit.text.slice(0, 300))));
    const summary = element("summary", "", [
      element("span", "rank", `${index + 1}`),
      element("span", "", heading),
      element("span", "score", hit.score.toFixed(3), { title: "Fused score" }),
    ]);
    const place = element("p", "source", [source(hit.uri), ` · characters ${hit.start} to ${hit.end}`]);
    const body = element("div", "body", [element("p", "passage", element("bdi", "", marked(hit.text, quotes))), place]);
    const signals = element("div", "signals", signalBars(hit.signals, best));
    return element("li", "", [element("details", "", [summary, body]), signals], { id: passageId(hit.chunk_id) });
  });
  at("hits").replaceChildren(...items);
  at("passages").hidden = items.length === 0;
}

function showTrace(reply) {
  const facts = { Release: `${reply.release}`, Model: reply.embedding_model, Snapshot: reply.snapshot_id, Trace: reply.trace_id };
  at("facts").replaceChildren(
    ...Object.entries(facts).flatMap(([name, value]) => [
      element("dt", "", name),
      element("dd", name === "Snapshot" || name === "Trace" ? "id" : "", value),
    ])
  );
  const phases = Object.entries(reply.timings_ms);
  const total = phases.reduce((sum, [, value]) => sum + value, 0);
  let before = 0;
  const rows = phases.map(([name, value]) => {
    const row = element("li", "", [element("span", "", name), bar(value / total, before / total), element("span", "ms", milliseconds(value))]);
    before += value;
    return row;
  });
  rows.push(element("li", "total", [element("span", "", "total"), element("span"), element("span", "ms", milliseconds(total))]));
  at("waterfall").replaceChildren(...rows);
  at("trace").hidden = false;
}

function showProblem(problem) {
  at("problem").replaceChildren(
    element("p", "", `${problem.title}: ${problem.detail}`),
    element("p", "", [problem.fix || "", problem.trace_id ? ` Trace ${problem.trace_id}` : ""].join(""))
  );
  at("problem").hidden = false;
}

async function fetched(path, options) {
  try {
    const response = await fetch(path, options);
    return [response.ok, await response.json()];
  } catch {
    return [false, { title: "No connection", detail: "the service did not answer.", fix: "Check that it runs, then ask again." }];
  }
}

function showThumb(verdict, words = "") {
  for (const id of ["up", "down"]) at(id).setAttribute("aria-pressed", `${id === verdict}`);
  at("thanks").textContent = words;
}

async function thumb(verdict) {
  const body = JSON.stringify({ ...answered, verdict });
  const [ok, reply] = await fetched("/v1/feedback", { method: "POST", headers: { "Content-Type": "application/json" }, body });
  if (!ok) showThumb("", reply.detail);
  else showThumb(verdict, reply.queued ? "Noted: the question waits for a judgment." : "Noted: this question is known already.");
}

async function ask(query) {
  const mine = (asked += 1);
  at("main").dataset.state = "asking";
  at("intro").hidden = true;
  at("problem").hidden = true;
  const options = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ query }) };
  const [ok, reply] = await fetched("/v1/query", options);
  if (mine !== asked) return;
  if (ok) {
    answered = { query, snapshot_id: reply.snapshot_id, doc_ids: [...new Set(reply.hits.map((hit) => hit.doc_id))] };
    showThumb("");
    showAnswer(reply);
    showHits(reply);
    showTrace(reply);
  } else {
    for (const id of ["answer", "passages", "trace"]) at(id).hidden = true;
    showProblem(reply);
  }
  at("main").dataset.state = ok ? "answered" : "failed";
}

function showRelease(release) {
  const champion = release.champion;
  const words = [];
  if (release.open) words.push(`Release ${release.open.release}`);
  else words.push(champion ? `Release ${champion.number} is being opened` : "Nothing is released yet: run “ragline run”");
  if (champion && champion.embedding_model) words.push(champion.embedding_model);
  if (champion && champion.documents) words.push(`${champion.documents.toLocaleString()} documents`);
  if (release.holds.length) words.push("promotions on hold");
  if (release.problem) words.push(release.problem.detail);
  at("live").textContent = words.join(" · ");
  const items = release.history.map((entry) => {
    const action = [element("b", "", entry.action)];
    if (release.open && release.open.release === entry.number) action.push(element("i", "", "live"));
    const what = element("span", "what", [element("span", "", action), element("time", "", moment(entry.at), { datetime: entry.at })]);
    const lines = [what];
    if (entry.snapshot_id) lines.push(element("span", "snapshot", entry.snapshot_id));
    lines.push(element("span", "reason", isolated(`${entry.reason} (${entry.actor})`), { title: entry.reason }));
    return element("li", "", [element("span", "number", `${entry.number}`), element("span", "", lines)]);
  });
  at("history").replaceChildren(...items);
  at("release").hidden = items.length === 0;
}

async function follow() {
  if (document.visibilityState === "visible") {
    const [ok, release] = await fetched("/v1/release");
    if (ok) showRelease(release);
    else at("live").textContent = "The service does not answer";
  }
  setTimeout(follow, 1000 * RELEASE_SECONDS);
}

function askFromAddress() {
  const query = new URLSearchParams(location.search).get("q") || "";
  at("question").value = query;
  if (query.trim()) ask(query);
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const query = at("question").value;
  if (!query.trim()) return;
  history.pushState(null, "", `?${new URLSearchParams({ q: query })}`);
  ask(query);
});
for (const verdict of ["up", "down"]) at(verdict).addEventListener("click", () => thumb(verdict));
window.addEventListener("popstate", askFromAddress);
document.addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input")) return;
  event.preventDefault();
  at("question").focus();
});
follow();
askFromAddress();
