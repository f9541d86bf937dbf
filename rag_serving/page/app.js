/* The page: asks, shows what comes back, follows the release. */

import { ranking, readyReader, showAnswer, showBeginning, showHits } from "/static/answer.js";
import { fetched, streamed, useKey } from "/static/api.js";
import { at, element } from "/static/dom.js";
import { showRelease, showTrace } from "/static/trace.js";

const RELEASE_SECONDS = 5;
let asked = 0;
let answered = null;

const made = (id) => at(id).querySelector(".made");

function showProblem(problem) {
  at("problem").replaceChildren(
    element("p", "", `${problem.title}: ${problem.detail}`),
    element("p", "", [problem.fix || "", problem.trace_id ? ` Trace ${problem.trace_id}` : ""].join(""))
  );
  at("problem").hidden = false;
  at("access").hidden = problem.code !== "unauthorized";
  if (!at("access").hidden) at("key").focus();
}

function showThumb(verdict, words = "") {
  for (const id of ["up", "down"]) at(id).setAttribute("aria-pressed", `${id === verdict}`);
  at("thanks").textContent = words;
}

async function thumb(verdict) {
  const [ok, reply] = await fetched("/v1/feedback", { ...answered, verdict });
  if (!ok) showThumb("", reply.detail);
  else showThumb(verdict, reply.queued ? "Noted: the question waits for a judgment." : "Noted: this question is known already.");
}

/** The heading of an answer: plain, or whose it is when two stand side by side. */
function entitle(id, words, reply) {
  at(id).replaceChildren(words, ...(reply ? [element("span", "who", `${reply.embedding_model} · ${reply.snapshot_id}`)] : []));
}

function showReply(query, reply, canary) {
  answered = { query, snapshot_id: reply.snapshot_id, doc_ids: [...new Set(reply.hits.map((hit) => hit.doc_id))], trace_id: reply.trace_id };
  showThumb("");
  showAnswer(made("answer"), reply);
  entitle("answer-heading", canary ? `Live, release ${reply.release}` : "Answer", canary && reply);
  at("canary-answer").hidden = !canary;
  at("answers").classList.toggle("two", Boolean(canary));
  if (canary) {
    entitle("canary-heading", "Canary", canary);
    showAnswer(made("canary-answer"), canary);
    made("answer").append(ranking(reply, reply));
    made("canary-answer").append(ranking(canary, reply));
  }
  at("thumbs").hidden = false;
  showHits(reply);
  showTrace(reply);
}

/** Ask, and show the answer while it is written; gives whether it went well and the reply. */
function written(mine, query) {
  let text = "";
  return streamed("/v1/query", { query }, (name, data) => {
    if (mine !== asked) return;
    if (name === "hits") showHits(data);
    if (name === "hits" || name === "restart") text = "";
    if (name === "token") {
      text += data.text;
      at("canary-answer").hidden = true;
      at("answers").classList.remove("two");
      entitle("answer-heading", "Answer");
      at("answers").hidden = false;
      showBeginning(made("answer"), text);
    }
  });
}

async function ask(query) {
  const mine = (asked += 1);
  at("main").dataset.state = "asking";
  at("answer").setAttribute("aria-busy", "true");
  for (const id of ["intro", "problem", "access", "thumbs"]) at(id).hidden = true;
  const beside = at("compare").checked;
  const [ok, reply] = beside ? await fetched("/v1/compare", { query }) : await written(mine, query);
  if (mine !== asked) return;
  if (ok) showReply(query, beside ? reply.champion : reply, beside ? reply.canary : null);
  else showProblem(reply);
  at("answers").hidden = !ok;
  if (!ok) for (const id of ["passages", "trace"]) at(id).hidden = true;
  at("answer").setAttribute("aria-busy", "false");
  at("main").dataset.state = ok ? "answered" : "failed";
}

async function look() {
  const [ok, release] = await fetched("/v1/release");
  if (ok) showRelease(release);
  else at("live").textContent = release.code === "unauthorized" ? "The service asks for an API key" : "The service does not answer";
}

async function follow() {
  if (document.visibilityState === "visible") await look();
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
at("access").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(at("key").value.trim());
  at("key").value = "";
  look();
  askFromAddress();
  at("access").hidden = true;
});
for (const verdict of ["up", "down"]) at(verdict).addEventListener("click", () => thumb(verdict));
window.addEventListener("popstate", askFromAddress);
document.addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input") || at("reader").open) return;
  event.preventDefault();
  at("question").focus();
});
readyReader();
follow();
askFromAddress();
