// The answer about one photo: the photo with a map over it, the classes, and how the network looks at it.

import { explain, explainPath, hasKey } from "./api.js";
import { certainty, confidence } from "./confidence.js";
import { byId, element, isolated, percent } from "./dom.js";
import { drawEvidence, drawKernels, strongestPlace } from "./heat_map.js";

const UNFAMILIAR = 0.05; // familiarity below which a photo is unlike those that the model was trained on

let shown = null; // the photo
let chosen = null; // the class whose evidence is shown
let request = new AbortController(); // for other maps
let attempt; // runs a function that sends requests, and shows its errors
let outdated; // called with a photo that another model has answered

const stage = () => document.querySelector("#stages input:checked").value;
const parametersOf = ({ index }) => (index === shown.answer.classes[0].index ? {} : { class: index });

export function setUp(options) {
  ({ attempt, outdated } = options);
}

export const shownPhoto = () => shown;

export function hideAnswer() {
  request.abort();
  shown = null;
  byId("answer").hidden = true;
}

export function showAnswer(photo, preprocess) {
  request.abort();
  request = new AbortController();
  shown = photo;
  chosen = photo.answer.classes[0];
  showPhoto(preprocess);
  showVerdict();
  showEvidence(photo.answer);
  byId("answer").hidden = false;
  byId("kernels").width = 0; // those of another photo
  if (byId("looks").open) chooseStage();
}

// Loads the photo into both pictures, and marks the square in the middle that the network sees.
function showPhoto({ crop, resize }) {
  const url = URL.createObjectURL(shown.file);
  for (const picture of document.querySelectorAll(".picture")) {
    const image = picture.querySelector("img");
    URL.revokeObjectURL(image.src);
    image.onload = () => place(picture, image.naturalWidth, image.naturalHeight, crop / resize);
    image.onerror = () => place(picture, 1, 1, 1); // for example a TIFF: the server reads more than the browser
    picture.classList.remove("unreadable");
    image.src = url;
    image.alt = `Your photo ${shown.name}`;
  }
}

function place(picture, width, height, share) {
  const side = Math.min(width, height) * share;
  picture.classList.toggle("unreadable", share === 1 && width === 1);
  picture.style.setProperty("--ratio", width / height);
  picture.style.setProperty("--seen-width", `${(100 * side) / width}%`);
  picture.style.setProperty("--seen-height", `${(100 * side) / height}%`);
}

function showVerdict() {
  const { classes, familiarity } = shown.answer;
  byId("file-name").replaceChildren(isolated(shown.name));
  byId("answer-title").replaceChildren(certainty(classes[0].probability), isolated(classes[0].label));
  byId("confidence").replaceChildren(...confidence(classes));
  byId("unfamiliar").hidden = !(familiarity < UNFAMILIAR);
}

function showScores() {
  const focused = document.activeElement.closest("#scores button") !== null;
  const rows = shown.answer.classes.map((score) => {
    const { label, probability, index } = score;
    const fill = element("span");
    fill.style.setProperty("--share", probability);
    const bar = element("span", { className: "bar" }, fill);
    const share = element("span", { className: "share" }, percent(probability));
    const button = element("button", { type: "button", onclick: () => choose(score) }, isolated(label), share, bar);
    button.setAttribute("aria-pressed", index === chosen.index);
    return element("li", {}, button);
  });
  byId("scores").replaceChildren(...rows);
  if (focused) byId("scores").querySelector("[aria-pressed=true]")?.focus();
}

function showEvidence({ grid, times }) {
  drawEvidence(byId("map"), grid);
  const name = `Heat map over the photo: the evidence for and against ${chosen.label}. The strongest evidence for it is ${strongestPlace(grid)}.`;
  byId("map").setAttribute("aria-label", name);
  byId("explained").replaceChildren(isolated(chosen.label));
  showScores();
  showProgram(times);
}

// Another map of the photo, requested once; null: the photo is not shown any more.
async function mapOf(photo, parameters) {
  const key = JSON.stringify(parameters);
  if (!photo.maps.has(key)) photo.maps.set(key, await explain(photo.file, parameters, request.signal));
  const answer = photo.maps.get(key);
  if (photo !== shown) return null;
  if (answer.model === photo.answer.model) return answer;
  outdated(photo);
  return null;
}

function choose(score) {
  const photo = shown;
  attempt(async () => {
    const parameters = parametersOf(score);
    const answer = parameters.class === undefined ? photo.answer : await mapOf(photo, parameters);
    if (!answer) return;
    chosen = score;
    showEvidence(answer);
  }, () => choose(score));
}

function chooseStage() {
  const [photo, layer] = [shown, stage()];
  attempt(async () => {
    const grid = (await mapOf(photo, { layer }))?.grid;
    if (!grid || layer !== stage()) return;
    drawKernels(byId("kernels"), grid);
    byId("kernels").setAttribute("aria-label", `Heat map over the photo: the kernels of stage ${layer.at(-1)}, strongest ${strongestPlace(grid)}.`);
    showProgram();
  }, chooseStage);
}

const milliseconds = (value) => (value === undefined ? "–" : `${value.toFixed(1)} ms`);

// The requests of this photo as commands, and where the time of the last one went.
function showProgram(times) {
  const quoted = (text) => (/^[\w@.:/-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);
  const start = `curl ${hasKey() ? '-H "Authorization: Bearer $KEY" ' : ""}--data-binary ${quoted(`@${shown.name}`)} `;
  const command = (parameters) => start + quoted(new URL(explainPath(parameters), document.baseURI).href);
  const requests = [parametersOf(chosen), ...(byId("looks").open ? [{ layer: stage() }] : [])];
  byId("curl").textContent = requests.map(command).join("\n");
  byId("copy").textContent = "Copy";
  if (!times) return;
  const { decode, queue, inference, all } = times;
  byId("times").textContent = `Decoding took ${milliseconds(decode)}, waiting ${milliseconds(queue)}, the network ${milliseconds(inference)}; with the upload, ${milliseconds(all)} passed.`;
}

byId("stages").addEventListener("change", chooseStage);
byId("looks").addEventListener("toggle", () => {
  if (shown && byId("looks").open) chooseStage();
});
byId("opacity").addEventListener("input", ({ target }) => {
  byId("answer").style.setProperty("--opacity", target.value / 100);
  target.ariaValueText = byId("opacity-value").textContent = `${target.value}%`;
});
byId("copy").hidden = !navigator.clipboard; // browsers provide it on secure origins only
byId("copy").addEventListener("click", async ({ target }) => {
  await navigator.clipboard.writeText(byId("curl").textContent);
  target.textContent = "Copied";
});
