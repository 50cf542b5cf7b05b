// The page: photos are chosen, the queue sends them, the list and the answer show what came back.

import { describe, showLinks } from "./about.js";
import { hideAnswer, setUp, showAnswer, shownPhoto } from "./answer.js";
import { ApiError, getBlob, hasKey, setKey } from "./api.js";
import { certainty } from "./confidence.js";
import { toCsv } from "./csv.js";
import { byId, percent } from "./dom.js";
import { drawLegends } from "./heat_map.js";
import { addRows, clearRows, markRow, updateRow } from "./list.js";
import { Photo, Queue } from "./photos.js";

const RETRY_MS = 3000; // until the server is asked again, while it starts

let model = null; // as the server describes it
let wanted = []; // photos of which the first with an answer is to be shown
const examples = new Map(); // the photo of each button that has been used

const queue = new Queue(changed, () => askForKey(() => queue.resume()));

// Runs a function that sends requests, and shows its errors.
async function attempt(work, again) {
  byId("error").hidden = true;
  byId("answer").setAttribute("aria-busy", "true");
  try {
    await work();
  } catch (error) {
    if (error.name === "AbortError") return; // another photo has been chosen meanwhile
    if (!(error instanceof ApiError)) throw error;
    if (error.code === "unauthorized") askForKey(again);
    else showError(error.message);
  } finally {
    showBusy();
  }
}

function showError(message) {
  byId("error").textContent = message;
  byId("error").hidden = false;
}

const retries = new Set(); // what to do once there is a key

function askForKey(again) {
  retries.add(again);
  const form = byId("key-form");
  if (!form.hidden) return;
  form.querySelector("label").textContent = hasKey() ? "The server does not accept this API key" : "This server requires an API key";
  form.hidden = false;
  byId("key").focus();
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey(byId("key").value.trim());
  byId("key-form").hidden = true;
  const again = [...retries];
  retries.clear();
  for (const retry of again) retry();
});

const describeModel = async () => {
  model = await describe();
};

async function start() {
  await attempt(async () => {
    try {
      await describeModel();
    } catch (error) {
      if (error.code !== "unauthorized") setTimeout(start, RETRY_MS);
      throw error;
    }
    showWanted();
  }, start);
}

// Takes files, and shows the first of them that has an answer.
function open(photos) {
  if (!photos.length) return;
  wanted = photos;
  addRows(photos, { select, again });
  for (const photo of photos) updateRow(photo);
  queue.add(photos);
  showBusy();
}

const openFiles = (files) => open([...files].map((file) => new Photo(file)));

function select(photo) {
  wanted = [photo];
  showWanted();
}

function again(photo) {
  wanted = [photo];
  queue.again(photo);
}

// Called whenever the state of a photo has changed.
async function changed(photo) {
  if (!queue.photos.includes(photo)) return;
  updateRow(photo);
  showBusy();
  if (photo.state === "failed") byId("status").textContent = `${photo.name}: ${photo.error.message}`;
  if (photo.state === "done" && model && photo.answer.model !== model.name) await attempt(describeModel, showWanted);
  showWanted();
}

function showWanted() {
  const photo = wanted.find(({ state }) => state !== "failed");
  if (photo?.state === "done" && model) {
    wanted = [];
    show(photo);
  }
}

function show(photo) {
  showAnswer(photo, model.preprocess);
  markRow(photo);
  for (const [button, example] of examples) button.setAttribute("aria-pressed", example === photo);
  document.body.classList.remove("empty");
  showBusy();
  const [{ label, probability }] = photo.answer.classes;
  byId("status").textContent = `${photo.name}: ${certainty(probability)}${label}, ${percent(probability)}`;
}

function showBusy() {
  const { photos } = queue;
  const left = photos.filter(({ state }) => state === "waiting" || state === "busy").length;
  const plain = photos.length === 1 && photos[0] === shownPhoto(); // its answer says everything
  byId("list").hidden = photos.length === 0;
  byId("list").classList.toggle("single", plain);
  byId("answer").setAttribute("aria-busy", String(left > 0 && wanted.length > 0));
  byId("progress").hidden = left === 0;
  byId("progress").max = photos.length;
  byId("progress").value = photos.length - left;
  byId("count").textContent = left ? `${photos.length - left} of ${photos.length}` : `${photos.length}`;
  byId("csv").hidden = left > 0 || !photos.some(({ state }) => state === "done");
}

function clear() {
  queue.clear();
  wanted = [];
  clearRows();
  hideAnswer();
  for (const button of examples.keys()) button.setAttribute("aria-pressed", false);
  examples.clear();
  byId("error").hidden = true;
  byId("status").textContent = "";
  document.body.classList.add("empty");
  showBusy();
  byId("file").focus();
}

for (const input of document.querySelectorAll("input[type=file]")) {
  input.addEventListener("change", () => {
    openFiles(input.files);
    input.value = ""; // so that the same photo can be chosen again
  });
}

for (const button of document.querySelectorAll("#examples button")) {
  button.addEventListener("click", () => {
    const before = examples.get(button);
    if (before && before.state !== "failed") {
      select(before);
      return;
    }
    attempt(async () => {
      const { src } = button.querySelector("img");
      const photo = new Photo(await getBlob(src), src.split("/").at(-1));
      examples.set(button, photo);
      open([photo]);
    }, () => button.click());
  });
}

document.addEventListener("paste", ({ clipboardData }) => openFiles(clipboardData.files));

for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    document.body.classList.toggle("over", kind === "dragover");
    if (kind === "drop") openFiles(event.dataTransfer.files);
  });
}

byId("clear").addEventListener("click", clear);
byId("csv").addEventListener("click", () => {
  const href = URL.createObjectURL(new Blob([toCsv(queue.photos)], { type: "text/csv" }));
  Object.assign(document.createElement("a"), { href, download: "rednet.csv" }).click();
  setTimeout(() => URL.revokeObjectURL(href), 1000);
});

setUp({ attempt, outdated: again });
drawLegends(byId("evidence-legend"), byId("kernels-legend"));
start();
showLinks();
