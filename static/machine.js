// The machine's figures: each GPU on its own, memory, disk, and what frees them.

import { call } from "./calls.js";
import { $, ask, element, figureRow, rows, write } from "./dom.js";
import { count, megabytes, percent, size } from "./format.js";
import { latest } from "./known.js";
import { action, say, sayError } from "./messages.js";
import { CALM_GPU_STATES, GPU_STATES } from "./words.js";

const CLEAR_S = 10;
const PRUNE_S = 60;
const WARM = 0.85; // of a memory, a disk: then its meter is no longer green
const HOT = 0.95;

export function showMachine() {
  const stats = latest("stats");
  if (!stats) return;
  showGpus(stats);
  showMeters(stats);
  showDisk(stats.disk);
}

function showGpus({ gpu, gpus }) {
  const calm = CALM_GPU_STATES.includes(gpu);
  write($("gpu-state"), GPU_STATES[gpu] ?? "", calm ? "figures" : "bad");
  rows(
    $("gpus"),
    gpus.map((each) => ({ ...each, key: each.uuid ?? each.index, alone: gpus.length === 1 })),
    gpuRow,
  );
}

function gpuRow() {
  const title = element("p", { className: "name" });
  const facts = element("p", { className: "figures" });
  const meters = element("div");
  const row = element("div", { className: "gpu" }, title, meters, facts);
  row.update = (gpu) => {
    const colour = gpu.alone ? "" : ` series${gpu.index % 4}`; // of its curve
    write(title, `GPU ${gpu.index} · ${gpu.name ?? "no name"}`, `name${colour}`);
    const { utilization_percent: load, memory_used_mb: used, memory_total_mb: total } = gpu;
    const meter = (key, label, value, max, figure) =>
      value != null && { key, label, value, max, figure };
    const memory = `${megabytes(used)} of ${megabytes(total)}`;
    const shown = [
      meter("load", "Load", load, 100, load == null ? "" : percent(load)),
      meter("memory", "Memory", total == null ? null : used, total, memory),
    ];
    rows(
      meters,
      shown.filter(Boolean).map((each) => ({ ...each, of: title.textContent })),
      meterRow,
    );
    write(facts, [...gpuFacts(gpu), ...unknownOf(gpu)].join(" · "));
  };
  return row;
}

function gpuFacts({
  temperature_c: degrees,
  power_w: own,
  board_power_w: board,
  power_rail: rail,
}) {
  const facts = [
    degrees != null && `${degrees}\u00a0°C`,
    own != null && `${Math.round(own)}\u00a0W`,
  ];
  if (board != null) facts.push(`${Math.round(board)}\u00a0W (${rail})`);
  return facts.filter(Boolean);
}

// A meter that is not there would look like an idle GPU. Of a shared memory the system tells.
function unknownOf({ utilization_percent: load, memory_used_mb: used, memory_total_mb: total }) {
  const memory = (used == null || total == null) && latest("stats").gpu !== "unified";
  return [load == null && "load not known", memory && "memory not known"].filter(Boolean);
}

function meterRow({ key, label, of = "" }) {
  const bar = element("meter", { ariaLabel: `${of} ${label}`.trim(), min: 0 });
  return figureRow(label, bar, ({ figure, value, max, low }) => {
    // A high load is ordinary; a memory or a disk that is almost full is not.
    const [warm, hot] =
      key === "load" ? [max, max] : [WARM * max, low ? value - max / 1e6 : HOT * max];
    Object.assign(bar, { max, low: Math.min(warm, hot), high: hot, optimum: 0, value });
    return figure;
  });
}

function showMeters({ cpu_percent: cpu, memory, disk }) {
  const low = latest("health")?.warnings?.some(({ code }) => code === "disk_low");
  const { total_bytes: total, free_bytes: free } = disk ?? {};
  const shown = [
    cpu != null && { key: "load", label: "CPU load", figure: percent(cpu), value: cpu, max: 100 },
    {
      key: "memory",
      label: "System memory",
      figure: `${megabytes(memory.used_mb)} of ${megabytes(memory.total_mb)}`,
      value: memory.used_mb,
      max: memory.total_mb,
    },
    disk && {
      key: "disk",
      label: low ? "Disk, almost full" : "Disk",
      figure: `${size(total - free)} of ${size(total)}, ${size(free)}\u00a0free`,
      value: total - free,
      max: total,
      low,
    },
  ];
  const keyed = shown
    .filter(Boolean)
    .map((each) => ({ ...each, key: each.low ? "disk low" : each.key }));
  rows($("meters"), keyed, meterRow);
}

function showDisk(disk) {
  const { unused_bytes: unused, partial_bytes: parts } = disk ?? {};
  const taken = disk?.models_bytes;
  const facts = [
    taken != null && `models take ${size(taken)}`,
    parts && `unfinished downloads ${size(parts)}`,
  ];
  const words = `files that no model uses ${size(unused)}`;
  facts.push(unused == null ? "which files no model uses cannot be told" : words);
  write($("disk"), facts.filter(Boolean).join(" · "));
  $("prune").ariaDisabled = String(!unused);
}

// What the buttons do

async function clearMemory() {
  const question = "Unload all models? Answers under way are ended.";
  if (!(await ask(question, "Clear memory", true))) return;
  const answer = await call("POST", "api/cache/clear", null, CLEAR_S);
  if (!answer.ok) return sayError("The memory was not cleared", answer);
  const { unloaded_models: unloaded = [], killed = [], left = [], memory } = answer;
  const facts = [
    unloaded.length ? `${count(unloaded.length, "model")} unloaded` : "nothing was loaded",
  ];
  if (unloaded.length) facts.push(`${megabytes(memory?.freed_mb)} came free`);
  if (killed.length) facts.push(`${count(killed.length, "runner")} ended`);
  if (left.length) facts.push(`still there: ${left.join(", ")}`);
  say(`The memory is cleared: ${facts.join(", ")}.`);
}

export async function resetSession() {
  const model = latest("info")?.default_model ?? "the default model";
  const question = `Unload all models and load ${model}, if it is there? Answers under way are ended.`;
  if (!(await ask(question, "Reset session", true))) return;
  const answer = await call("POST", "api/session/reset", null, CLEAR_S);
  const steps = (answer.steps ?? []).map(stepLine);
  if (!answer.ok) return sayReset(answer, steps);
  const states = { loaded: "is loaded", loading: "is being loaded" };
  const end = answer.model
    ? `${answer.model} ${states[answer.model_state] ?? "is not loaded"}`
    : "no model is loaded";
  say(`The session is reset; ${end}.`, "good", ...steps);
}

function sayReset(answer, steps) {
  if (!steps.length) return sayError("The session was not reset", answer);
  say(`The session was not reset: ${answer.error}`, "bad", ...steps);
}

function stepLine({ step, ok, detail, seconds }) {
  const words = `${step.replaceAll("_", " ")}: ${detail} (${seconds.toFixed(1)} s)`;
  return element("p", { className: ok ? "figures" : "warn" }, words);
}

async function prune() {
  const unused = latest("stats")?.disk?.unused_bytes;
  if (!unused) return;
  const question = "Remove the files that no model uses and nothing has touched for an hour?";
  if (!(await ask(question, `Prune, frees ${size(unused)}`, true))) return;
  const answer = await call("POST", "api/models/prune", null, PRUNE_S);
  if (!answer.ok) return sayError("Nothing was pruned", answer);
  say(`Pruned: ${count(answer.files, "file")} removed, ${size(answer.freed_bytes)} came free.`);
}

export const resetButton = () => {
  const made = action("Reset session", null, resetSession);
  made.update = () => {};
  return made;
};

$("heal").append(
  Object.assign(action("Clear memory", null, clearMemory), { id: "clear" }),
  Object.assign(action("Reset session", null, resetSession), { id: "reset" }),
);
$("space").append(Object.assign(action("Prune", null, prune), { id: "prune" }));
