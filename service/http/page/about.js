// What the server says about its model, and links to what else it serves.

import { getJson, hasKey, isServed } from "./api.js";
import { showClasses } from "./classes.js";
import { byId, element, isolated, percent } from "./dom.js";

// Describes the model that is served now, and returns its description.
export async function describe() {
  const [model, server] = await Promise.all([getJson("v1/model"), getJson("v2")]);
  const { labels, name } = model;
  byId("lead").replaceChildren(
    isolated(name),
    ` decides which of ${labels.length.toLocaleString("en")} classes a photo shows, and highlights the parts of the photo that counted.`,
  );
  byId("known").textContent = `Every photo is given one of the ${labels.length.toLocaleString("en")} classes, even a photo of something else.`;
  showClasses(labels);
  showExamples(labels);
  byId("facts").replaceChildren(...facts(model, server.version).flatMap(([term, ...value]) => [element("dt", {}, term), element("dd", {}, ...value)]));
  byId("about").hidden = false;
  byId("about-link").hidden = false;
  byId("description").hidden = hasKey(); // a link sends no key
  return model;
}

function facts(model, version) {
  const { crop } = model.preprocess;
  const { accuracy, data } = model.provenance;
  const rows = [
    ["Name", isolated(model.name)],
    ["Architecture", `${model.architecture}, ${(model.parameters / 1e6).toFixed(1)} million parameters`],
    ["Input", `the middle of the photo, as ${crop} × ${crop} pixels`],
  ];
  if (typeof data === "string") rows.push(["Trained on", isolated(data)]);
  if (typeof accuracy?.top1 === "number" && typeof accuracy.images === "number") {
    rows.push(["Accuracy", `${percent(accuracy.top1)} of ${accuracy.images.toLocaleString("en")} validation photos`]);
  }
  rows.push(["Runs on", `${model.device}, in ${model.precision}: ${model.backend}`], ["Server", `RedNet Serve ${version}`]);
  return rows;
}

// Only examples of classes that this network knows.
function showExamples(labels) {
  let any = false;
  for (const button of document.querySelectorAll("#examples button")) {
    const known = labels.find(({ id, label }) => id === button.dataset.id || label === button.dataset.label);
    button.hidden = !known;
    any ||= known !== undefined;
    if (known) button.querySelector("span").replaceChildren(isolated(known.label));
  }
  byId("examples").hidden = !any;
}

export async function showLinks() {
  const links = [...document.querySelectorAll("nav a[data-probe]")];
  await Promise.all(links.map(async (link) => {
    link.hidden = !(await isServed(link.getAttribute("href")));
  }));
}
