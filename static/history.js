"use strict";

// What was polled in the last ten minutes and what happened then. It outlives a reload of the tab.
const [SPAN_MS, GAP_MS] = [600_000, 20_000];  // no line is drawn over a gap of which nothing is known
const TOGETHER_MS = 10_000;  // events so near to each other share a mark
const past = JSON.parse(sessionStorage.getItem("past")) || { samples: [], marks: [], count: 0, last: {} };
const percent = (value) => `${Math.round(value)} %`;
const megabytes = (value) => size(value * 2 ** 20);
const known = (key) => past.samples.filter((sample) => Number.isFinite(sample[key]?.[0]));
const place = ({ at }, now) => `${(100 - 100 * (now - at) / SPAN_MS).toFixed(2)}%`;
const CHARTS = [  // a sample's key, the label, how a value reads, what stands before the top of the scale
  { key: "load", label: "GPU load", words: percent }, { key: "vram", label: "GPU memory", words: megabytes, of: " of " },
  { key: "cpu", label: "CPU load", words: percent }, { key: "ram", label: "System memory", words: megabytes, of: " of " },
  { key: "tokens", label: "Tokens per second", words: (value) => value.toFixed(1) },
];

function mark(at, words) {
  const near = past.marks.find((each) => Math.abs(each.at - at) < TOGETHER_MS);
  if (!near) past.marks.push({ at, words, key: ++past.count });
  else if (!near.words.includes(words)) near.words += ` ${words}`;
}

// The service counts what happened; a mark stands where a count has grown.
function noteEvents(now, { healed, ollama, clears, resets }) {
  const { last } = past;
  past.last = { healing: healed.last?.at, pid: ollama.pid || last.pid, clears, resets, at: now };
  const away = now - last.at > GAP_MS ? " while this page was away" : "";
  if (healed.last && healed.last.at !== last.healing) {
    const { at, what, why, freed_mb: freed } = healed.last;
    mark(Date.parse(at), `Healed ${what} (${why.replace(/, counters.*/, "")}): ${freed} MB came free.`);
  }
  if (past.last.pid !== last.pid && (last.pid || ollama.restarts)) mark(now - 1000 * ollama.uptime_seconds, "Ollama restarted.");
  if (resets > last.resets) mark(now, `Session reset${away}.`);
  else if (clears > last.clears) mark(now, `Memory cleared${away}.`);
}

// With a GPU its figures, without one the system's: each a value and the top of its scale.
function noteSample(at, { gpu, gpu_utilization: load, gpu_memory: vram, cpu_percent: cpu, memory, runners }) {
  const tokens = runners.reduce((sum, { state, tokens_per_second: speed }) => sum + (state === "busy" ? speed : 0), 0);
  const own = gpu === "none" ? { cpu: [cpu, 100], ram: [memory.used_mb, memory.total_mb] }
    : { load: [parseInt(load), 100], vram: vram.match(/\d+/g)?.map(Number) };
  past.samples.push({ at, tokens: [tokens, 10], ...own });
}

function svg(tag, attributes, ...content) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  Object.entries(attributes).forEach(([name, value]) => made.setAttribute(name, value));
  made.append(...content);
  return made;
}

function curve(points, key, now, top) {
  const path = points.map(({ at, [key]: [value] }, index) => {
    const end = `${(600 - (now - at) / 1000).toFixed(1)} ${(100 - 100 * value / top).toFixed(1)}`;
    return index && at - points[index - 1].at < GAP_MS ? `L${end}` : `M${end}h0`;
  });
  return svg("svg", { viewBox: "0 -3 600 106", preserveAspectRatio: "none" }, svg("path", { class: "curve", d: path.join("") }));
}

// One series: its line, a mark for each event, and the top of its scale.
function chartRow({ key, label, words, of }) {
  const chart = svg("svg", { class: "chart", role: "img" });
  return figureRow(label, chart, ({ now }) => {
    const points = known(key);
    const [values, last] = [points.map((sample) => sample[key][0]), points.at(-1)];
    const top = Math.max(last[key][1], ...values);
    const figure = last.at < now ? "not known now" : words(values.at(-1)) + (of ? of + words(top) : "");
    const lines = past.marks.map((each) => svg("line", { class: "mark", x1: place(each, now), x2: place(each, now), y2: "100%" }));
    chart.replaceChildren(curve(points, key, now, top), ...lines, svg("text", { x: 2, y: 12 }, words(top)));
    chart.ariaLabel = `${label}: ${figure}, in the last ten minutes at most ${words(Math.max(...values))}`;
    return figure;
  });
}

function showHistory(stats) {
  const now = Date.parse(stats.timestamp);
  noteEvents(now, stats);
  noteSample(now, stats);
  for (const list of ["samples", "marks"]) past[list] = past[list].filter(({ at }) => at <= now && now - at < SPAN_MS);
  past.marks.sort((a, b) => b.at - a.at);
  sessionStorage.setItem("past", JSON.stringify(past));
  rows($("charts"), CHARTS.filter(({ key }) => known(key).length).map((each) => ({ ...each, now })), chartRow);
  const numbers = past.marks.map((each) => svg("text", { class: "mark", x: place(each, now), y: 12, "text-anchor": "middle" }, each.key));
  $("axis").replaceChildren(...numbers, svg("text", { y: 28 }, "10 min ago"), svg("text", { x: "100%", y: 28, "text-anchor": "end" }, "now"));
  rows($("marks"), past.marks, () => textRow((each) => `${each.key} · ${clock(each.at)} ${each.words}`));
}
