// A prompt for one model: the answer as it comes, its speed, and Stop.

import { stream } from "./calls.js";
import { $, show, write } from "./dom.js";
import { span } from "./format.js";
import { noteFault } from "./messages.js";
import { errorWords } from "./words.js";

let model = "";
let controller = null; // of the answer under way

const SILENT_S = 3; // then it is said that nothing comes

export function tryModel(name) {
  model = name;
  $("try-title").textContent = `Try ${name}`;
  $("try-answer").replaceChildren();
  write($("try-figures"), "");
  $("try").showModal();
}

async function askModel(prompt) {
  controller = new AbortController();
  show($("try-stop"), true);
  $("try-ask").ariaDisabled = "true";
  $("try-answer").replaceChildren();
  write($("try-figures"), `${model} is asked …`, "figures");
  const told = { pieces: 0, first: 0, latest: performance.now(), last: {} };
  const timer = setInterval(() => write($("try-figures"), underWay(told)), 1000);
  // A screen reader waits for the whole answer, and hears its figures at the end.
  $("try-answer").ariaBusy = "true";
  $("try-figures").ariaLive = "off";
  const announce = () => {
    clearInterval(timer);
    $("try-figures").ariaLive = "polite";
    $("try-answer").ariaBusy = "false";
  };
  try {
    const body = { model, prompt };
    const answer = await stream("api/models/try", body, controller, (line) => take(told, line));
    announce();
    finish(told, answer.ok ? told.last : answer);
  } catch (error) {
    announce();
    if (error.code === "stopped") write($("try-figures"), `Stopped. ${speed(told)}`);
    else if (error.code) write($("try-figures"), errorWords(error), "bad");
    else noteFault(error);
  } finally {
    controller = null;
    show($("try-stop"), false);
    $("try-ask").ariaDisabled = "false";
  }
}

function take(told, line) {
  told.last = line;
  const piece = line.response || line.thinking;
  if (!piece) return;
  told.pieces += 1;
  told.latest = performance.now();
  told.first ||= told.latest;
  $("try-answer").append(piece);
}

// While it comes, a piece is counted as a token.
function speed({ pieces, first, latest }) {
  const seconds = (latest - first) / 1000;
  return pieces > 1 && seconds > 0 ? `${(pieces / seconds).toFixed(1)} tokens/s` : "";
}

// A speed alone would look as if it went on.
function underWay(told) {
  const silent = Math.floor((performance.now() - told.latest) / 1000);
  const facts = [told.pieces ? speed(told) : `${model} is asked …`];
  if (silent >= SILENT_S) facts.push(`nothing has come for ${span(silent)}`);
  return facts.filter(Boolean).join(" · ");
}

function finish(
  told,
  { error, code, done_reason: reason, eval_count: tokens, eval_duration: took, ...rest },
) {
  if (error) return write($("try-figures"), errorWords({ code, error }), "bad");
  const facts = [];
  if (tokens && took)
    facts.push(`${tokens} tokens`, `${(tokens / (took / 1e9)).toFixed(1)} tokens/s`);
  if (rest.load_duration > 1e8) facts.push(`${(rest.load_duration / 1e9).toFixed(1)} s to load`);
  if (reason === "length") facts.push("cut off at its limit");
  if (!told.pieces) facts.push("the answer is empty");
  write($("try-figures"), facts.join(" · "), "figures");
}

const stop = () => controller?.abort();

$("try-form").onsubmit = (event) => {
  event.preventDefault();
  if (!controller) askModel($("try-prompt").value);
};
$("try-stop").onclick = stop;
$("try-close").onclick = () => $("try").close();
$("try").addEventListener("close", stop);
