// Models to begin with: what each fetches and needs, and whether that fits this machine.

import { call } from "./calls.js";
import { $, element, rows, show, write } from "./dom.js";
import { count, fullName, size } from "./format.js";
import { latest, refresh } from "./known.js";
import { action, noteFault, say, sayError } from "./messages.js";
import { startPull } from "./pulls.js";

const PATH = "api/models/recommendations";
const SIZES_S = 30;
const DISK_RESERVE = 2 ** 30; // as downloads leave it

let asked = false;
let list = []; // the answer's models

// Asks for the list once: where there is no model, or where it is opened.
export async function suggest(limitS) {
  if (asked) return;
  asked = true;
  const { value, failure } = await refresh("recommended", PATH, limitS);
  asked = failure === null; // else it is asked for when it is opened again
  list = value?.models ?? [];
}

// Registries learn by it which models are meant: nobody is asked before the person says so.
async function askSizes() {
  say("The registry is being asked …", "work");
  const answer = await call("GET", `${PATH}?sizes=true`, null, SIZES_S);
  if (!answer.ok) return sayError("The registry was not asked", answer);
  list = answer.models;
  showSuggestions();
  const unknown = list.filter(({ code }) => code);
  const told = "It is said how much each of them fetches.";
  if (!unknown.length) return say(told);
  sayError(`Of ${count(unknown.length, "model")} the size is not known`, unknown[0]);
}

export function showSuggestions() {
  if (!$("suggested").open) return;
  const failure = list.length ? "" : "The list of them is not known: open it again.";
  const memory = memoryFor();
  write($("rests-on"), failure || memory.words);
  const free = latest("stats")?.disk?.free_bytes;
  const shown = list.map((each) => ({ ...each, key: each.name, memory, free }));
  rows($("suggestions"), shown, suggestionRow);
  show(sizes, list.length > 0);
}

// The largest GPU, or without one the system's memory: as measured.
function memoryFor() {
  const { gpus = [], memory } = latest("stats") ?? {};
  const known = gpus.filter(({ memory_total_mb: total }) => total != null);
  known.sort((a, b) => b.memory_total_mb - a.memory_total_mb);
  const mb = known[0]?.memory_total_mb ?? memory?.total_mb;
  if (mb == null) {
    const words = "How much memory there is, is not known: nor is whether they fit.";
    return { bytes: null, words };
  }
  const bytes = mb * 2 ** 20;
  const place = known.length ? "the largest GPU" : "this machine (no GPU tells its memory)";
  const words = `“Fits” compares what a model needs with the memory of ${place} as measured: ${size(bytes)}, in use or not.`;
  return { bytes, words };
}

function suggestionRow({ name }) {
  const facts = element("p", { className: "figures" });
  const about = element("div", { className: "about" });
  about.append(element("p", { className: "name" }, name), facts);
  const button = action("Download", name, () => startPull(name));
  const row = element("li", {}, about, button);
  row.update = (model) => {
    const state = stateOf(name);
    const fetches = state ? [] : fetchFacts(model);
    const all = [model.description, ...fetches, ...memoryFacts(model), state];
    write(facts, all.filter(Boolean).join(" · "));
    show(button, state === "");
  };
  return row;
}

// Whether it is here or on its way.
function stateOf(name) {
  const same = ({ model }) => fullName(model) === fullName(name);
  const pulls = latest("pulls")?.pulls ?? [];
  if (pulls.some((pull) => pull.state === "running" && same(pull))) return "is being downloaded";
  const models = latest("models")?.models ?? [];
  return models.some((each) => same({ model: each.name })) ? "is on the disk" : "";
}

function memoryFacts({ vram_bytes: needs, memory }) {
  const words = `needs about ${size(needs)} of memory`;
  if (!memory.bytes) return [words];
  return [words, needs <= memory.bytes ? "fits" : "does not fit"];
}

// The size is as far as it is known: by the registry, by the service, or not at all.
function fetchFacts({ size_bytes: about, download_bytes: fetches, code, free }) {
  const bytes = fetches ?? about;
  if (bytes == null) return [code ? "size not known" : "size not asked for"];
  const words = `${fetches == null ? "about " : ""}${size(bytes)} to fetch`;
  const isTooLarge = free != null && bytes > free - DISK_RESERVE;
  return isTooLarge ? [words, `too large for the disk, which has ${size(free)} free`] : [words];
}

const sizes = action("Ask the registry for their sizes", null, askSizes);
$("suggested").append(sizes);
$("suggested").addEventListener("toggle", () => suggest().then(showSuggestions).catch(noteFault));
