// Downloads: those under way, the ended ones with what can be done, and models to begin with.

import { call } from "./calls.js";
import { $, ask, element, rows, show, write } from "./dom.js";
import { size, span } from "./format.js";
import { latest } from "./known.js";
import { action, noteError, say, sayError } from "./messages.js";
import { errorDetail, errorWords } from "./words.js";

const DISMISSED = "llm-service dismissed";
const START_S = 15;
const CANCEL_S = 10;

// Those seen under way, whose end is told; with the key of an older end, which is not theirs.
const running = new Map();
const checks = new Map(); // of files, by the model: how far, and what stops it

const lower = (name) => name.toLowerCase();
const dismissed = () => new Set(JSON.parse(localStorage.getItem(DISMISSED) || "[]"));
const keyOf = ({ model, ended_at: at, started_at: since }) =>
  `${lower(model)} ${at ?? since ?? ""}`;

// Starts a download that goes on by itself; tells whether it was accepted.
export async function startPull(model, options = {}) {
  const body = { model, ...options, detach: true };
  // A list that is under way meanwhile still has the older end.
  const older = latest("pulls")?.pulls.find((pull) => lower(pull.model) === lower(model));
  const answer = await call("POST", "api/models/pull", body, START_S);
  if (answer.ok) {
    running.set(lower(model), older && keyOf(older));
    say(`The download of ${model} is under way.`);
  } else {
    sayError(`The download of ${model} was not started`, answer);
  }
  return answer;
}

export function showPulls() {
  const pulls = latest("pulls")?.pulls;
  if (!pulls) return;
  const first = (pull, index) =>
    pulls.findIndex(({ model }) => lower(model) === lower(pull.model)) === index;
  const newest = pulls.filter(first).map((pull) => ({ ...pull, key: pull.model }));
  const away = dismissed();
  const under = newest
    .filter(({ state }) => state === "running")
    .map((pull) => ({ ...pull, make: runningRow }));
  const ended = newest.filter((pull) => pull.state !== "running" && !away.has(keyOf(pull)));
  tellEnds(newest);
  rows($("pulls"), [...checks.values(), ...under], (item) => item.make(item));
  show($("under-way"), checks.size + under.length > 0);
  rows($("ended-pulls"), ended, endedRow);
  const failed = ended.filter(({ state }) => state === "error").length;
  const words = `Ended downloads: ${ended.length}${failed ? `, of which ${failed} failed` : ""}`;
  write($("ended-count"), words);
  show($("ended"), ended.length > 0);
}

function tellEnds(pulls) {
  for (const pull of pulls) {
    const { model, state } = pull;
    const name = lower(model);
    if (state === "running") running.set(name, undefined);
    else if (running.has(name) && running.get(name) !== keyOf(pull)) {
      running.delete(name);
      tellEnd(pull);
    }
  }
}

function tellEnd({ model, state, total_bytes: total, ...pull }) {
  if (state === "success") return say(`${model} is downloaded, ${size(total)}.`);
  if (state === "cancelled") return;
  sayError(`The download of ${model} failed`, pull);
  $("ended").open = true;
}

function runningRow({ model }) {
  const bar = element("progress", { max: 100, ariaLabel: `Download of ${model}` });
  const figures = element("p", { className: "figures" });
  const cancel = action("Cancel", `the download of ${model}`, () => cancelPull(model));
  const title = element("p", { className: "about name" }, model);
  const row = element("li", {}, title, cancel, bar, figures);
  row.update = (pull) => {
    bar.value = pull.percent;
    const [done, total] = [size(pull.completed_bytes), size(pull.total_bytes)];
    const facts = [pull.status];
    if (pull.total_bytes) facts.push(shownPercent(pull.percent), `${done} of ${total}`);
    if (pull.bytes_per_second) facts.push(`${size(pull.bytes_per_second)}/s`);
    if (pull.eta_seconds != null) facts.push(`${span(pull.eta_seconds)} left`);
    write(figures, facts.filter(Boolean).join(" · "));
  };
  return row;
}

// Shows how far a check of a model's files is; returns what shows more and what ends it.
export function showCheck(model, stop) {
  const check = { key: `check ${model}`, model, percent: 0, make: checkRow, stop };
  checks.set(model, check);
  showPulls();
  return {
    note: ({ percent }) => {
      check.percent = percent ?? check.percent;
      showPulls();
    },
    end: () => {
      checks.delete(model);
      showPulls();
    },
  };
}

function checkRow({ model, stop }) {
  const bar = element("progress", { max: 100, ariaLabel: `Check of ${model}` });
  const figures = element("p", { className: "figures" });
  const button = element(
    "button",
    { type: "button", ariaLabel: `Stop the check of ${model}` },
    "Stop",
  );
  button.onclick = stop;
  const title = element("p", { className: "about name" }, model);
  const row = element("li", {}, title, button, bar, figures);
  row.update = ({ percent }) => {
    bar.value = percent;
    write(figures, `the files are read · ${shownPercent(percent)}`);
  };
  return row;
}

// Never rounded up to the end.
const shownPercent = (value) => `${(Math.floor(10 * value) / 10).toFixed(1)}\u00a0%`;

function endedRow({ model }) {
  const words = element("p");
  const said = element("p", { className: "figures" });
  const detail = element("details", {}, element("summary", {}, "What was said"), said);
  const title = element("p", { className: "name" }, model);
  const about = element("div", { className: "about" }, title, words, detail);
  const actions = element("div", { className: "actions" });
  const row = element("li", {}, about, actions);
  let buttons = "";
  row.update = (pull) => {
    const good = pull.state === "success";
    const level = { success: "figures", cancelled: "warn" }[pull.state] ?? "error";
    write(words, good ? `downloaded, ${size(pull.total_bytes)}` : failedWords(pull), level);
    write(said, pull.state === "error" ? errorDetail(pull) : "");
    show(detail, said.textContent !== "");
    const wanted = `${pull.state} ${pull.code} ${pull.kept_bytes > 0}`;
    if (wanted === buttons) return;
    buttons = wanted;
    const focused = actions.contains(document.activeElement);
    actions.replaceChildren(...endedButtons(pull));
    if (focused) actions.firstChild.focus({ preventScroll: true });
  };
  return row;
}

function failedWords(pull) {
  const kept = pull.kept_bytes;
  return kept ? `${errorWords(pull)} ${size(kept)} of it are kept.` : errorWords(pull);
}

const HOPELESS = ["bad_model_name", "registry_insecure", "parts_damaged"];

function endedButtons(pull) {
  const { model, state, code, insecure = false, kept_bytes: kept } = pull;
  const what = `the download of ${model}`;
  const buttons = [];
  if (state !== "success") {
    const verb = kept ? "Resume" : "Retry";
    if (!HOPELESS.includes(code))
      buttons.push(action(verb, what, () => startPull(model, { insecure })));
    if (code === "registry_insecure" && insecure) {
      buttons.push(action("Download with TLS", model, () => startPull(model)));
    } else if (code === "registry_insecure") {
      buttons.push(action("Download without TLS", model, () => pullWithoutTls(model)));
    }
    if (kept || code === "parts_damaged") {
      buttons.push(action("Remove parts", `of ${model}`, () => removeParts(model)));
    }
  }
  buttons.push(action("Dismiss", what, () => dismiss(pull)));
  return buttons;
}

async function cancelPull(model) {
  const answer = await call("DELETE", "api/models/pull", { model }, CANCEL_S);
  if (!answer.ok) return sayError(`The download of ${model} was not cancelled`, answer);
  $("ended").open = true;
  say(`The download of ${model} is cancelled. What is there of it is kept.`);
}

async function pullWithoutTls(model) {
  const question = `Download ${model} without TLS? Whoever is on the way can read and change it.`;
  if (await ask(question, "Download without TLS", true)) await startPull(model, { insecure: true });
}

async function removeParts(model) {
  const kept = latest("pulls").pulls.find((pull) => lower(pull.model) === lower(model))?.kept_bytes;
  const question = `Remove what is kept of the download of ${model}? The next one begins anew.`;
  const verb = kept ? `Remove parts, frees ${size(kept)}` : "Remove parts";
  if (!(await ask(question, verb, true))) return;
  const answer = await call("DELETE", "api/models/pull", { model, purge: true }, CANCEL_S);
  if (!answer.ok) return sayError(`The parts of ${model} were not removed`, answer);
  say(`The parts of ${model} are removed: ${size(answer.freed_bytes)} came free.`);
}

function dismiss(pull) {
  const kept = [...dismissed(), keyOf(pull)].slice(-50);
  localStorage.setItem(DISMISSED, JSON.stringify(kept));
  showPulls();
}

$("pull-form").onsubmit = async (event) => {
  event.preventDefault();
  const model = $("pull-name").value.trim();
  try {
    const answer = await startPull(model);
    write($("pull-error"), answer.ok ? "" : errorWords(answer));
    if (answer.ok) $("pull-name").value = "";
  } catch (error) {
    noteError(`The download of ${model}`, error);
  }
  document.dispatchEvent(new Event("poll"));
};
