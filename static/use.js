// Lines to copy: where Ollama is, a call with curl, and the body for n8n.

import { $, element, rows, write } from "./dom.js";
import { latest } from "./known.js";
import { action, say } from "./messages.js";

export function showUse() {
  const info = latest("info");
  if (!info) return;
  const models = latest("models")?.models ?? [];
  const model = (models.find(({ loaded }) => loaded) ?? models[0])?.name ?? info.default_model;
  const { port } = new URL(info.ollama_url);
  const host = location.hostname || "localhost";
  const address = `http://${host}:${port || 80}`;
  const body = JSON.stringify({ model, prompt: "Why is the sky blue?", stream: false });
  const expression = `{"model": ${JSON.stringify(model)}, "prompt": {{ JSON.stringify($json.text) }}, "stream": false}`;
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
