// The classes that the network knows, with a search where there are many.

import { byId, element, isolated } from "./dom.js";

const FEW = 30; // which need no search
let labels = [];

export function showClasses(known) {
  labels = known;
  byId("classes-title").textContent = `The ${known.length.toLocaleString("en")} classes it knows`;
  byId("classes").hidden = false;
  byId("class-search").hidden = known.length <= FEW;
  byId("search").value = "";
  find();
}

function find() {
  const text = byId("search").value.trim().toLowerCase();
  const found = labels.filter(({ id, label }) => label.toLowerCase().includes(text) || id.toLowerCase() === text);
  const shown = found.length <= FEW + 1 ? found : found.slice(0, FEW); // "and 1 more" would take as much space as the one
  const chips = shown.map(({ label }) => element("li", {}, isolated(label)));
  const more = found.length - shown.length;
  if (more) chips.push(element("li", { className: "more" }, `and ${more.toLocaleString("en")} more`));
  byId("chips").replaceChildren(...chips);
  byId("found").textContent = text ? `${found.length.toLocaleString("en")} of ${labels.length.toLocaleString("en")}` : "";
}

byId("search").addEventListener("input", find);
