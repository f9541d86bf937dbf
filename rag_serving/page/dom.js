export const at = (id) => document.getElementById(id);

/** An element with a class, children and attributes; strings become text nodes, never markup. */
export function element(tag, className, children = [], attributes = {}) {
  const made = document.createElement(tag);
  return filled(made, className, children, attributes);
}

/** The same for a drawing. */
export function drawn(tag, className, children = [], attributes = {}) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  return filled(made, className, children, attributes);
}

function filled(made, className, children, attributes) {
  if (className) made.setAttribute("class", className);
  made.append(...[children].flat());
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

/** Text of a corpus or of a user, whose direction cannot disturb what stands around it. */
export const isolated = (text) => element("bdi", "", text);

export function bar(share, offset = 0) {
  const fill = element("span");
  fill.style.left = `${100 * offset}%`;
  fill.style.width = `${100 * Math.max(0, Math.min(1, share))}%`;
  return element("span", "track", fill, { "aria-hidden": "true" });
}

/** A link for web addresses; anything else stays text. */
export function source(uri) {
  if (!/^https?:\/\//i.test(uri)) return isolated(uri);
  return element("a", "", uri, { href: uri, rel: "noopener noreferrer" });
}

export const milliseconds = (value) => `${value < 10 ? value.toFixed(1) : Math.round(value)} ms`;
export const moment = (iso) => new Date(iso).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
export const percent = (share) => `${Math.round(100 * share)} %`;
export const counted = (number, one, many = `${one}s`) => `${number} ${number === 1 ? one : many}`;
