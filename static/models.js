// The models on the disk and the runners that hold them in memory.

import { call, stream } from "./calls.js";
import { $, ask, element, rows, show, write } from "./dom.js";
import { clock, count, megabytes, size } from "./format.js";
import { latest } from "./known.js";
import { action, dismiss, say, sayError } from "./messages.js";
import { showCheck, startPull } from "./pulls.js";
import { tryModel } from "./try.js";
import { errorWords } from "./words.js";

const MANY = 10; // from so many models on there is a filter
const RANKS = { stuck: 0, silent: 0, ghost: 0, orphan: 0 };
const COLOURS = {
  busy: "work",
  unwatched: "work",
  loading: "work",
  idle: "good",
  stuck: "bad",
  silent: "bad",
  ghost: "bad",
  orphan: "warn",
};
const UPDATES_S = 40;
const LOAD_S = 15;
const CLEAR_S = 10;
const DELETE_S = 30;

// What the registries said of each model, when, and of which version here.
const updates = new Map();

let ordered = null; // the load whose outcome is to be told

const lower = (name) => name?.toLowerCase();

// Troubled ones first, then what is in memory, then the rest, each by name: a steady order.
const rank = ({ runner, own }) => RANKS[runner?.state] ?? (runner || own ? 1 : 2);
const byRank = (a, b) => rank(a) - rank(b) || a.name.localeCompare(b.name, "en", { numeric: true });

export function showModels() {
  tellLoad();
  const models = latest("models")?.models;
  if (!models) return;
  const runners = latest("stats")?.runners ?? [];
  const named = new Map(runners.map((runner) => [lower(runner.model), runner]));
  const shown = models.map((model) => {
    const own = model.loaded && lower(model.loaded_as ?? model.name) === lower(model.name);
    return { ...model, key: model.name, own, runner: named.get(lower(model.name)) };
  });
  const matched = new Set(shown.map(({ runner }) => runner));
  const others = runners.filter((runner) => !matched.has(runner));
  const unnamed = others.map((runner) => ({
    key: runner.pid,
    name: `${runner.model || "unknown model"}, process ${runner.pid}`,
    runner,
  }));
  showList([...shown, ...unnamed].sort(byRank), models.length);
}

function showList(all, total) {
  const wanted = lower($("filter").value.trim());
  const found = all.filter(
    ({ name, runner }) => lower(name).includes(wanted) || runner?.state in RANKS,
  );
  rows($("models"), found, modelRow);
  show($("filter-label"), total >= MANY || wanted !== "");
  const counted = count(total, "model");
  write($("model-count"), wanted ? `${found.length} of ${counted}` : total ? counted : "");
  show($("no-models"), total === 0);
  show($("list-actions"), total > 0);
}

function modelRow({ name, size: bytes }) {
  const parts = ["name", "state", "figures", "update"].map((className) =>
    element("p", { className }),
  );
  const [title, state, figures, news] = parts;
  title.textContent = name;
  const row = element("li", {}, element("div", { className: "about" }, ...parts));
  const buttons = bytes == null ? null : modelButtons(name); // a runner may be without a model
  if (buttons) row.append(buttons.actions);
  row.update = (model) => {
    row.model = model;
    write(
      state,
      stateWords(model, row),
      `state ${COLOURS[model.runner?.state] || (model.own ? "good" : "off")}`,
    );
    write(figures, figureWords(model));
    showUpdate(model, news, buttons);
    if (buttons) showButtons(model, buttons);
  };
  return row;
}

function modelButtons(name) {
  const load = action("Load", name, () => loadModel(name));
  const unload = action("Unload", name, () => unloadModel(name));
  const attempt = action("Try", name, () => tryModel(name));
  const check = action("Check files", name, () => checkFiles(name));
  const update = action("Update", name, () => updateModel(name));
  const remove = action("Delete", name, () => deleteModel(name), "danger");
  const more = element("div", { className: "actions" }, check, update, remove);
  const summary = element("summary", { ariaLabel: `More for ${name}` }, "More");
  const rest = element("details", { className: "more" }, summary, more);
  const actions = element("div", { className: "actions" }, load, unload, attempt, rest);
  return { actions, load, unload, update };
}

function showButtons(model, { load, unload, update }) {
  const there = model.own || Boolean(model.runner);
  const [shown, hidden] = there ? [unload, load] : [load, unload];
  show(shown, there || !model.loaded);
  if (hidden === document.activeElement) shown.focus({ preventScroll: true });
  show(hidden, false);
  const { state, download_bytes: bytes } = toldOf(model);
  const verb = state === "newer" ? `Update, fetches ${size(bytes)}` : "Update";
  write(update, verb);
  update.ariaLabel = `${verb} ${model.name}`;
}

function stateWords({ runner, own, loaded, loaded_as: as, name, ...model }, row) {
  const load = latest("health")?.load;
  const loading = load?.state === "loading" && lower(load.model) === lower(name);
  if (!runner && loading) return "loading";
  const replaced = own && model.loaded_digest && model.loaded_digest !== model.digest;
  const version = replaced ? " (its version from before the update)" : "";
  if (!runner && own) return `loaded${version}`;
  if (!runner) return loaded && as ? `in memory as ${as}, which has the same files` : "not loaded";
  // The moment is kept, so that it does not flicker by a second.
  const phase = `${runner.pid} ${runner.state}`;
  if (row.phase !== phase) {
    const now = Date.parse(latest("stats").timestamp);
    Object.assign(row, { phase, since: clock(now - 1000 * runner.seconds) });
  }
  const words = {
    busy: `busy, ${runner.tokens_per_second?.toFixed(1)} tokens/s`,
    unwatched: "busy; its progress cannot be seen",
    idle: `loaded, idle${version}`,
    loading: "loading",
  };
  return words[runner.state] ?? `${runner.state} since ${row.since}`;
}

function figureWords(model) {
  const { size: bytes, details = {}, own, runner } = model;
  const facts = [
    bytes && `${size(bytes)} on the disk`,
    details.parameter_size,
    details.quantization_level,
  ];
  const most = model.trained_context ?? details.context_length;
  if (own && model.context_length) {
    const of = most ? ` of ${most.toLocaleString("en")}` : "";
    facts.push(`context ${model.context_length.toLocaleString("en")}${of}`);
  } else if (most) {
    facts.push(`context up to ${most.toLocaleString("en")}`);
  }
  facts.push(...memoryFacts(model, own, runner));
  return facts.filter(Boolean).join(" · ");
}

// On the GPU it is what Ollama says, in the system's memory what the process holds.
function memoryFacts({ size_loaded: all, size_vram: vram, expires_at: expires }, own, runner) {
  const facts = [];
  if (own && vram) {
    const where = latest("stats")?.gpus.length > 1 ? "the GPUs" : "the GPU";
    facts.push(`${size(vram)} on ${where} (${Math.floor((100 * vram) / all)}\u00a0%)`);
  }
  if (runner?.memory_mb) facts.push(`${megabytes(runner.memory_mb)} of system memory`);
  else if (own && all > vram) facts.push(`${size(all - vram)} of system memory`);
  if (!own || !expires) return facts;
  const until = new Date(expires);
  const now = Date.parse(latest("stats")?.timestamp) || Date.now();
  const ends = until <= now ? "unloads after its answer" : `stays until ${clock(until)}`;
  return [...facts, until.getFullYear() > 2100 ? "stays loaded" : ends];
}

// What was said of another version than the one that is here now is void.
function toldOf({ name, digest }) {
  const told = updates.get(lower(name));
  return told && told.digest === digest ? told : {};
}

function showUpdate(model, node) {
  const told = toldOf(model);
  const words = {
    current: `is the registry's newest, asked at ${clock(told.at)}`,
    newer: `the registry has a newer one: ${size(told.download_bytes)} to fetch`,
    unknown: `whether there is a newer one is not known: ${reasonOf(told)}`,
  };
  write(node, words[told.state] ?? "", told.state === "newer" ? "update work" : "update figures");
}

// What the buttons do

async function loadModel(model) {
  const answer = await call("POST", "api/models/load", { model }, LOAD_S);
  if (!answer.ok) return sayError(`${model} was not loaded`, answer);
  if (answer.model_state === "loaded") return say(`${model} is loaded.`);
  ordered = { model, seen: false };
  say(`${model} is being loaded.`);
}

// Tells the outcome of the load that was ordered here, once it was seen under way.
function tellLoad() {
  const load = latest("health")?.load;
  if (!ordered || lower(load?.model) !== lower(ordered.model)) return;
  if (load.state === "loading") {
    ordered.seen = true;
  } else if (ordered.seen) {
    ordered = null;
    if (load.state === "loaded") say(`${load.model} is loaded.`);
    if (load.state === "failed") sayError(`${load.model} was not loaded`, load);
  }
}

async function unloadModel(model) {
  const question = `Unload ${model}? An answer under way is ended.`;
  if (!(await ask(question, "Unload"))) return;
  const answer = await call("POST", "api/cache/clear", { model }, CLEAR_S);
  if (!answer.ok) return sayError(`${model} was not unloaded`, answer);
  say(`${model} is unloaded: ${megabytes(answer.memory?.freed_mb)} of memory came free.`);
}

async function deleteModel(model) {
  const entry = latest("models").models.find(({ name }) => name === model);
  const frees = entry?.frees_bytes ?? entry?.size;
  const verb = frees == null ? "Delete" : `Delete, frees ${size(frees)}`;
  if (!(await ask(`Delete ${model} from the disk?`, verb, true))) return;
  let answer = await call("DELETE", "api/models/delete", { model }, DELETE_S);
  if (answer.code === "model_busy") {
    const question = `${model} is being loaded, or in the middle of an answer.`;
    if (!(await ask(question, "End that and delete", true))) return;
    answer = await call("DELETE", "api/models/delete", { model, force: true }, DELETE_S);
  }
  if (!answer.ok) return sayError(`${model} was not deleted`, answer);
  say(`${model} is deleted: ${size(answer.freed_bytes)} of disk space came free.`);
}

async function checkFiles(model) {
  const controller = new AbortController();
  const check = showCheck(model, () => controller.abort());
  let last = {};
  try {
    const answer = await stream("api/models/verify", { model }, controller, (line) => {
      last = line;
      check.note(line);
    });
    if (!answer.ok) last = answer;
  } finally {
    check.end();
  }
  if (last.status === "success") tellCheck(model, last.models[0]);
  else sayError(`The files of ${model} were not checked`, last);
}

function tellCheck(model, found) {
  if (found.ok) return say(`The files of ${model} are whole.`);
  const parts = ["damaged", "missing", "unreadable"].map((state) => {
    const files = found[state] ?? [];
    return files.length && `${count(files.length, "file")} ${state}`;
  });
  const repair = action("Repair", model, () => repairModel(model));
  say(`${model}: ${parts.filter(Boolean).join(", ")}.`, "bad", repair);
}

async function repairModel(model) {
  const question = `Download the damaged files of ${model} again? Where the registry has a newer version, that replaces it.`;
  if (await ask(question, "Repair")) await startPull(model, { verify: true });
}

// Asks the registry first, and never replaces what was made here without a warning.
async function updateModel(model, insecure = false) {
  const told = await askRegistries(model, insecure);
  if (!told) return;
  const { state, code, made_here: own, download_bytes: bytes } = told;
  if (code === "registry_insecure" && !insecure) {
    const risk = `The registry of ${model} has no TLS: whoever is on the way can read and change its data.`;
    if (await ask(risk, "Ask without TLS", true)) await updateModel(model, true);
    return;
  }
  if (state === "current") return say(`${model} is the registry's newest.`);
  if (bytes == null) return say(`${model} was not updated: ${reasonOf(told)}`, "warn");
  const warning = `${model} was made on this machine. An update replaces it by the registry's model of that name.`;
  const question = own ? warning : `Download the newer version of ${model}?`;
  const verb = own ? "Replace it" : "Update";
  if (!(await ask(question, `${verb}, fetches ${size(bytes)}`, own))) return;
  await startPull(model, insecure ? { insecure } : {});
  updates.delete(lower(model));
}

const reasonOf = ({ code, reason }) => errorWords({ code, error: reason });

// Asks about one model or all; returns what is told of the one.
async function askRegistries(model, insecure = false) {
  const asking = say("The registry is being asked …", "work");
  const query = model ? `?${new URLSearchParams({ model, insecure })}` : "";
  const answer = await call("GET", `api/models/updates${query}`, null, UPDATES_S);
  dismiss(asking); // a question may follow
  if (!answer.ok) return void sayError("The registry was not asked", answer);
  const digests = new Map(latest("models").models.map((each) => [lower(each.name), each.digest]));
  const at = Date.now();
  if (!model) updates.clear();
  for (const each of answer.models) {
    const key = lower(each.name);
    updates.set(key, { ...each, at, digest: digests.get(key) });
  }
  return updates.get(lower(model));
}

async function lookForUpdates() {
  updates.clear();
  await askRegistries();
  const states = [...updates.values()];
  const newer = states.filter(({ state }) => state === "newer").length;
  const unknown = states.filter(({ state }) => state === "unknown").length;
  if (!states.length) return;
  const doubt = unknown ? ` Of ${count(unknown, "model")} it is not known.` : "";
  const found = newer ? `${count(newer, "model")} can be updated.` : "No newer version was found.";
  say(found + doubt, unknown ? "warn" : "good");
}

$("list-actions").append(action("Look for updates", null, lookForUpdates));
$("filter").addEventListener("input", showModels);
