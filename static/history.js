// The last hour, as the service keeps it: curves, what happened, and a table.

import { $, element, figureRow, rows, svg, textRow } from "./dom.js";
import { clock, megabytes, percent } from "./format.js";
import { age, latest, OLD_S, refresh } from "./known.js";

const SPAN_S = 3600;
const KEPT = 360;
const GAP_S = 25; // no line is drawn over a gap of which nothing is known
const ROW_S = 300; // of the table
const ASK_S = 9;
const CROWD = 6; // percent of an axis that a number takes on a phone

const past = { series: [], samples: [], marks: [], next: null };
let askedAt = -Infinity;
let pointed = null; // the moment under the pointer

// The charts: which series go into one, how a value reads, what the scale reaches at least.
const CHARTS = [
  { key: "load", label: "GPU load", named: /^gpu\d+_percent$/, words: percent, least: () => 100 },
  { key: "vram", label: "GPU memory", named: /^gpu\d+_memory_mb$/, words: megabytes, least: gpuMb },
  { key: "cpu", label: "CPU load", named: /^cpu_percent$/, words: percent, least: () => 100 },
  { key: "ram", label: "System memory", named: /^memory_mb$/, words: megabytes, least: systemMb },
  {
    key: "tokens",
    label: "Tokens per second",
    named: /^tokens_per_second$/,
    words: (value) => value.toFixed(1),
    least: () => 10,
  },
  {
    key: "waiting",
    label: "Callers waiting",
    named: /^waiting$/,
    words: (value) => value.toFixed(0),
    least: () => 4,
    rare: true, // shown only where there were some
  },
];

function gpuMb() {
  const totals = (latest("stats")?.gpus ?? []).map((gpu) => gpu.memory_total_mb ?? 1);
  return Math.max(1, ...totals);
}

function systemMb() {
  return latest("stats")?.memory.total_mb ?? 1;
}

// Asks for what is new since the last sample, every 10 s.
export async function refreshHistory() {
  const now = performance.now() / 1000;
  if (now - askedAt < ASK_S) return;
  const path = past.next ? `api/history?since=${past.next}` : "api/history";
  const { value, failure } = await refresh("history", path);
  if (failure) return;
  askedAt = now;
  take(value);
}

// `complete` are all samples that the service has, else those since the last time.
function take({ series, samples, marks, complete, next }) {
  const all = complete ? samples : [...past.samples, ...samples];
  Object.assign(past, { series, marks, next, samples: all.slice(-KEPT) });
}

const columns = ({ named, rare }) =>
  past.series
    .map((name, index) => [name, index + 1])
    .filter(([name, index]) => named.test(name) && isKnown(index, rare));
const isKnown = (index, rare) =>
  past.samples.some((sample) => (rare ? sample[index] > 0 : sample[index] != null));

export function showHistory() {
  if (!latest("history")) return;
  const charts = CHARTS.map((chart) => ({ ...chart, columns: columns(chart) }));
  rows(
    $("charts"),
    charts.filter((chart) => chart.columns.length),
    chartRow,
  );
  showAxis();
  const marks = past.marks.length ? numbered(past.marks) : [{ key: "none" }];
  rows($("marks"), marks, ({ key }) => textRow(key === "none" ? noMarkWords : markWords));
  if ($("values").open) showTable();
}

// Two of a kind may have come in one second.
function numbered(marks) {
  const counts = new Map();
  return marks.map((mark, index) => {
    const which = `${mark.at} ${mark.kind}`;
    counts.set(which, (counts.get(which) ?? 0) + 1);
    return { ...mark, key: `${which} ${counts.get(which)}`, number: marks.length - index };
  });
}

// What was before the first sample is not known: the service has started since.
function noMarkWords() {
  const first = past.samples[0]?.[0] ?? newest();
  const whole = newest() - first > SPAN_S - GAP_S;
  const since = whole ? "in the last hour" : `since ${clock(1000 * first)}`;
  return `Nothing was healed, cleared, reset or restarted ${since}.`;
}

function markWords(mark) {
  const { at, kind, what, state, freed_mb: freed, number, ok } = mark;
  const came = freed ? `: ${megabytes(freed)} came free` : "";
  const words = {
    healed: `${ok === false ? "Healing failed" : "Healed"}: ${what ?? "a model"}${state ? ` (${state})` : ""}${came}.`,
    cleared: `Memory cleared${came}.`,
    reset: `Session reset${came}.`,
    restarted: "Ollama restarted.",
  };
  return `${number} · ${clock(at)} ${words[kind] ?? kind}`;
}

const newest = () => past.samples.at(-1)?.[0] ?? Date.parse(latest("history").timestamp) / 1000;
const place = (at) => 100 - (100 * (newest() - at)) / SPAN_S;

// A value that is not known leaves a gap, as a time without a sample does.
function pathOf(index, top) {
  let last = null;
  let path = "";
  for (const sample of past.samples) {
    if (sample[index] == null) continue;
    const point = `${(6 * place(sample[0])).toFixed(1)} ${(100 - (100 * sample[index]) / top).toFixed(1)}`;
    path += last !== null && sample[0] - last < GAP_S ? `L${point}` : `M${point}h0`;
    last = sample[0];
  }
  return path;
}

function chartRow({ label, words, least }) {
  const chart = svg("svg", { class: "chart", role: "img" });
  chart.addEventListener("pointermove", (event) => point(chart, event));
  chart.addEventListener("pointerleave", () => point(chart, null));
  return figureRow(label, chart, ({ columns: shown }) => {
    const values = shown.flatMap(([, index]) => past.samples.map((sample) => sample[index]));
    const most = Math.max(...values.filter((value) => value != null));
    const top = Math.max(least(), most);
    const lines = shown.map(([, index], order) => curve(index, top, order));
    const ends = past.marks.map(({ at }) => markLine(place(Date.parse(at) / 1000)));
    const parts = [curves(lines), ...ends, svg("text", { x: 2, y: 12 }, words(top))];
    if (pointed !== null) parts.push(cursorLine(place(pointed)));
    chart.replaceChildren(...parts);
    const figure = figureAt(shown, words);
    chart.ariaLabel = `${label}: ${figure}, in the last hour at most ${words(most)}`;
    return figure;
  });
}

const curves = (lines) =>
  svg("svg", { viewBox: "0 -3 600 106", preserveAspectRatio: "none" }, ...lines);
const curve = (index, top, order) =>
  svg("path", { class: `curve curve${order % 4}`, d: pathOf(index, top) });
const markLine = (x) =>
  svg("line", { class: "mark", x1: `${x.toFixed(2)}%`, x2: `${x.toFixed(2)}%`, y2: "100%" });
const cursorLine = (x) =>
  svg("line", { class: "cursor", x1: `${x.toFixed(2)}%`, x2: `${x.toFixed(2)}%`, y2: "100%" });

// The value of each series now, or under the pointer.
function figureAt(shown, words) {
  const sample = pointed === null ? past.samples.at(-1) : nearest(pointed);
  const figures = shown.map(([name, index]) => {
    const value = sample?.[index] == null ? "not known" : words(sample[index]);
    const gpu = /^gpu(\d+)_/.exec(name);
    return gpu && shown.length > 1 ? `${gpu[1]}:\u00a0${value}` : value;
  });
  return (pointed === null ? "" : `${clock(1000 * sample[0])} `) + figures.join(", ");
}

function nearest(moment) {
  const distance = ([at]) => Math.abs(at - moment);
  return past.samples.reduce((best, sample) => (distance(sample) < distance(best) ? sample : best));
}

function point(chart, event) {
  if (!past.samples.length) return;
  const { left, width } = chart.getBoundingClientRect();
  pointed = event ? nearest(newest() - SPAN_S * (1 - (event.clientX - left) / width))[0] : null;
  showHistory();
}

function showAxis() {
  const [left, right] =
    age("history") > OLD_S
      ? [newest() - SPAN_S, newest()].map((at) => clock(1000 * at))
      : ["1 h ago", "now"];
  const ends = [
    svg("text", { y: 28 }, left),
    svg("text", { x: "100%", y: 28, "text-anchor": "end" }, right),
  ];
  $("axis").replaceChildren(...crowds(past.marks).map(markNumber), ...ends);
}

// Marks whose numbers would lie on each other share one text.
function crowds(marks) {
  const found = [];
  for (const { at, number } of numbered(marks)) {
    const x = place(Date.parse(at) / 1000);
    const last = found.at(-1);
    if (last && Math.abs(x - last.x) < CROWD) last.numbers.push(number);
    else found.push({ x, numbers: [number] });
  }
  return found;
}

function markNumber({ x, numbers }) {
  const [least, most] = [Math.min(...numbers), Math.max(...numbers)];
  const words = least === most ? least : `${least}–${most}`;
  const at = { x: `${x.toFixed(2)}%`, y: 12, "text-anchor": "middle" };
  return svg("text", { class: "mark", ...at }, words);
}

// Each row is five minutes: the mean of what is known of them.
function showTable() {
  const shown = CHARTS.flatMap((chart) =>
    columns(chart).map(([name, index]) => ({ ...chart, name, index })),
  );
  const gpus = new Set(past.series.map((name) => /^gpu\d+/.exec(name)?.[0]).filter(Boolean));
  const title = ({ label, name }) => {
    const gpu = gpus.size > 1 && /^gpu(\d+)_/.exec(name); // "GPU load 0" would look like a value
    return gpu ? label.replace("GPU", `GPU ${gpu[1]}`) : label;
  };
  const head = element("tr", {}, element("th", { scope: "col" }, "From"));
  head.append(...shown.map((each) => element("th", { scope: "col" }, title(each))));
  const spans = new Map();
  for (const sample of past.samples) {
    const start = Math.floor(sample[0] / ROW_S) * ROW_S;
    spans.set(start, [...(spans.get(start) ?? []), sample]);
  }
  const lines = [...spans].reverse().map(([start, samples]) => tableRow(start, samples, shown));
  const caption = element("caption", {}, "Means of five minutes each, the newest first");
  $("values")
    .querySelector("table")
    .replaceChildren(caption, head, ...lines);
}

function tableRow(start, samples, shown) {
  const row = element("tr", {}, element("th", { scope: "row" }, clock(1000 * start).slice(0, 5)));
  for (const { index, words } of shown) {
    const values = samples.map((sample) => sample[index]).filter((value) => value != null);
    const sum = values.reduce((total, value) => total + value, 0);
    row.append(element("td", {}, values.length ? words(sum / values.length) : "–"));
  }
  return row;
}

$("values").addEventListener("toggle", showHistory);
