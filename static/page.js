// The page: polls the service, and shows what it says.

import { tokenWanted } from "./calls.js";
import { $ } from "./dom.js";
import { showHead } from "./head.js";
import { refreshHistory, showHistory } from "./history.js";
import { latest, refresh, showAges, showKnown } from "./known.js";
import { resetButton, showMachine } from "./machine.js";
import { noteFault, takeFault } from "./messages.js";
import { showModels } from "./models.js";
import { showPulls } from "./pulls.js";
import { showSuggestions, suggest } from "./suggest.js";
import { showUse } from "./use.js";

const BUSY_MS = 3000;
const IDLE_MS = 5000;
const SUGGEST_S = 2; // the page waits no longer for what is there to choose from

let timer = null;
let polling = false;
let rounds = 0;

// All sources at once: one that hangs does not hold up the others.
async function refreshAll() {
  const health = refresh("health", "health");
  if (tokenWanted()) return health;
  const sources = [
    health,
    refresh("stats", "api/stats?evidence=false"),
    refresh("models", "api/models"),
  ];
  sources.push(refresh("pulls", "api/models/pull"), refreshHistory());
  if (!latest("info")?.ollama_version) sources.push(refresh("info", "api/info"));
  return Promise.all(sources);
}

function showAll() {
  showModels();
  showPulls();
  showSuggestions();
  showMachine();
  showHistory();
  showUse();
  showAges();
  showKnown();
}

// A fault of the page's own is told as such, and the next round tries again.
async function round() {
  let fault = null;
  try {
    await refreshAll();
    if (latest("models")?.models.length === 0) await suggestOnce();
    showAll();
    fault = takeFault();
  } catch (error) {
    noteFault(error);
    fault = takeFault();
  }
  showHead(fault, resetButton);
  rounds += 1;
  $("main").dataset.rounds = rounds;
}

// Before anything is shown, or it would move what lies below.
let suggested = false;
async function suggestOnce() {
  if (suggested) return;
  suggested = true;
  await suggest(SUGGEST_S);
  $("suggested").open = true;
}

function isBusy() {
  const pulls = latest("pulls")?.pulls ?? [];
  const runners = latest("stats")?.runners ?? [];
  return (
    pulls.some(({ state }) => state === "running") || runners.some(({ state }) => state !== "idle")
  );
}

async function poll() {
  if (polling || document.hidden) return;
  polling = true;
  clearTimeout(timer);
  try {
    await round();
  } finally {
    polling = false;
    timer = setTimeout(poll, isBusy() ? BUSY_MS : IDLE_MS);
  }
}

addEventListener("error", ({ error, message }) => noteFault(error ?? new Error(message)));
addEventListener("unhandledrejection", ({ reason }) => noteFault(reason));
document.addEventListener("visibilitychange", poll);
document.addEventListener("poll", poll);
setInterval(showAges, 1000);
poll();
