// What the page says: of errors by their code, of faults, of GPU states. No sentence of the
// service is taken apart; one is shown as it is where the page has no words for its code.

import { size } from "./format.js";

const ERRORS = {
  answer_interrupted: "The model's process ended in the middle of the answer. Ask again.",
  bad_model_name:
    "This is no model's name. Names look like llama3.1:8b, user/model:tag or hf.co/org/repo:Q4_K_M.",
  cancelled: "Cancelled.",
  digest_mismatch: "The data was damaged on its way. Retry: what is whole is kept.",
  disk_failing: "The disk fails. See the kernel's log (dmesg).",
  disk_full: "The disk is full. Delete a model or prune, then go on.",
  mlx_missing: "The library for such models is not here. Take a GGUF version of the model.",
  model_being_pulled: "This model is being downloaded. Wait for the end, or cancel the download.",
  model_damaged: "A file of this model is damaged. Check its files: that offers a repair.",
  model_not_found: "There is no model of this name. Check the name and the tag.",
  ollama_timeout: "Ollama did not answer in time.",
  ollama_too_old: "This model wants a newer Ollama. Update the service.",
  ollama_unreachable: "Ollama is not reachable at this moment.",
  out_of_memory: "The memory does not suffice. Take a smaller model or context, or unload others.",
  parts_damaged: "What was kept of this download is damaged. Remove its parts, then retry.",
  proxy_error:
    "The proxy between this machine and the registry refuses. Check HTTPS_PROXY and NO_PROXY.",
  pull_interrupted: "The download broke off. The next one goes on from where it stopped.",
  registry_busy: "The registry limits requests. Try again in some minutes.",
  registry_certificate: "The registry's TLS certificate is not accepted. See below what was said.",
  registry_denied: "There is no such model, or it wants a login. Check the name.",
  registry_error: "The registry fails. Try again later.",
  registry_insecure: "This registry has no TLS: its data could be read and changed on the way.",
  registry_redirect:
    "The registry sends elsewhere, and Ollama does not follow. See below what was said.",
  registry_refused: "The registry refuses this. Check the name and the tag.",
  registry_unreachable:
    "The registry does not answer. Check the machine's network and the registry's name.",
  shutting_down: "The service was stopped in the middle of it.",
  store_damaged: "Something is in the way in the folder of the models. See below what was said.",
  store_not_writable:
    "The folder of the models cannot be written. Give it to the user that the service runs as.",
  token_wanted: "The service wants its token for this.",
  too_many_pulls: "As many downloads as allowed are under way. Wait for one, or cancel one.",
  verify_running: "A check is under way. Wait for its end.",
  try_under_way: "Another try is under way. Wait for its end.",
};

export const errorWords = ({ code, error, message }) =>
  ERRORS[code] ?? error ?? message ?? "The service gave no reason.";

// What the service's own sentence adds to the words of its code.
export const errorDetail = ({ code, error }) => (ERRORS[code] && error) || "";

// The reason of an unhealthy service; `names` are the models of the runners in that state.
const REASONS = {
  runner_stuck: (names) => `The runner of ${names} is stuck: it works and makes no progress.`,
  runner_silent: (names) => `The runner of ${names} does not answer.`,
  runner_ghost: (names) => `The runner of ${names} is dead, and Ollama goes on listing it.`,
  callers_starved: () => STARVED,
};
const STARVED = "Callers wait for an answer, and nothing works for them.";
const FAULTY = { runner_stuck: "stuck", runner_silent: "silent", runner_ghost: "ghost" };

export function reasonWords({ code, reason, error }, runners) {
  const faulty = runners.filter(({ state }) => state === FAULTY[code]);
  const names = faulty.map(({ model }) => model || "an unknown model").join(", ");
  return REASONS[code]?.(names || "a model") ?? reason ?? error ?? "The service is not healthy.";
}

// Warnings whose figures would be in another unit, or change at each poll. null: the head says it.
const GPU_ADVICE =
  "Check CUDA_VISIBLE_DEVICES, the container's runtime (LLM_RUNTIME=nvidia) and the driver.";
const PARTLY_ADVICE =
  "Set LLM_GPU_LAYERS=all where it fits the GPU, else choose a smaller model or context.";
const WARNINGS = {
  callers_waiting: () => null,
  long_answer: ({ model, seconds }) =>
    `An answer of ${model} has been under way for more than ${roughly(seconds)}.`,
  load_failed: ({ message }, load) =>
    load ? `${load.model} was not loaded: ${errorWords(load)}` : message,
  gpu_not_used: () =>
    `Ollama says that its models lie on the GPU, and the GPU's memory is not in use: they run on the CPU. ${GPU_ADVICE}`,
};

// Returns what is to be said of the warnings: one line for each. `beside` are the models that lie
// partly or wholly beside the GPU, `load` is the last one that was ordered.
export function warningLines(warnings, beside, load) {
  const lines = [];
  const unused = warnings.some(({ code }) => code === "gpu_not_used");
  for (const warning of warnings) {
    if (warning.code === "model_on_cpu" && beside.length)
      lines.push(...beside.map((model) => besideLine(model, unused)));
    else lines.push({ key: warning.code, words: (WARNINGS[warning.code] ?? said)(warning, load) });
  }
  const told = new Map(lines.map((line) => [line.key + line.words, line]));
  return [...told.values()].filter(({ words }) => words);
}

const roughly = (seconds) =>
  seconds < 3600 ? `${Math.floor(seconds / 60)} min` : `${Math.floor(seconds / 3600)} h`;
const said = ({ message }) => message;

// `unused`: what Ollama says of the GPU is false.
function besideLine({ name, size_vram: vram, size_loaded: all }, unused) {
  const where = `${size(all - vram)} of ${size(all)} of ${name} lie in system memory, which is slow.`;
  const advice =
    vram && !unused
      ? PARTLY_ADVICE
      : `Ollama sees no GPU, whatever LLM_GPU_LAYERS says. ${GPU_ADVICE}`;
  return { key: `beside ${name}`, words: `${where} ${advice}` };
}

export const ACTIONS = {
  wait: "It should come by itself: wait a moment.",
  reset_session: "Reset the session.",
  restart_service: "Restart the service (its container).",
  reboot_host: "Reboot the machine.",
};

export const GPU_STATES = {
  none: "No GPU: models run on the CPU.",
  unified: "The GPU shares the system's memory.",
  lost: "The GPU is lost: models run on the CPU, or not at all.",
  driver_mismatch: "The GPU's driver was updated under it, so its figures cannot be read.",
  no_permission: "The GPU may not be read, so its figures are not known.",
  slow: "The GPU's driver is slow to answer, so its figures are not known now.",
  unknown: "The GPU's figures are not known.",
  unresponsive: "The GPU's driver does not answer, so its figures are not known.",
};
// States that are no fault of anything.
export const CALM_GPU_STATES = ["ok", "none", "unified", "no_permission", "unknown"];
