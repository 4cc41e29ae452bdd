// What the service has answered last, how old that is, and what it failed with since.

import { CallError, call } from "./calls.js";
import { show, write } from "./dom.js";
import { span } from "./format.js";

export const OLD_S = 12; // two polls were missed
const known = {};

const entry = (name) => {
  known[name] ??= { value: null, at: null, failure: null, since: null };
  return known[name];
};

// Asks anew. What fails leaves the last answer, which grows old.
export async function refresh(name, path, limitS) {
  const one = entry(name);
  try {
    const answer = await call("GET", path, null, limitS);
    if (!answer.ok && name !== "health") throw new CallError(answer.code, answer.error);
    Object.assign(one, { value: answer, at: performance.now(), failure: null, since: null });
  } catch (error) {
    if (!(error instanceof CallError)) throw error;
    one.since ??= Date.now();
    one.failure = error;
  }
  return one;
}

export const latest = (name) => entry(name).value;
export const failureOf = (name) => entry(name).failure;
export const failingSince = (name) => entry(name).since;

// How many seconds old the answer is. The service's own last look may be older than its answer.
export function age(name) {
  const { at, value } = entry(name);
  if (at === null) return 0;
  const looked = value.looked_at
    ? (Date.parse(value.timestamp) - Date.parse(value.looked_at)) / 1e3
    : 0;
  return (performance.now() - at) / 1000 + Math.max(0, looked || 0);
}

// What was never told is not shown: it would look like nothing.
export function showKnown() {
  for (const place of document.querySelectorAll("[data-source]")) {
    show(place, entry(place.dataset.source).value !== null);
  }
}

// Lets what is old fade, and says how old it is.
export function showAges() {
  for (const told of document.querySelectorAll(".age")) {
    const place = told.closest("[data-source]");
    const name = place.dataset.source;
    const old = age(name) > OLD_S;
    place.classList.toggle("old", old);
    write(told, old ? `${span(age(name))} old` : "");
  }
}
