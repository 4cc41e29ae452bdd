// Every call to the service: a time limit, the token, and errors by their code.
// Addresses are relative, so that the page works under a path prefix, too.

import { $, open } from "./dom.js";

const LIMIT_S = 6; // the service's own limits are shorter
const STREAM_SILENCE_S = 15; // a stream has a line every second
const KEY = "llm-service token";

// No answer, or none that makes sense: `code` is `no_answer`, `not_reachable`, `no_json`.
export class CallError extends Error {
  constructor(code, message) {
    super(message);
    this.code = code;
  }
}

let declined = false; // the token was asked for and not given
let asking = null; // the question for it while it is open

const seen = new Map(); // the last answer of each path that has a tag

const token = () => localStorage.getItem(KEY) || "";
export const tokenWanted = () => declined || asking !== null;

// Returns the answer's fields with `ok` and `http_status`; raises a CallError where there is none.
// What has not changed since the last time (304) is answered from here.
export async function call(method, path, body, limitS = LIMIT_S) {
  const response = await request(method, path, body, AbortSignal.timeout(1000 * limitS));
  if (response.status === 304) return seen.get(path).answer;
  const fields = await read(response, () => response.json());
  const answer = { ...fields, ok: response.ok, http_status: response.status };
  const tag = response.headers.get("ETag");
  if (tag && method === "GET") seen.set(path, { tag, answer });
  return answer;
}

// Calls `take` with each line of a stream. Returns what `call` does where it has none.
export async function stream(path, body, controller, take) {
  let timer = null;
  const wait = (seconds) => {
    clearTimeout(timer);
    timer = setTimeout(
      () => controller.abort(new DOMException("", "TimeoutError")),
      1000 * seconds,
    );
  };
  try {
    wait(STREAM_SILENCE_S);
    const response = await request("POST", path, body, controller.signal);
    if (!response.ok) {
      const answer = await read(response, () => response.json());
      return { ...answer, ok: false, http_status: response.status };
    }
    await readLines(response, take, () => wait(STREAM_SILENCE_S));
    return { ok: true, http_status: response.status };
  } finally {
    clearTimeout(timer);
  }
}

async function readLines(response, take, onPiece) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await read(response, () => reader.read());
    onPiece();
    const lines = (rest + (value ?? "")).split("\n");
    rest = done ? "" : lines.pop();
    for (const line of lines.filter((each) => each.trim())) {
      take(await read(response, () => JSON.parse(line)));
    }
    if (done) return;
  }
}

async function request(method, path, body, signal) {
  for (;;) {
    const sent = token();
    const headers = sent ? { Authorization: `Bearer ${sent}` } : {};
    if (body) headers["Content-Type"] = "application/json";
    if (method === "GET" && seen.has(path)) headers["If-None-Match"] = seen.get(path).tag;
    const init = { method, headers, body: body && JSON.stringify(body), signal };
    const response = await read(null, () => fetch(path, init));
    if (response.status !== 401) return response;
    const given = askToken(sent);
    // An act waits for the token; what polls goes on without, and polls again when it is given.
    if (method === "GET" || !(await given)) {
      throw new CallError("token_wanted", "The token is wanted.");
    }
  }
}

// Does a piece of work of a call and turns what the browser raises into a CallError.
async function read(response, work) {
  try {
    return await work();
  } catch (error) {
    throw callError(error, response);
  }
}

function callError(error, response) {
  if (error.name === "TimeoutError") {
    return new CallError("no_answer", "The service did not answer in time.");
  }
  if (error.name === "AbortError") return new CallError("stopped", "Stopped.");
  if (error instanceof SyntaxError) {
    const words = `An answer with status ${response.status} was no JSON: a proxy's, it seems.`;
    return new CallError("no_json", words);
  }
  if (error instanceof TypeError) {
    return new CallError("not_reachable", "The service is not reachable.");
  }
  return error;
}

// Asks for the token once for all calls; false where it is not given.
async function askToken(sent) {
  if (token() !== sent) return true; // given meanwhile
  if (declined) return false;
  const wrong = "That token is not the right one.";
  const words = sent ? wrong : "This service wants its token (LLM_API_TOKEN).";
  asking ??= open("token", words).then((answer) => takeToken(answer, sent));
  await asking;
  return !declined;
}

function takeToken(answer, sent) {
  asking = null;
  declined = answer !== "yes" && token() === sent; // else another tab was told
  if (answer === "yes") localStorage.setItem(KEY, $("token-input").value);
  $("token-input").value = "";
  document.dispatchEvent(new Event("poll"));
}

// Lets the token be asked for again.
export function wantToken() {
  declined = false;
}

addEventListener("storage", ({ key }) => {
  if (key !== KEY) return;
  declined = false;
  if ($("token").open) $("token").close("");
});
