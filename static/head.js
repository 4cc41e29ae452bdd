// The top of the page: how it stands, in words, in the title and in the favicon.

import { tokenWanted, wantToken } from "./calls.js";
import { $, element, rows, textRow, write } from "./dom.js";
import { clock, count } from "./format.js";
import { age, failingSince, failureOf, latest, OLD_S } from "./known.js";
import { ACTIONS, CALM_GPU_STATES, GPU_STATES, reasonWords, warningLines } from "./words.js";

const LONG_S = 30;
const SIGNS = { good: "✓", work: "…", warn: "⚠", bad: "✕" };
const ICONS = { good: "icon.svg", work: "icon.svg", warn: "icon-warn.svg", bad: "icon-bad.svg" };

// Shows the state. `fault` is an exception of the page's own, or null.
export function showHead(fault, resetButton) {
  const health = latest("health");
  const { level, words, action } = fault ? faultState(fault) : serviceState(health);
  write($("state"), words, level);
  showSign(level);
  showAbout();
  const fresh = !failureOf("health") && age("stats") < OLD_S;
  showWaiting(fresh ? latest("stats")?.callers : null);
  const told = failureOf("health") ? [] : (health?.warnings ?? []);
  const models = latest("models")?.models ?? [];
  const beside = models.filter((each) => each.loaded && each.size_vram < each.size_loaded);
  rows($("warnings"), warningLines(told, beside, health?.load), () =>
    textRow(({ words }) => words, "warn"),
  );
  const buttons = { token: tokenButton, reset_session: resetButton };
  rows($("advice"), action in buttons ? [{ key: action }] : [], () => buttons[action]());
}

function faultState(fault) {
  const what = `${fault.name ?? "Error"}: ${fault.message ?? fault}`;
  const words = `This page has a fault of its own (${what}). The service may be well: reload the page.`;
  return { level: "bad", words };
}

function serviceState(health) {
  const failure = failureOf("health");
  if (failure) return silentState(failure);
  if (tokenWanted()) return tokenState(health);
  if (!health) return { level: "work", words: "Looking for the service …" };
  if (!health.ok) return sickState(health);
  const missing = failureOf("stats") ?? failureOf("models") ?? failureOf("pulls");
  if (missing)
    return {
      level: "warn",
      words: `The service works, but not all of it answers: ${missing.message}`,
    };
  return wellState(health);
}

function tokenState(health) {
  const works = health?.ok ? "The service works." : "The service is not healthy.";
  const words = `${works} Without its token (LLM_API_TOKEN) this page shows and does nothing more.`;
  return { level: "warn", words, action: "token" };
}

function silentState(failure) {
  const since = clock(failingSince("health"));
  const words = {
    no_answer: `The service has not answered since ${since}.`,
    not_reachable: `The service has not been reachable since ${since}.`,
  };
  const what =
    words[failure.code] ??
    `The service has given no proper answer since ${since}. ${failure.message}`;
  return { level: "bad", words: `${what} What is shown below is older. This page tries again.` };
}

function sickState(health) {
  const reason = reasonWords(health, latest("stats")?.runners ?? []);
  const advice = ACTIONS[health.recommended_action] ?? "";
  return { level: "bad", words: `${reason} ${advice}`.trim(), action: health.recommended_action };
}

function wellState({ gpu, recommended_action: action, load, warnings = [] }) {
  const parts = ["The service works."];
  const strange = !CALM_GPU_STATES.includes(gpu) && GPU_STATES[gpu];
  if (strange) parts.push(strange);
  if (ACTIONS[action]) parts.push(ACTIONS[action]);
  if (load?.state === "loading") parts.push(`${load.model} is being loaded.`);
  const level = strange || ACTIONS[action] || warnings.length ? "warn" : "good";
  return { level, words: parts.join(" "), action };
}

function showSign(level) {
  const host = latest("info")?.hostname ?? location.hostname;
  const title = `${SIGNS[level]} ${host} – LLM Service`;
  if (document.title !== title) document.title = title;
  const icon = `static/${ICONS[level]}`;
  if ($("icon").getAttribute("href") !== icon) $("icon").setAttribute("href", icon);
}

function showAbout() {
  const [info, stats] = [latest("info"), latest("stats")];
  if (!info) return;
  const names = Object.entries(Object.groupBy(stats?.gpus ?? [], ({ name }) => name ?? "GPU"));
  const gpus = names.map(([name, { length }]) => (length > 1 ? `${length} × ${name}` : name));
  const versions = [
    `version ${info.version}`,
    info.ollama_version && `Ollama ${info.ollama_version}`,
  ];
  write($("about"), [info.hostname, ...gpus, ...versions].filter(Boolean).join(" · "));
}

// Somebody waits at each moment of an ordinary answer: it is a warning only after a while. The
// line stays where nobody waits, or the page would move at each poll.
function showWaiting(callers) {
  const { waiting = 0, longest_wait_s: longest } = callers ?? {};
  const who = waiting ? count(waiting, "caller") : "No caller";
  const long = longest >= LONG_S ? `, the longest for more than ${LONG_S} s` : "";
  const words = callers ? `${who} ${waiting > 1 ? "wait" : "waits"} for an answer${long}.` : "";
  write($("waiting"), words, long ? "warn" : "figures");
}

function tokenButton() {
  const made = element("button", { type: "button" }, "Enter the token");
  made.onclick = () => {
    wantToken();
    document.dispatchEvent(new Event("poll"));
  };
  made.update = () => {};
  return made;
}
