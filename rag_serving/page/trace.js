/* How a reply came about: its phases in time with what each found, where it came from, and the releases with their measured quality. */

import { at, bar, counted, drawn, element, isolated, milliseconds, moment, percent } from "/static/dom.js";

const PHASES = ["admit", "encode", "retrieve", "rerank", "assemble", "generate"];

/** What each phase found, in a word or a score. */
function found(reply) {
  const sources = new Set(reply.hits.map((hit) => hit.doc_id)).size;
  const top = reply.hits[0];
  return {
    admit: "",
    encode: reply.degraded.includes("embedding") ? "no vector" : reply.embedding_model,
    retrieve: top ? `${counted(reply.hits.length, "passage")}, best ${top.score.toFixed(2)}` : "nothing",
    rerank: top && "relevance" in top.signals ? `best ${top.signals.relevance.toFixed(2)}` : reply.degraded.includes("rerank") ? "failed" : "off",
    assemble: counted(sources, "document"),
    generate: reply.abstained ? "abstained" : reply.generated ? `${percent(reply.groundedness ?? 0)} grounded` : counted(reply.citations.length, "citation"),
  };
}

export function showTrace(reply) {
  const words = found(reply);
  const total = Object.values(reply.timings_ms).reduce((sum, value) => sum + value, 0);
  let before = 0;
  const rows = PHASES.map((name) => {
    const value = reply.timings_ms[name];
    const took = value ?? 0;
    const head = [element("span", "phase", name), element("span", "found", isolated(words[name])), element("span", "ms", value === undefined ? "–" : milliseconds(value))];
    const row = element("li", value === undefined ? "absent" : "", [...head, bar(total ? took / total : 0, total ? before / total : 0)]);
    before += took;
    return row;
  });
  rows.push(element("li", "total", [element("span", "phase", "total"), element("span"), element("span", "ms", milliseconds(total))]));
  at("waterfall").replaceChildren(...rows);
  const facts = { Release: `${reply.release}`, Model: reply.embedding_model, Snapshot: reply.snapshot_id, Trace: reply.trace_id };
  at("facts").replaceChildren(
    ...Object.entries(facts).flatMap(([name, value]) => [
      element("dt", "", name),
      element("dd", name === "Snapshot" || name === "Trace" ? "id" : "", isolated(value)),
    ])
  );
  at("trace").hidden = false;
}

/** The line at the top: what answers, with which model, over how much; and what is not as it should be. */
function live(release) {
  const { champion, open } = release;
  const words = [];
  if (open) words.push(`Release ${open.release}`);
  else words.push(champion ? `Release ${champion.number} is being opened` : "Nothing is released yet: run “ragline run”");
  if (champion && champion.embedding_model) words.push(champion.embedding_model);
  if (champion && champion.documents) words.push(`${champion.documents.toLocaleString()} documents`);
  if (release.canary) words.push(`canary ${release.canary.embedding_model || release.canary.snapshot_id}`);
  if (release.holds.length) words.push("promotions on hold");
  if (release.problem) words.push(release.problem.detail);
  return words.join(" · ");
}

/** The MRR of the promotions, oldest first, as a line with a dot each. */
function qualityLine(entries) {
  const points = entries.filter((entry) => entry.action === "promote" && entry.mrr !== null).reverse();
  if (points.length < 2) return [];
  const values = points.map((entry) => entry.mrr);
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const spots = values.map((value, index) => [6 + (index * 288) / (values.length - 1), high > low ? 38 - (30 * (value - low)) / (high - low) : 23]);
  const words = `MRR of the last ${values.length} promotions: ${values.map((value) => value.toFixed(3)).join(", ")}`;
  const line = drawn("polyline", "", [], { points: spots.map((spot) => spot.map((each) => each.toFixed(1)).join(",")).join(" ") });
  const dots = spots.map(([x, y], index) => drawn("circle", index === spots.length - 1 ? "last" : "", [], { cx: x, cy: y, r: 3 }));
  return [
    drawn("svg", "line", [line, ...dots], { viewBox: "0 0 300 46", role: "img", "aria-label": words }),
    element("p", "scale", [element("span", "", `MRR ${values[0].toFixed(3)}`), element("span", "", values[values.length - 1].toFixed(3))]),
  ];
}

function history(entry, open) {
  const action = [element("b", "", entry.action)];
  if (open && open.release === entry.number) action.push(element("i", "", "live"));
  const what = element("span", "what", [element("span", "", action), element("time", "", moment(entry.at), { datetime: entry.at })]);
  const lines = [what];
  if (entry.snapshot_id) {
    const mrr = entry.mrr === null ? [] : [element("span", "mrr", `MRR ${entry.mrr.toFixed(3)}`)];
    lines.push(element("span", "snapshot", [element("span", "", isolated(entry.snapshot_id)), ...mrr]));
  }
  lines.push(element("span", "reason", isolated(entry.reason ? `${entry.reason} (${entry.actor})` : entry.actor), { title: entry.reason }));
  return element("li", "", [element("span", "number", `${entry.number}`), element("span", "", lines)]);
}

export function showRelease(release) {
  at("live").textContent = live(release);
  at("quality").replaceChildren(...qualityLine(release.history));
  at("history").replaceChildren(...release.history.map((entry) => history(entry, release.open)));
  at("release").hidden = release.history.length === 0;
  at("beside").hidden = !release.canary || Boolean(release.canary_problem);
  if (at("beside").hidden) at("compare").checked = false;
}
