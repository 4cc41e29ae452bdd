// One region for what came of the person's acts, at the foot of the window; nothing scrolls.

import { CallError } from "./calls.js";
import { $, element, show } from "./dom.js";
import { errorDetail, errorWords } from "./words.js";

const LATE = "It may still do what was asked.";
const GOOD_MS = 20_000; // then what went well goes by itself

let timer = null;
let faulty = null; // the page's own fault

// Shows a message, with more nodes below it; returns what `dismiss` takes.
export function say(words, level = "good", ...more) {
  clearTimeout(timer);
  const close = element("button", { type: "button", ariaLabel: "Dismiss the message" }, "Dismiss");
  close.onclick = () => dismiss(text);
  const text = element(
    "div",
    { className: "about" },
    element("p", { className: level }, words),
    ...more,
  );
  const focused = $("messages").contains(document.activeElement);
  $("messages").replaceChildren(text, close);
  $("messages").hidden = false;
  if (focused) close.focus({ preventScroll: true });
  if (level === "good") timer = setTimeout(() => dismiss(text), GOOD_MS);
  return text;
}

// Takes a message away, if it is the one that is shown.
export function dismiss(text) {
  if (!text.isConnected) return;
  if ($("messages").contains(document.activeElement)) $("h-models").focus({ preventScroll: true });
  $("messages").replaceChildren();
  show($("messages"), false);
}

// Says why something failed, in the words of its code.
export function sayError(what, error) {
  const detail = errorDetail(error);
  say(`${what}: ${errorWords(error)}`, "bad", ...(detail ? [fold(detail)] : []));
}

// What the service said itself, for who wants to know.
export function fold(detail) {
  const said = element("p", { className: "figures" }, detail);
  return element("details", {}, element("summary", {}, "What was said"), said);
}

// A button that calls; `run` says what came of it.
export function action(text, what, run, className = "") {
  const ariaLabel = what ? `${text} ${what}` : null;
  const made = element("button", { type: "button", className, ariaLabel }, text);
  made.onclick = async () => {
    if (made.ariaDisabled === "true") return;
    made.ariaDisabled = "true"; // `disabled` would take the focus away
    try {
      await run();
    } catch (error) {
      noteError(ariaLabel ?? text, error);
    } finally {
      made.ariaDisabled = "false";
      document.dispatchEvent(new Event("poll"));
    }
  };
  return made;
}

// An error of a call is told; any other is a fault of the page itself.
export function noteError(what, error) {
  if (error.code === "stopped") say(`${what}: stopped.`, "work");
  else if (error.code === "no_answer") say(`${what}: ${error.message} ${LATE}`, "bad");
  else if (error instanceof CallError) sayError(what, error);
  else noteFault(error);
}

export function noteFault(error) {
  faulty = error;
  console.error(error);
}

export function takeFault() {
  const fault = faulty;
  faulty = null;
  return fault;
}
