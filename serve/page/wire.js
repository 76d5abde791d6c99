// What goes to the server and what comes back.

// What went wrong, in one sentence; `remedy` is what the reader can do: "again", "key", "edit", "close"; `wait` in seconds.
class Trouble extends Error {
  constructor(message, remedy = "again", wait = 0) {
    super(message);
    this.remedy = remedy;
    this.wait = wait;
  }
}

const headers = (key) => (key ? { Authorization: `Bearer ${key}` } : {});
const sentence = (text) => (/[.!?…]$/.test(text) ? text : `${text}.`);

// A Retry-After in seconds; the other form of it is a date (RFC 9110, 10.2.3).
const waiting = (value) => {
  if (!value) return 0;
  const seconds = Number(value);
  return Math.max(0, Math.ceil(Number.isNaN(seconds) ? (Date.parse(value) - Date.now()) / 1000 || 0 : seconds));
};

const refusal = async (response, key) => {
  const body = await response.json().catch(() => null);
  const message = body?.error?.message, said = typeof message === "string" && message ? sentence(message) : "";
  const wait = waiting(response.headers.get("Retry-After"));
  switch (response.status) {
    case 401: return new Trouble(key ? "The server does not accept this API key." : "The server asks for an API key.", "key");
    case 413: return new Trouble("The images are together larger than the server takes: take fewer or smaller ones.", "edit");
    case 429: return new Trouble("The server is busy and its queue is full.", "again", wait);
    case 503: return new Trouble("The server takes no new questions now: it is closing or starting.", "again", wait);
  }
  if (response.status < 500) return new Trouble(said || `The server refused the question (${response.status}).`, "edit");
  return new Trouble(`The server failed (${response.status}). ${said}`.trim());
};

const reach = async (path, options, key) => {
  let response;
  try {
    response = await fetch(path, { ...options, cache: "no-store", credentials: "omit" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Trouble("The server cannot be reached.");
  }
  if (!response.ok) throw await refusal(response, key);
  return response;
};

// The first model of the server: its name, and the limits that it tells under `onevision_edge`.
const served = async (key) => {
  const response = await reach("v1/models", { headers: headers(key) }, key);
  const model = (await response.json()).data?.[0];
  if (!model?.id) throw new Trouble("The server has no model.");
  return { name: model.id, limits: model.onevision_edge ?? {} };
};

// The data of server-sent events, one after another (HTML, 9.2.6), as the bytes arrive.
const eventData = async function* (body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const events = (rest + value).split(/\r?\n\r?\n/);
      rest = events.pop();
      for (const event of events) {
        const lines = event.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
};

// The chunks of one answer. Raises Trouble where the server refuses, fails, or is lost before the end.
const answerChunks = async function* (request, key, signal) {
  const options = { method: "POST", body: JSON.stringify(request), signal, headers: { "Content-Type": "application/json", ...headers(key) } };
  const response = await reach("v1/chat/completions", options, key);
  const lost = new Trouble("The connection was lost before the answer was complete.");
  try {
    for await (const data of eventData(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Trouble(sentence(chunk.error.message ?? "The server failed in the middle of the answer"));
      yield chunk;
    }
  } catch (error) {
    throw error instanceof Trouble || error.name === "AbortError" ? error : lost;
  }
  throw lost;
};
