// Makes and changes elements, so that focus, selection and scroll survive the polling.

export const $ = (id) => document.getElementById(id);

export function element(tag, properties, ...content) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...content);
  return made;
}

export function svg(tag, attributes, ...content) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...content);
  return made;
}

// Text is only written where it changed: screen readers and selections stay undisturbed.
export function write(node, text, className = node.className) {
  if (node.textContent !== text) node.textContent = text;
  if (node.className !== className) node.className = className;
}

// Shows or hides an element. Where it had the focus, that goes on to its neighbour.
export function show(node, visible) {
  if (node.hidden === !visible) return;
  const focused = node.contains(document.activeElement);
  node.hidden = !visible;
  if (focused) focusNear(node.parentElement);
}

function focusNear(place) {
  for (let each = place; each; each = each.parentElement) {
    const candidates = [...each.querySelectorAll("button, input, h2")];
    const next = candidates.find((one) => one.checkVisibility());
    if (next) {
      next.focus({ preventScroll: true });
      return;
    }
  }
}

// Keeps one row for each key, in place. `make(item)` makes a row with an `update(item)`.
export function rows(list, items, make) {
  const focused = document.activeElement;
  const old = new Map([...list.children].map((row) => [row.dataset.key, row]));
  const wanted = new Set(items.map(({ key }) => String(key)));
  for (const [key, row] of old) if (!wanted.has(key)) removeRow(list, row);
  items.forEach((item, index) => {
    const row = old.get(String(item.key)) || make(item);
    row.dataset.key = item.key;
    row.update(item);
    const place = list.children[index];
    if (place !== row) list.insertBefore(row, place || null);
  });
  // A row that was moved has lost the focus.
  if (list.contains(focused)) focused.focus({ preventScroll: true });
}

function removeRow(list, row) {
  const focused = row.contains(document.activeElement);
  row.remove();
  const place = list.closest("section") ?? $("main"); // the head has no heading to go to
  if (focused) place.querySelector("h2").focus({ preventScroll: true });
}

export function textRow(words, className = "") {
  const row = element("p", { className });
  row.update = (item) => write(row, words(item));
  return row;
}

// A label, a figure, and a graph, which is drawn anew and returns the figure.
export function figureRow(label, graph, draw) {
  const row = element("div", { className: "meter" }, element("span", {}, label));
  const figure = element("b");
  row.append(figure, graph);
  row.update = (item) => write(figure, draw(item));
  return row;
}

// Opens a question; tells whether it was answered by its verb. Escape is no.
export async function ask(question, verb, danger = false) {
  write($("ask-yes"), verb, danger ? "danger" : "");
  return (await open("ask", question)) === "yes";
}

// Opens the dialog of this id; the answer is the value of the button that closed it.
export function open(id, words) {
  const dialog = $(id);
  write($(`${id}-text`), words);
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.onclose = () => resolve(dialog.returnValue);
  });
}
