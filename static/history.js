"use strict";

// What was polled in the last ten minutes and what happened then. It outlives a reload of the tab.
const SPAN_MS = 600_000;
const GAP_MS = 20_000;  // a line is not drawn over a time of which nothing is known
const TOGETHER_MS = 10_000;  // events so near to each other share a mark
const past = JSON.parse(sessionStorage.getItem("past")) || { samples: [], marks: [], count: 0, last: {} };
const percent = (value) => `${Math.round(value)} %`;
const megabytes = (value) => size(value * 2 ** 20);
const CHARTS = [  // a sample's key, the label, how a figure reads
  ["load", "GPU load", percent],
  ["vram", "GPU memory", megabytes],
  ["cpu", "CPU load", percent],
  ["ram", "System memory", megabytes],
  ["tokens", "Tokens per second", (value) => value.toFixed(1)],
];

function mark(at, words) {
  const near = past.marks.find((each) => Math.abs(each.at - at) < TOGETHER_MS);
  if (!near) past.marks.push({ at, words, key: ++past.count });
  else if (!near.words.includes(words)) near.words += ` ${words}`;
}

// The service counts what happened; a mark stands where a count has grown.
function noteEvents(now, { healed, ollama, clears, resets }) {
  const { last } = past;
  const seen = { healing: healed.last?.at, pid: ollama.pid || last.pid, clears, resets, at: now };
  const away = now - last.at > GAP_MS ? " while this page was away" : "";
  if (seen.healing !== last.healing && healed.last) {
    const { at, what, why, freed_mb: freed } = healed.last;
    mark(Date.parse(at), `Healed ${what} (${why.replace(/, counters.*/, "")}): ${freed} MB came free.`);
  }
  if (seen.pid !== last.pid && (last.pid || ollama.restarts)) mark(now - 1000 * ollama.uptime_seconds, "Ollama restarted.");
  if (resets > last.resets) mark(now, `Session reset${away}.`);
  else if (clears > last.clears) mark(now, `Memory cleared${away}.`);
  past.last = seen;
}

// With a GPU its figures, without one the system's: pairs of a value and the top of its scale.
function noteSample(at, stats) {
  const [used, total] = stats.gpu_memory.match(/\d+/g)?.map(Number) || [];
  const busy = stats.runners.filter((runner) => runner.state === "busy");
  const tokens = busy.reduce((sum, runner) => sum + runner.tokens_per_second, 0);
  const { cpu_percent: cpu, memory, gpu } = stats;
  const own = gpu === "none" ? { cpu: [cpu, 100], ram: [memory.used_mb, memory.total_mb] }
    : { load: [parseInt(stats.gpu_utilization), 100], vram: [used, total] };
  past.samples.push({ at, tokens: [tokens, 10], ...own });
}

function svg(tag, attributes, text = "") {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.textContent = text;
  return made;
}

function curve(points, now, top) {
  const path = points.map(({ at, value }, index) => {
    const place = `${(600 - (now - at) / 1000).toFixed(1)} ${(100 - 100 * value / top).toFixed(1)}`;
    return index && at - points[index - 1].at < GAP_MS ? `L${place}` : `M${place}h0`;
  });
  const box = svg("svg", { viewBox: "0 -3 600 106", preserveAspectRatio: "none" });
  box.append(svg("path", { class: "curve", d: path.join("") }));
  return box;
}

function showHistory(stats) {
  const now = Date.parse(stats.timestamp);
  noteEvents(now, stats);
  noteSample(now, stats);
  for (const list of ["samples", "marks"]) past[list] = past[list].filter(({ at }) => at <= now && now - at < SPAN_MS);
  past.marks.sort((a, b) => b.at - a.at);
  sessionStorage.setItem("past", JSON.stringify(past));
  const place = ({ at }) => `${(100 - 100 * (now - at) / SPAN_MS).toFixed(2)}%`;
  for (const [key, label, words] of CHARTS) {
    const points = past.samples.map((each) => ({ at: each.at, value: each[key]?.[0], top: each[key]?.[1] })).filter(({ value }) => Number.isFinite(value));
    const values = points.map(({ value }) => value);
    const top = Math.max(...points.slice(-1).map((point) => point.top), ...values);
    const known = points.at(-1)?.at === now;
    const figure = known ? words(values.at(-1)) + (words === megabytes ? ` of ${words(top)}` : "") : "not known now";
    const chart = figureRow("charts", key, label, points.length ? figure : null, () => svg("svg", { class: "chart", role: "img" }));
    if (!points.length) continue;
    chart.ariaLabel = `${label}, last ten minutes: now ${figure}, at most ${words(Math.max(...values))}`;
    const lines = past.marks.map((each) => svg("line", { class: "mark", x1: place(each), x2: place(each), y2: "100%" }));
    chart.replaceChildren(curve(points, now, top), ...lines, svg("text", { x: 2, y: 12 }, words(top)));
  }
  const numbers = past.marks.map((each) => svg("text", { class: "mark", x: place(each), y: 12, "text-anchor": "middle" }, each.key));
  $("axis").replaceChildren(...numbers, svg("text", { y: 28 }, "10 min ago"), svg("text", { x: "100%", y: 28, "text-anchor": "end" }, "now"));
  rows($("marks"), past.marks, () => textRow((each) => `${each.key} · ${clock(each.at)} ${each.words}`));
}
