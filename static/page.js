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
let token = sessionStorage.getItem("token") || "";
let asking = null;

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
  const unit = bytes >= 1e9 ? ["GB", 1e9] : ["MB", 1e6];
  return `${(bytes / unit[1]).toFixed(bytes >= 1e10 ? 0 : 1)} ${unit[0]}`;
}

function duration(seconds) {
  if (seconds == null) return "";
  const [h, m] = [Math.floor(seconds / 3600), Math.floor(seconds / 60) % 60];
  return h ? `${h} h ${m} min left` : m ? `${m} min ${seconds % 60} s left` : `${seconds} s left`;
}

async function call(method, path, body) {
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  if (body) headers["Content-Type"] = "application/json";
  const response = await fetch(path, { method, headers, body: body && JSON.stringify(body) });
  if (response.status !== 401) return { ok: response.ok, ...await response.json() };
  asking ??= newToken().finally(() => { asking = null; });
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

// Keeps one row for each name, in place, so that focus and scroll survive the polling.
function rows(list, items, make) {
  const old = new Map([...list.children].map((row) => [row.dataset.model, row]));
  items.forEach((item, index) => {
    const row = old.get(item.model) || make(item);
    old.delete(item.model);
    row.dataset.model = item.model;
    row.update(item);
    if (list.children[index] !== row) list.insertBefore(row, list.children[index] || null);
  });
  old.forEach((row) => row.remove());
}

function button(text, label, action) {
  const made = Object.assign(element("button", "", text), { type: "button", ariaLabel: label });
  made.onclick = async () => {
    made.disabled = true;
    await action().catch(() => show("The service did not answer."));
    made.disabled = false;
    poll();
  };
  return made;
}

function modelRow({ name }) {
  const row = element("li", "");
  const [figures, actions] = [element("p", "figures"), element("div", "actions")];
  const unload = button("Unload", `Unload ${name}`, async () => {
    if (await ask(`Unload ${name}? An answer under way is ended.`)) report(await call("POST", "/api/cache/clear", { model: name }));
  });
  const remove = button("Delete", `Delete ${name}`, async () => {
    if (!await ask(`Delete ${name} from the disk?`)) return;
    let answer = await call("DELETE", "/api/models/delete", { model: name });
    if (answer.code === "model_busy" && await ask(`${name} is in the middle of an answer. End that and delete it?`)) {
      answer = await call("DELETE", "/api/models/delete", { model: name, force: true });
    }
    report(answer);
  });
  remove.className = "danger";
  actions.append(unload, remove);
  row.append(element("span", "name", name), actions, figures);
  row.update = (model) => {
    const { details } = model;
    const part = model.loaded && model.size_vram ? Math.round(100 * model.size_vram / model.size_loaded) : 0;
    const context = model.context_length || details.context_length;
    const facts = [size(model.size), details.quantization_level, context && `context ${context.toLocaleString("en")}`];
    if (model.loaded) {
      const until = new Date(model.expires_at);
      facts.push(part ? `loaded, ${part} % on the GPU` : "loaded, in system memory");
      facts.push(until.getFullYear() > 2100 ? "stays loaded" : until < new Date() ? "busy, then unloads" : `until ${until.toLocaleTimeString()}`);
      if (part && part < 99) facts.push("partly on the CPU and slow: set LLM_GPU_LAYERS=auto or take a smaller model");
    } else facts.push("not loaded");
    write(figures, facts.filter(Boolean).join(" · "), `figures${part && part < 99 ? " warn" : ""}`);
    unload.hidden = !model.loaded;
  };
  return row;
}

function pullRow({ model }) {
  const row = element("li", "");
  const [bar, figures] = [document.createElement("progress"), element("p", "figures")];
  const cancel = button("Cancel", `Cancel the download of ${model}`, async () => report(await call("DELETE", "/api/models/pull", { model })));
  Object.assign(bar, { max: 100, ariaLabel: `Download of ${model}` });
  row.append(element("span", "name", model), cancel, bar, figures);
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

function meter(key, label, text, value, max) {
  let row = $(`meter-${key}`);
  if (!row) {
    row = Object.assign(element("div", "meter"), { id: `meter-${key}` });
    row.append(element("span", "", label), element("b", ""), document.createElement("meter"));
    row.lastChild.ariaLabel = label;
    $("meters").append(row);
  }
  write(row.children[1], text);
  row.lastChild.hidden = value == null;
  Object.assign(row.lastChild, { max: max || 100, value: value || 0 });
}

function showStats(stats) {
  const [used, total] = stats.gpu_memory.match(/\d+/g)?.map(Number) || [];
  meter("gpu", stats.gpus.map((gpu) => gpu.name).join(", ") || "GPU", stats.gpu === "none" ? "none" : stats.gpu_utilization, parseInt(stats.gpu_utilization) || null);
  meter("gpu-memory", "GPU memory", total ? `${size(used * 2 ** 20)} of ${size(total * 2 ** 20)}` : stats.gpu_memory, used, total);
  meter("temperature", "GPU temperature", stats.gpu_temperature, parseInt(stats.gpu_temperature) || null, 110);
  meter("memory", "System memory", `${size(stats.memory.used_mb * 2 ** 20)} of ${size(stats.memory.total_mb * 2 ** 20)}`, stats.memory.percent);
  const disk = stats.disk || {};
  meter("disk", "Disk", `${size(disk.free_bytes)} free`, disk.total_bytes - disk.free_bytes || null, disk.total_bytes);
}

function showHealth(health) {
  const words = [health.ok ? "The service works." : health.reason, WORDS[health.gpu], health.warning, WORDS[health.recommended_action]];
  const wrong = words.slice(1).some(Boolean);
  if (health.load?.state === "loading") words.push(`${health.load.model} is being loaded.`);
  write($("state"), words.filter(Boolean).join(" "), health.ok ? wrong ? "warn" : "good" : "bad");
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
  const health = await call("GET", "/health");
  showHealth(health);
  showStats(await call("GET", "/api/stats"));
  const { pulls } = await call("GET", "/api/models/pull");
  rows($("pulls"), pulls.filter((p, i) => pulls.findIndex((q) => q.model === p.model) === i), pullRow);
  if (health.ok) {
    const { models } = await call("GET", "/api/models");
    rows($("models"), models.map((m) => ({ model: m.name, ...m })), modelRow);
    $("no-models").hidden = models.length > 0;
  }
  return pulls.some((p) => p.state === "running") || health.load?.state === "loading";
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
  ["reset", "/api/session/reset", "Reset session", "Unload all and load the default model? Answers under way are ended."]]) {
  $("heal").append(Object.assign(button(text, text, async () => { if (await ask(question)) report(await call("POST", path)); }), { id }));
}
document.addEventListener("visibilitychange", poll);
poll();
