"use strict";

const $ = (id) => document.getElementById(id);
const WORDS = {
  wait: "It should come by itself: wait a moment.",
  reset_session: "Reset the session below.",
  restart_service: "Restart the service (its container).",
  reboot_host: "Reboot the machine.",
  driver_mismatch: "The GPU's driver was updated under it.",
  no_permission: "The GPU may not be read.",
  unresponsive: "The GPU's driver does not answer.",
};
const COLOURS = { busy: "work", loading: "work", idle: "good", stuck: "bad", silent: "bad", ghost: "bad", orphan: "warn" };
let token = sessionStorage.getItem("token") || "";
let asking = null;
let models = [];  // the last list

function element(tag, className, text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

// Text is only written where it changed: screen readers and selections stay undisturbed.
function write(node, text, className) {
  if (node.textContent !== text) node.textContent = text;
  if (className !== undefined && node.className !== className) node.className = className;
}

function size(bytes) {
  if (bytes == null) return "?";
  const [unit, one] = bytes >= 1e9 ? ["GB", 1e9] : bytes >= 1e5 || !bytes ? ["MB", 1e6] : ["kB", 1e3];
  return `${(bytes / one).toFixed(bytes >= 1e10 ? 0 : 1)} ${unit}`;
}

function clock(moment) {
  return new Date(moment).toLocaleTimeString([], { hourCycle: "h23", hour: "2-digit", minute: "2-digit", second: "2-digit" });
}

function duration(seconds) {
  if (seconds == null) return "";
  const [h, m] = [Math.floor(seconds / 3600), Math.floor(seconds / 60) % 60];
  return h ? `${h} h ${m} min left` : m ? `${m} min ${seconds % 60} s left` : `${seconds} s left`;
}

async function call(method, path, body) {
  const sent = token;
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  if (body) headers["Content-Type"] = "application/json";
  const response = await fetch(path, { method, headers, body: body && JSON.stringify(body) });
  if (response.status !== 401) return { ok: response.ok, ...await response.json() };
  if (sent === token) asking ??= newToken().finally(() => { asking = null; });
  await asking;
  return call(method, path, body);
}

function closed(dialog) {
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => { dialog.onclose = () => resolve(dialog.returnValue); });
}

async function newToken() {
  $("token-text").textContent = token ? "That token is not the right one." : "This service wants its token (LLM_API_TOKEN).";
  await closed($("token"));
  token = $("token-input").value;
  sessionStorage.setItem("token", token);
}

async function ask(question) {
  $("ask-text").textContent = question;
  return await closed($("ask")) === "yes";
}

// Keeps one row for each key, in place, so that focus, selection and scroll survive the polling.
function rows(list, items, make) {
  const old = new Map([...list.children].map((row) => [row.dataset.key, row]));
  const wanted = new Set(items.map(({ key }) => String(key)));
  old.forEach((row, key) => {
    if (wanted.has(key)) return;
    if (row.contains(document.activeElement)) list.closest("section").querySelector("h2").focus();
    row.remove();
  });
  items.forEach((item, index) => {
    const row = old.get(String(item.key)) || make(item);
    row.dataset.key = item.key;
    row.update(item);
    if (list.children[index] !== row) list.insertBefore(row, list.children[index] || null);
  });
}

function textRow(words, className = "") {
  const row = element("p", className);
  row.update = (item) => write(row, words(item));
  return row;
}

// A label, a figure, and a chart or a meter; there is none where the figure is null.
function figureRow(parent, key, label, figure, makeGraph) {
  let row = $(key);
  if (!row) {
    row = Object.assign(element("div", "meter"), { id: key });
    row.append(element("span", "", label), element("b", ""), makeGraph());
    $(parent).append(row);
  }
  row.hidden = figure == null;
  write(row.children[1], figure ?? "");
  return row.lastChild;
}

function button(text, label, action, className = "") {
  const made = Object.assign(element("button", className, text), { type: "button", ariaLabel: label });
  made.onclick = async () => {
    if (made.ariaDisabled === "true") return;
    made.ariaDisabled = "true";  // `disabled` would take the focus away
    await action().catch(() => show("The service did not answer."));
    made.ariaDisabled = "false";
    poll();
  };
  return made;
}

// A name may be broken behind the signs between its words.
function nameOf(text) {
  const name = element("span", "name");
  name.append(...text.split(/(?<=[/:_])/).flatMap((part) => [part, document.createElement("wbr")]));
  return name;
}

function modelRow({ name, size: bytes }) {
  const row = element("li", "");
  const [state, figures, actions] = [element("p", "state"), element("p", "figures"), element("div", "actions")];
  const unload = button("Unload", `Unload ${name}`, async () => {
    if (await ask(`Unload ${name}? An answer under way is ended.`)) report(await call("POST", "/api/cache/clear", { model: name }));
  });
  const verify = button("Verify", `Verify ${name}`, async () => {
    if (!await ask(`Read the files of ${name}, and download again what is damaged or has changed?`)) return;
    const answer = await call("POST", "/api/models/pull", { model: name, verify: true, detach: true });
    if (!answer.ok) report(answer);
  });
  const remove = button("Delete", `Delete ${name}`, async () => {
    if (!await ask(`Delete ${name} from the disk?`)) return;
    let answer = await call("DELETE", "/api/models/delete", { model: name });
    if (answer.code === "model_busy" && await ask(`${name} is in the middle of an answer. End that and delete it?`)) {
      answer = await call("DELETE", "/api/models/delete", { model: name, force: true });
    }
    report(answer);
  }, "danger");
  actions.append(unload, verify, remove);
  actions.hidden = bytes == null;  // a runner without a model
  row.append(nameOf(name), actions, state, figures);
  row.update = (model) => {
    const { details, runner } = model;
    const phase = runner && `${runner.pid} ${runner.state}`;
    if (row.phase !== phase) Object.assign(row, { phase, since: runner && clock(Date.now() - 1000 * runner.seconds) });
    const words = { busy: `busy, ${runner?.tokens_per_second.toFixed(1)} tokens/s`, idle: "idle", loading: "loading" };
    const word = runner ? words[runner.state] || `${runner.state} since ${row.since}` : model.loaded ? "loaded" : "not loaded";
    write(state, word, `state ${runner ? COLOURS[runner.state] : "off"}`);
    const part = model.loaded && model.size_vram ? Math.floor(100 * model.size_vram / model.size_loaded) : 0;
    const context = model.context_length || details.context_length;
    const facts = [bytes && size(bytes), details.quantization_level, context && `context ${context.toLocaleString("en")}`];
    if (model.loaded) {
      const until = new Date(model.expires_at);
      facts.push(part ? `loaded, ${part} % on the GPU` : "loaded, in system memory");
      facts.push(until.getFullYear() > 2100 ? "stays loaded" : until < new Date() ? "unloads after its answer" : `until ${clock(until)}`);
    }
    write(figures, facts.filter(Boolean).join(" · "));
    unload.hidden = !model.loaded && !runner && document.activeElement !== unload;
  };
  return row;
}

function pullRow({ key: model }) {
  const row = element("li", "");
  const [bar, figures] = [document.createElement("progress"), element("p", "figures")];
  const cancel = button("Cancel", `Cancel the download of ${model}`, async () => report(await call("DELETE", "/api/models/pull", { model })));
  Object.assign(bar, { max: 100, ariaLabel: `Download of ${model}` });
  row.append(nameOf(model), cancel, bar, figures);
  row.update = (pull) => {
    const running = pull.state === "running";
    cancel.hidden = bar.hidden = !running;
    bar.value = pull.percent;
    const facts = [pull.status, `${pull.percent.toFixed(1)} %`, `${size(pull.completed_bytes)} of ${size(pull.total_bytes)}`,
      `${size(pull.bytes_per_second)}/s`, duration(pull.eta_seconds)];
    const outcome = pull.error || `downloaded, ${size(pull.total_bytes)}`;
    write(figures, running ? facts.filter(Boolean).join(" · ") : outcome, pull.state === "error" ? "error" : "figures");
  };
  return row;
}

function meter(key, label, figure, value, max) {
  const bar = figureRow("meters", key, label, figure, () => Object.assign(document.createElement("meter"), { ariaLabel: label }));
  Object.assign(bar, { max: max || 100, value: value || 0 });
}

function showStats(stats) {
  const { gpus, memory, disk } = stats;
  const names = gpus.map(({ name }) => name);
  write($("gpus"), [...new Set(names)].map((name) => (names.length > 1 ? `${names.filter((n) => n === name).length} × ${name}` : name)).join(", "));
  const degrees = parseInt(stats.gpu_temperature);
  meter("temperature", "GPU temperature", isNaN(degrees) ? null : stats.gpu_temperature, degrees, 110);
  const used = stats.gpu === "none" ? null : `${megabytes(memory.used_mb)} of ${megabytes(memory.total_mb)}`;
  meter("memory", "System memory", used, memory.percent);
  meter("space", "Disk", disk && `${size(disk.free_bytes)} free of ${size(disk.total_bytes)}`, disk?.total_bytes - disk?.free_bytes, disk?.total_bytes);
}

// Names that share a digest share their files.
function showDisk(disk) {
  const taken = [...new Map(models.map((model) => [model.digest, model.size])).values()].reduce((sum, bytes) => sum + bytes, 0);
  const unused = disk.unused_bytes == null ? "what is unused cannot be told" : `a prune would free ${size(disk.unused_bytes)}`;
  const parts = disk.partial_bytes ? `unfinished downloads ${size(disk.partial_bytes)}` : "";
  write($("disk"), [`Models take ${size(taken)}`, parts, unused].filter(Boolean).join(" · "));
  $("prune").ariaDisabled = String(!disk.unused_bytes);
}

function showModels(runners) {
  const same = (model, runner) => runner.model?.toLowerCase() === model.name.toLowerCase();
  const shown = models.map((model) => ({ key: model.name, ...model, runner: runners.find((runner) => same(model, runner)) }));
  const others = runners.filter((runner) => !shown.some((model) => model.runner === runner));
  rows($("models"), [...shown, ...others.map((runner) => (
    { key: runner.pid, name: `${runner.model || "unknown model"}, process ${runner.pid}`, details: {}, runner }))], modelRow);
  $("no-models").hidden = models.length > 0;
}

function showHealth(health) {
  const reason = health.ok ? "The service works." : (health.reason || health.error).replace(/ for \d+ s,.*/, ".");
  const words = [reason, WORDS[health.gpu], WORDS[health.recommended_action]];
  const warnings = health.warnings || [];
  const wrong = warnings.length || words.slice(1).some(Boolean);
  if (health.load?.state === "loading") words.push(`${health.load.model} is being loaded.`);
  write($("state"), words.filter(Boolean).join(" "), health.ok ? wrong ? "warn" : "good" : "bad");
  rows($("warnings"), warnings.map((each, index) => ({ key: `${each.code} ${index}`, ...each })), () => textRow(({ message }) => message, "warn"));
}

function show(text, steps = [], className = "bad") {
  const list = steps.map(({ step, ok, seconds, detail }) =>
    element("p", ok ? "figures" : "warn", `${step.replaceAll("_", " ")}: ${detail} (${seconds.toFixed(1)} s)`));
  $("outcome").replaceChildren(element("p", className, text), ...list);
  $("outcome").scrollIntoView({ block: "nearest" });
}

function report(answer) {
  show(answer.ok ? answer.message + (answer.freed_bytes ? ` ${size(answer.freed_bytes)} came free.` : "") : answer.error, answer.steps, answer.ok ? "good" : "bad");
}

async function round() {
  const paths = ["/api/stats", "/health", "/api/models/pull", "/api/models"];
  const [stats, health, listed, list] = await Promise.all(paths.map((path) => call("GET", path)));
  models = list.models || models;  // what hangs does not hide what is known
  showHealth(health);
  const pulls = listed.pulls.map((pull) => ({ key: pull.model, ...pull }));
  rows($("pulls"), pulls.filter((p, i) => pulls.findIndex((q) => q.key === p.key) === i), pullRow);
  showHistory(stats);
  showStats(stats);
  if (stats.disk) showDisk(stats.disk);
  showModels(stats.runners);
  return pulls.some((p) => p.state === "running") || stats.runners.some((r) => r.state !== "idle") || health.load?.state === "loading";
}

let timer = 0;
async function poll() {
  if (timer === null || document.hidden) return;
  clearTimeout(timer);
  timer = null;  // a round is under way
  const busy = await round().catch(() => write($("state"), "The service is not reachable. This page comes back by itself.", "bad"));
  timer = setTimeout(poll, busy ? 2000 : 5000);
}

$("pull-form").onsubmit = async (event) => {
  event.preventDefault();
  const model = $("pull-name").value.trim();
  const answer = await call("POST", "/api/models/pull", { model, detach: true }).catch(() => ({ error: "The service did not answer." }));
  write($("pull-error"), answer.ok ? "" : answer.error);
  if (answer.ok) $("pull-name").value = "";
  poll();
};
for (const [id, path, text, question] of [
  ["clear", "/api/cache/clear", "Clear memory", "Unload all models? Answers under way are ended."],
  ["reset", "/api/session/reset", "Reset session", "Unload all and load the default model? Answers under way are ended."],
  ["prune", "/api/models/prune", "Prune", "Remove what no model uses and nothing has touched for an hour?"]]) {
  $("heal").append(Object.assign(button(text, text, async () => { if (await ask(question)) report(await call("POST", path)); }), { id }));
}
document.addEventListener("visibilitychange", poll);
poll();
