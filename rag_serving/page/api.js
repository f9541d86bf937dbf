/* The service over HTTP: plain requests, and the events of an answer that is being written. */

const LOST = { title: "No connection", detail: "the service did not answer.", fix: "Check that it runs, then ask again." };
const KEY = "ragline-key";

export const useKey = (key) => sessionStorage.setItem(KEY, key);

function headers(more = {}) {
  const key = sessionStorage.getItem(KEY);
  return key ? { ...more, Authorization: `Bearer ${key}` } : more;
}

/** Whether it went well, and the reply or the problem. */
export async function fetched(path, body) {
  try {
    const json = { "Content-Type": "application/json" };
    const options = body ? { method: "POST", headers: headers(json), body: JSON.stringify(body) } : { headers: headers() };
    const response = await fetch(path, options);
    return [response.ok, await response.json()];
  } catch {
    return [false, LOST];
  }
}

/** Ask with a stream: `heard(name, data)` gets each event. Gives whether it went well, and the whole reply or the problem. */
export async function streamed(path, body, heard) {
  try {
    const asked = headers({ "Content-Type": "application/json", Accept: "text/event-stream" });
    const response = await fetch(path, { method: "POST", headers: asked, body: JSON.stringify(body) });
    if (!(response.headers.get("Content-Type") || "").startsWith("text/event-stream")) return [response.ok, await response.json()];
    for await (const [name, data] of events(response.body)) {
      if (name === "done" || name === "error") return [name === "done", data];
      heard(name, data);
    }
  } catch {
    return [false, LOST];
  }
  return [false, { title: "The answer broke off", detail: "the connection ended before it was whole.", fix: "Ask again." }];
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text = (text + value).replaceAll("\r\n", "\n");
    let end;
    while ((end = text.indexOf("\n\n")) >= 0) {
      const lines = text.slice(0, end).split("\n");
      text = text.slice(end + 2);
      const field = (name) => lines.filter((line) => line.startsWith(`${name}:`)).map((line) => line.slice(name.length + 1).replace(/^ /, ""));
      if (field("event").length) yield [field("event")[0], JSON.parse(field("data").join("\n"))];
    }
  }
}
