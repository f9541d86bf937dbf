/* An answer with its citations, the passages it rests on, and a reader in which a citation opens its passage. */

import { at, bar, element, isolated, percent, source } from "/static/dom.js";

const SIGNALS = {
  dense_text: ["Text, meaning", 2],
  dense_title: ["Title, meaning", 2],
  bm25_text: ["Text, words", 1],
  bm25_title: ["Title, words", 1],
  wording: ["Wording", 2],
  relevance: ["Reranked", 2],
};
const HIDDEN = new Set(["rank_before"]);
const LOST = {
  embedding: "The embedding service did not answer: found by words alone.",
  text_index: "The full-text index could not be searched: found by meaning alone.",
  vector_index: "The vectors could not be searched: found by words alone.",
  rerank: "The passages were not ranked a second time.",
  llm: "The language model did not give a whole answer: passages are quoted.",
};
const CONFIDENCE = {
  high: "Confidence high: two independent documents or more, each on the question's topic.",
  medium: "Confidence medium: one source, or not known to be on topic. Read the passage.",
  low: "Confidence low: what it cites is hardly about the question, or says little of it.",
};
const GUARDED = {
  "input.injection": "The question reads like orders to a language model.",
  "context.injection": "Orders to a language model were taken out of the passages.",
  "context.source_share": "One document had more than its share of the passages.",
  "output.link": "Links that no passage vouches for were taken out.",
  "output.image": "Images were taken out.",
  "output.markup": "Markup was taken out.",
  "output.length": "The answer was cut.",
  "output.canary": "The language model quoted its orders; that was withheld.",
};

const PLACES = { input: "question", context: "passages", output: "answer" };
const UNSEEN = new Set(["bidi", "invisible", "control"]);

/** The lines below an answer: how it was made, what it did without, what guards did. */
function notes(reply) {
  const lines = [];
  if (reply.abstained) lines.push(["", "Nothing in the corpus answers this."]);
  else if (reply.generated) lines.push(["", `Written by a language model; ${percent(reply.groundedness ?? 0)} of its words stand in what it cites.`]);
  else lines.push(["", "Quoted word for word."]);
  if (reply.confidence) lines.push([reply.confidence === "low" ? "guarded" : "confidence", CONFIDENCE[reply.confidence] || `Confidence: ${reply.confidence}.`]);
  for (const part of reply.degraded) lines.push(["degraded", LOST[part] || `Done without ${part}.`]);
  if (reply.flags.includes("citation_removed")) lines.push(["guarded", "A citation that did not hold was taken out."]);
  if (reply.flags.includes("uncited")) lines.push(["guarded", "Some of it cites nothing."]);
  for (const each of reply.guards) {
    const unseen = UNSEEN.has(each.rule) && `Characters that cannot be seen were taken out of the ${PLACES[each.guard]}.`;
    const words = GUARDED[`${each.guard}.${each.rule}`] || unseen || `${each.rule.replaceAll("_", " ")} in the ${PLACES[each.guard]}: ${each.action}.`;
    lines.push(["guarded", words]);
  }
  const distinct = [...new Map(lines.map((line) => [line[1], line])).values()];
  return element("ul", "notes", distinct.map(([name, words]) => element("li", name, words)));
}

function citationLink(reply, citation, children, name) {
  const link = element("a", name, children, { href: `#passage-${citation.chunk_id}` });
  link.addEventListener("click", (event) => {
    event.preventDefault();
    read(reply, citation);
  });
  return link;
}

/** The answer's text, with each marker [n] of a citation as a link. */
function linked(reply) {
  const cited = new Map(reply.citations.map((citation) => [citation.number, citation]));
  return reply.answer.split(/(\s*\[\d+\])/).map((piece) => {
    const citation = cited.get(Number((piece.match(/^\s*\[(\d+)\]$/) || [])[1]));
    if (!citation) return isolated(piece);
    const marker = citationLink(reply, citation, `${citation.number}`, "marker");
    marker.setAttribute("aria-label", `Citation ${citation.number}: ${citation.title || citation.doc_id}`);
    return marker;
  });
}

/** Show an answer that is being written. */
export function showBeginning(box, text) {
  box.replaceChildren(element("p", "text", isolated(text)));
}

export function showAnswer(box, reply) {
  const citations = reply.citations.map((each) =>
    element("li", "", [element("span", "", `${each.number}`), citationLink(reply, each, isolated(each.title || each.doc_id))])
  );
  const text = element("p", reply.abstained ? "text abstained" : "text", linked(reply));
  box.replaceChildren(text, element("ol", "citations", citations), notes(reply));
}

/** What was found, in short, and how it moved against another reply. */
export function ranking(reply, other) {
  const places = new Map(other.hits.map((hit, index) => [hit.chunk_id, index]).concat(other.hits.map((hit, index) => [hit.doc_id, index])));
  const rows = reply.hits.map((hit, index) => {
    const before = places.get(hit.chunk_id) ?? places.get(hit.doc_id);
    const moved = before === undefined ? "new" : before > index ? `up ${before - index}` : before < index ? `down ${index - before}` : "";
    const title = [isolated(hit.title || hit.doc_id), ...(moved ? [element("span", "moved", moved)] : [])];
    return element("li", "", [element("span", "", `${index + 1}`), element("span", "", title), element("span", "", hit.score.toFixed(3))]);
  });
  return element("ol", "ranking", rows);
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

const quotesOf = (reply, number) => reply.quotes.filter((quote) => quote.number === number).map((quote) => quote.text);
const place = (hit) => [source(hit.uri), ` · characters ${hit.start.toLocaleString()} to ${hit.end.toLocaleString()}`];

/** Open the cited passage over the page; Escape, the button and a click beside it close it, and the focus returns. */
function read(reply, citation) {
  const hit = reply.hits.find((each) => each.chunk_id === citation.chunk_id);
  if (!hit) return;
  at("reader-place").replaceChildren(`Citation ${citation.number} · passage ${reply.hits.indexOf(hit) + 1} of ${reply.hits.length}`);
  at("reader-title").replaceChildren(isolated(hit.title || hit.doc_id));
  at("reader-body").replaceChildren(
    ...(hit.heading_path ? [element("p", "heading", isolated(hit.heading_path))] : []),
    element("p", "passage", element("bdi", "", marked(hit.text, quotesOf(reply, citation.number)))),
    element("p", "source", place(hit))
  );
  at("reader").showModal();
  at("reader-title").focus();
  at("reader").querySelector(".sheet").scrollTop = 0;
}

export function readyReader() {
  at("close").addEventListener("click", () => at("reader").close());
  at("reader").addEventListener("click", (event) => {
    if (event.target === at("reader")) at("reader").close();
  });
}

/** Cosines fill their bar at 1, other signals at the best value among the hits. */
function signalBars(signals, best) {
  return Object.entries(signals)
    .filter(([name]) => !HIDDEN.has(name))
    .map(([name, value]) => {
      const [label, digits] = SIGNALS[name] || [name.replaceAll("_", " "), 2];
      const share = value / (name.startsWith("dense") ? 1 : best[name] || 1);
      return element("div", "signal", [element("div", "", [element("span", "", label), element("span", "", value.toFixed(digits))]), bar(share)]);
    });
}

export function showHits(reply) {
  const numbers = new Map((reply.citations || []).map((citation) => [citation.chunk_id, citation.number]));
  const best = {};
  for (const hit of reply.hits) for (const [name, value] of Object.entries(hit.signals)) best[name] = Math.max(best[name] || 0, value);
  const items = reply.hits.map((hit, index) => {
    const number = numbers.get(hit.chunk_id);
    const heading = [element("span", "title", isolated(hit.title || hit.doc_id))];
    if (number) heading.push(element("span", "cited", `cited as ${number}`));
    const moved = hit.signals.rank_before ? hit.signals.rank_before - (index + 1) : 0;
    if (moved) heading.push(element("span", "moved", `${moved > 0 ? "up" : "down"} ${Math.abs(moved)}`, { title: "by reranking" }));
    if (hit.heading_path) heading.push(element("span", "heading", isolated(hit.heading_path)));
    heading.push(element("span", "snippet", isolated(hit.text.slice(0, 300))));
    const summary = element("summary", "", [
      element("span", "rank", `${index + 1}`),
      element("span", "", heading),
      element("span", "score", hit.score.toFixed(3), { title: "Score" }),
    ]);
    const quotes = number ? quotesOf(reply, number) : [];
    const body = element("div", "body", [
      element("p", "passage", element("bdi", "", marked(hit.text, quotes))),
      element("p", "source", place(hit)),
      element("div", "signals", signalBars(hit.signals, best)),
    ]);
    return element("li", "", element("details", "", [summary, body]), { id: `passage-${hit.chunk_id}` });
  });
  at("hits").replaceChildren(...items);
  at("passages").hidden = items.length === 0;
}
