// The list of photos: a thumbnail, the name, and the class or what is wrong.

import { certainty } from "./confidence.js";
import { byId, element, isolated, percent } from "./dom.js";

const rows = new Map(); // by photo

// Adds rows above those of earlier photos.
export function addRows(photos, { select, again }) {
  const added = photos.map((photo) => {
    const canvas = element("canvas", { width: 0, height: 0, ariaHidden: "true" });
    const name = element("span", { className: "name", title: photo.name }, isolated(photo.name));
    const state = element("span", { className: "state" });
    const button = element("button", { type: "button", className: "row", onclick: () => select(photo) }, canvas, element("span", { className: "text" }, name, state));
    const retry = element("button", { type: "button", className: "small", hidden: true, onclick: () => again(photo) }, "Try again");
    const row = element("li", {}, button, retry);
    rows.set(photo, { row, button, canvas, state, retry });
    return row;
  });
  byId("photos").prepend(...added);
}

export function clearRows() {
  rows.clear();
  byId("photos").replaceChildren();
}

export function updateRow(photo) {
  const { row, button, canvas, state, retry } = rows.get(photo);
  row.className = photo.state;
  if (photo.thumbnail && !canvas.width) {
    Object.assign(canvas, { width: photo.thumbnail.width, height: photo.thumbnail.height });
    canvas.getContext("2d").drawImage(photo.thumbnail, 0, 0);
  }
  const hadFocus = document.activeElement === retry;
  retry.hidden = !photo.error?.mayPass;
  button.disabled = photo.state === "failed";
  if (hadFocus && retry.hidden) button.focus();
  state.replaceChildren(...stateOf(photo));
}

function stateOf({ state, answer, error }) {
  if (state === "waiting") return ["Waiting"];
  if (state === "busy") return ["Looking…"];
  if (state === "failed") return [error.message];
  const [{ label, probability }] = answer.classes;
  return [certainty(probability).toLowerCase(), isolated(label), ` ${percent(probability)}`];
}

export function markRow(shown) {
  for (const [photo, { button }] of rows) {
    if (photo === shown) button.setAttribute("aria-current", "true");
    else button.removeAttribute("aria-current");
  }
}
