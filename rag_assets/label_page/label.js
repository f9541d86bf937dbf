"use strict";

const WORDS = ["not relevant", "relevant", "answers it"];
const at = (id) => document.getElementById(id);
let task = null;
let grades = new Map();

function element(tag, className, children = []) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...[children].flat());
  return made;
}

function showGrades() {
  for (const button of document.querySelectorAll("#candidates button")) {
    const grade = grades.get(button.dataset.doc) || 0;
    button.dataset.grade = grade;
    button.textContent = WORDS[grade];
  }
  const relevant = [...grades.values()].filter((grade) => grade > 0).length;
  at("save").textContent = relevant ? `Save ${relevant} relevant` : "Save: no answer in the corpus";
}

function cycle(docId) {
  grades.set(docId, ((grades.get(docId) || 0) + 1) % WORDS.length);
  showGrades();
}

function showTask() {
  at("task").hidden = !task;
  at("done").hidden = Boolean(task);
  at("left").textContent = task ? `${task.left} waiting` : "0 waiting";
  if (!task) return;
  grades = new Map(task.candidates.map((candidate) => [candidate.doc_id, 0]));
  const said = [`from ${task.waiting.origin}`];
  if (task.waiting.verdict) said.push(task.waiting.verdict === "down" ? "marked not helpful" : "marked helpful");
  if (task.waiting.comment) said.push(`“${task.waiting.comment}”`);
  at("origin").textContent = said.join(" · ");
  at("query").textContent = task.waiting.query;
  at("candidates").replaceChildren(
    ...task.candidates.map((candidate, index) => {
      const grade = element("button", "grade");
      grade.type = "button";
      grade.dataset.doc = candidate.doc_id;
      grade.addEventListener("click", () => cycle(candidate.doc_id));
      const heading = element("h2", "", [element("kbd", "", `${(index + 1) % 10}`), ` ${candidate.title || candidate.doc_id}`]);
      const facts = [candidate.doc_id, `score ${candidate.score.toFixed(3)}`, ...(candidate.hinted ? ["shown when it was asked"] : [])];
      return element("li", "", [element("div", "head", [heading, grade]), element("p", "facts", facts.join(" · ")), element("p", "text", candidate.text)]);
    })
  );
  showGrades();
  at("query").focus();
  scrollTo(0, 0);
}

async function call(path, options) {
  try {
    const response = await fetch(path, options);
    const body = response.status === 204 ? null : await response.json();
    if (!response.ok) throw new Error(body.detail || `status ${response.status}`);
    at("problem").hidden = true;
    return body;
  } catch (error) {
    at("problem").textContent = `${error.message}`;
    at("problem").hidden = false;
    return undefined;
  }
}

async function next() {
  const found = await call("/next");
  if (!found) return;
  task = found.task;
  showTask();
}

async function decide(decided) {
  if (!task) return;
  const body = JSON.stringify({ review_id: task.waiting.review_id, grades: decided });
  const sent = await call("/decide", { method: "POST", headers: { "Content-Type": "application/json" }, body });
  if (sent !== undefined) await next();
}

at("save").addEventListener("click", () => decide(Object.fromEntries(grades)));
at("skip").addEventListener("click", () => decide(null));
document.addEventListener("keydown", (event) => {
  if (!task || event.ctrlKey || event.metaKey || event.altKey) return;
  if (/^[0-9]$/.test(event.key)) {
    const candidate = task.candidates[(Number(event.key) + 9) % 10];
    if (candidate) cycle(candidate.doc_id);
  } else if (event.key === "Enter" && event.target.tagName !== "BUTTON") decide(Object.fromEntries(grades));
  else if (event.key === "s" || event.key === "S") decide(null);
});
next();
