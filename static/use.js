// Lines to copy: where Ollama is, a call with curl, and the body for n8n.

import { $, element, rows, write } from "./dom.js";
import { latest } from "./known.js";
import { action, say } from "./messages.js";

const HERE = /^(localhost|127\..*|\[::1\])$/;

export function showUse() {
  const info = latest("info");
  if (!info) return;
  const models = latest("models")?.models;
  const there = models?.find(({ loaded }) => loaded) ?? models?.[0];
  const model = there?.name ?? info.default_model;
  const { port } = new URL(info.ollama_url);
  const host = location.hostname || "localhost";
  const address = `http://${host}:${port || 80}`;
  const body = JSON.stringify({ model, prompt: "Why is the sky blue?", stream: false });
  const expression = `{"model": ${JSON.stringify(model)}, "prompt": {{ JSON.stringify($json.text) }}, "stream": false}`;
  write($("use-notes"), notes(host, models?.length === 0 && model).join(" "));
  rows(
    $("use"),
    [
      { key: "address", title: "Address of Ollama, for programs", text: address },
      { key: "curl", title: "A call with curl", text: `curl ${address}/api/generate -d '${body}'` },
      { key: "n8n", title: "n8n: body of an HTTP Request, as expression", text: expression },
    ],
    lineRow,
  );
}

function notes(host, missing) {
  const found = [];
  if (missing) found.push(`There is no model yet: these lines work once ${missing} is downloaded.`);
  if (!HERE.test(host)) {
    found.push(
      "Whether Ollama lets other machines in is up to OLLAMA_HOST, in Docker OLLAMA_BIND.",
    );
  }
  return found;
}

function lineRow({ title }) {
  const code = element("code");
  const copy = action("Copy", `: ${title}`, () => copyText(code));
  const row = element("div", {}, element("dt", {}, title), element("dd", {}, code, copy));
  row.update = ({ text }) => write(code, text);
  return row;
}

// Without TLS a browser gives no clipboard: then the line is selected, to copy by hand.
async function copyText(code) {
  if (navigator.clipboard) {
    await navigator.clipboard.writeText(code.textContent);
    return say("Copied.");
  }
  getSelection().selectAllChildren(code);
  say("Selected: copy it with the keyboard.");
}
