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
let [asking, models] = [null, []];  // the token's dialog while it is open, the last list

function element(tag, properties, ...content) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...content);
  return made;
}

// Text is only written where it changed: screen readers and selections stay undisturbed.
function write(node, text, className = node.className) {
  if (node.textContent !== text) node.textContent = text;
  if (node.className !== className) node.className = className;
}

function size(bytes) {
  if (bytes == null) return "?";
  const [unit, one] = bytes >= 1e9 ? ["GB", 1e9] : bytes >= 1e5 || !bytes ? ["MB", 1e6] : ["kB", 1e3];
  return `${(bytes / one).toFixed(bytes >= 1e10 ? 0 : 1)}\u00a0${unit}`;
}

const send = (...request) => call(...request).catch(() => ({ error: "The service did not answer." }));
const clock = (moment) => new Date(moment).toTimeString().slice(0, 8);
const duration = (seconds) => seconds != null && `${seconds < 60 ? "" : `${Math.floor(seconds / 60)} min `}${seconds % 60} s left`;

async function call(method, path, body) {
  const sent = token;
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  if (body) headers["Content-Type"] = "application/json";
  const response = await fetch(path, { method, headers, body: body && JSON.stringify(body) });
  if (response.status !== 401) return { ok: response.ok, ...await response.json() };
  const words = sent ? "That token is not the right one." : "This service wants its token (LLM_API_TOKEN).";
  if (sent === token) await (asking ??= ask("token", words));
  [token, asking] = [$("token-input").value, null];
  sessionStorage.setItem("token", token);
  return call(method, path, body);
}

// Opens the dialog of this id; the answer is the value of the button that closed it.
function ask(id, question) {
  $(`${id}-text`).textContent = question;
  $(id).returnValue = "";
  $(id).showModal();
  return new Promise((resolve) => { $(id).onclose = () => resolve($(id).returnValue); });
}

// Keeps one row for each key, in place, so that focus, selection and scroll survive the polling.
function rows(list, items, make) {
  const old = new Map([...list.children].map((row) => [row.dataset.key, row]));
  const wanted = items.map(({ key }) => String(key));
  for (const row of [...list.children].filter((each) => !wanted.includes(each.dataset.key))) {
    if (row.contains(document.activeElement)) list.closest("section").querySelector("h2").focus();
    row.remove();
  }
  items.forEach((item, index) => {
    const row = old.get(String(item.key)) || make(item);
    row.dataset.key = item.key;
    row.update(item);
    if (list.children[index] !== row) list.insertBefore(row, list.children[index] || null);
  });
}

function textRow(words, className = "") {
  const row = element("p", { className });
  row.update = (item) => write(row, words(item));
  return row;
}

// A label, a figure, and a chart or a meter, which is drawn anew and returns the figure.
function figureRow(label, graph, draw) {
  const row = element("div", { className: "meter" }, element("span", {}, label), element("b"), graph);
  row.update = (item) => write(row.children[1], draw(item));
  return row;
}

function meterRow({ label }) {
  const bar = element("meter", { ariaLabel: label });
  return figureRow(label, bar, ({ figure, value, max }) => Object.assign(bar, { max, value }) && figure);
}

// A button that asks, where there is a question, then calls and shows what came of it.
function action(text, model, question, method, path, fields, className = "") {
  const made = element("button", { className, type: "button", ariaLabel: model ? `${text} ${model}` : text }, text);
  const body = model && { model, ...fields };
  made.onclick = async () => {
    if (made.ariaDisabled === "true" || question && await ask("ask", question) !== "yes") return;
    made.ariaDisabled = "true";  // `disabled` would take the focus away
    let answer = await send(method, path, body);
    if (answer.code === "model_busy" && await ask("ask", `${model} is in the middle of an answer. End that and delete it?`) === "yes") {
      answer = await send(method, path, { ...body, force: true });
    }
    report(answer);
    made.ariaDisabled = "false";
    poll();
  };
  return made;
}

function report({ ok, status, message, error, freed_bytes: freed, steps = [] }) {
  const done = status === "accepted" ? "It is under way: see the downloads." : message + (freed ? ` ${size(freed)} came free.` : "");
  const words = ({ step, detail, seconds }) => `${step.replaceAll("_", " ")}: ${detail} (${seconds.toFixed(1)} s)`;
  $("outcome").replaceChildren(element("p", { className: ok ? "good" : "bad" }, ok ? done : error),
    ...steps.map((each) => element("p", { className: each.ok ? "figures" : "warn" }, words(each))));
  $("outcome").scrollIntoView({ block: "nearest" });
}

function modelRow({ name, size: bytes }) {
  const [title, state, figures] = ["name", "state", "figures"].map((className) => element("p", { className }));
  title.textContent = name;
  const unload = action("Unload", name, `Unload ${name}? An answer under way is ended.`, "POST", "/api/cache/clear");
  const verify = action("Verify", name, `Read the files of ${name}, and download again what is damaged or has changed?`,
    "POST", "/api/models/pull", { verify: true, detach: true });
  const remove = action("Delete", name, `Delete ${name} from the disk?`, "DELETE", "/api/models/delete", {}, "danger");
  const [about, actions] = [element("div", { className: "about" }, title, state, figures), element("div", { className: "actions" })];
  if (bytes != null) actions.append(unload, verify, remove);  // a runner may be without a model
  const row = element("li", {}, about, actions);
  row.update = ({ details = {}, runner, ...model }) => {
    const phase = runner && `${runner.pid} ${runner.state}`;
    if (row.phase !== phase) Object.assign(row, { phase, since: runner && clock(Date.now() - 1000 * runner.seconds) });
    const words = { busy: `busy, ${runner?.tokens_per_second.toFixed(1)} tokens/s`, idle: "idle", loading: "loading" };
    const word = runner ? words[runner.state] || `${runner.state} since ${row.since}` : model.loaded ? "loaded" : "not loaded";
    write(state, word, `state ${COLOURS[runner?.state] || "off"}`);
    const context = model.context_length || details.context_length;
    const facts = [bytes && size(bytes), details.quantization_level, context && `context ${context.toLocaleString("en")}`];
    if (model.loaded) {
      const [part, until] = [Math.floor(100 * model.size_vram / model.size_loaded), new Date(model.expires_at)];
      facts.push(part ? `loaded, ${part} % on the GPU` : "loaded, in system memory");
      facts.push(until.getFullYear() > 2100 ? "stays loaded" : until < new Date() ? "unloads after its answer" : `until ${clock(until)}`);
    }
    write(figures, facts.filter(Boolean).join(" · "));
    unload.hidden = !model.loaded && document.activeElement !== unload;
  };
  return row;
}

function pullRow({ key: model }) {
  const bar = element("progress", { max: 100, ariaLabel: `Download of ${model}` });
  const [figures, cancel] = [element("p"), action("Cancel", model, null, "DELETE", "/api/models/pull")];
  const row = element("li", {}, element("p", { className: "about name" }, model), cancel, bar, figures);
  row.update = (pull) => {
    const running = pull.state === "running";
    cancel.hidden = bar.hidden = !running;
    bar.value = pull.percent;
    const [done, total, speed] = [pull.completed_bytes, pull.total_bytes, pull.bytes_per_second].map(size);
    const facts = [pull.status, `${pull.percent.toFixed(1)} %`, `${done} of ${total}`, `${speed}/s`, duration(pull.eta_seconds)];
    const words = running ? facts.filter(Boolean).join(" · ") : pull.error || `downloaded, ${total}`;
    write(figures, words, pull.state === "error" ? "error" : "figures");
  };
  return row;
}

function showStats({ gpu, gpus, gpu_temperature: degrees, memory, disk }) {
  const names = Object.entries(Object.groupBy(gpus, ({ name }) => name));
  write($("gpus"), names.map(([name, { length }]) => (length > 1 ? `${length} × ${name}` : name)).join(", "));
  const { total_bytes: total, free_bytes: free, unused_bytes: unused, partial_bytes: parts } = disk || {};
  rows($("meters"), [
    degrees !== "N/A" && { key: "temperature", label: "GPU temperature", figure: degrees, value: parseInt(degrees), max: 110 },
    gpu !== "none" && { key: "memory", label: "System memory", figure: `${megabytes(memory.used_mb)} of ${megabytes(memory.total_mb)}`,
      value: memory.used_mb, max: memory.total_mb },
    disk && { key: "disk", label: "Disk", figure: `${size(free)} free of ${size(total)}`, value: total - free, max: total },
  ].filter(Boolean), meterRow);
  const taken = [...new Map(models.map((each) => [each.digest, each.size])).values()].reduce((sum, bytes) => sum + bytes, 0);
  write($("disk"), [`Models take ${size(taken)}`, parts && `unfinished downloads ${size(parts)}`,
    unused == null ? "what is unused cannot be told" : `a prune would free ${size(unused)}`].filter(Boolean).join(" · "));
  $("prune").ariaDisabled = String(!unused);
}

function showModels(runners) {
  const named = new Map(runners.map((runner) => [runner.model?.toLowerCase(), runner]));
  const shown = models.map((model) => ({ key: model.name, ...model, runner: named.get(model.name.toLowerCase()) }));
  const others = runners.filter((runner) => !shown.some((model) => model.runner === runner))
    .map((runner) => ({ key: runner.pid, name: `${runner.model || "unknown model"}, process ${runner.pid}`, runner }));
  rows($("models"), [...shown, ...others], modelRow);
  $("no-models").hidden = models.length > 0;
}

function showHealth(health) {
  const reason = health.ok ? "The service works." : (health.reason || health.error).replace(/ for \d+ s,.*/, ".");
  const advice = [WORDS[health.gpu], WORDS[health.recommended_action]].filter(Boolean);
  const warnings = (health.warnings || []).map((each, index) => ({ key: `${each.code} ${index}`, ...each }));
  const load = health.load?.state === "loading" ? [`${health.load.model} is being loaded.`] : [];
  write($("state"), [reason, ...advice, ...load].join(" "), !health.ok ? "bad" : advice.length + warnings.length ? "warn" : "good");
  rows($("warnings"), warnings, () => textRow(({ message }) => message, "warn"));
}

async function round() {
  showHealth(await call("GET", "/health"));
  const paths = ["/api/stats", "/api/models/pull", "/api/models"];
  const [stats, { pulls }, list] = await Promise.all(paths.map((path) => call("GET", path)));
  models = list.models || models;  // what hangs does not hide what is known
  showHistory(stats);
  showStats(stats);
  showModels(stats.runners);
  const latest = pulls.filter(({ model }, index) => pulls.findIndex((each) => each.model === model) === index);
  rows($("pulls"), latest.map((pull) => ({ key: pull.model, ...pull })), pullRow);
  return pulls.some(({ state }) => state === "running") || stats.runners.some(({ state }) => state !== "idle");
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
  const answer = await send("POST", "/api/models/pull", { model: $("pull-name").value.trim(), detach: true });
  write($("pull-error"), answer.ok ? "" : answer.error);
  if (answer.ok) $("pull-name").value = "";
  poll();
};
for (const [parent, id, path, text, question] of [
  ["heal", "clear", "/api/cache/clear", "Clear memory", "Unload all models? Answers under way are ended."],
  ["heal", "reset", "/api/session/reset", "Reset session", "Unload all and load the default model? Answers under way are ended."],
  ["space", "prune", "/api/models/prune", "Prune", "Remove the files that no model uses and nothing has touched for an hour?"]]) {
  $(parent).append(Object.assign(action(text, null, question, "POST", path), { id }));
}
document.addEventListener("visibilitychange", poll);
poll();
