// Shows one photo at a time: its classes, the evidence for one of them, and where a stage's kernels aggregate.
// All results come from ordinary API requests, which the page also shows as curl commands.

const byId = (id) => document.getElementById(id);
const MESSAGES = {
  unsupported_media_type: "The server cannot read this file. It supports JPEG, PNG, WebP, GIF, BMP, TIFF and AVIF, and HEIC where that is enabled.",
  unreadable_image: "This photo is damaged and cannot be decoded completely.",
  payload_too_large: "This photo is too large for the server.",
  overloaded: "The server is overloaded. Please try again in a moment.",
  not_ready: "The server is starting. Please try again in a moment.",
  draining: "The server is stopping. Please try again in a moment.",
};
const STAGES = ["decode", "queue", "inference", "draw"]; // names in the Server-Timing header

let key = ""; // stored nowhere else
let photo = null; // the chosen file and its name
let described = ""; // name of the network that the page describes
let shown = null; // the photo whose results are on the page
let classes = []; // the most probable classes
let chosen = 0; // index of the explained class in `classes`
const pending = new Map(); // the AbortController of each request in progress, by name
const times = { predict: {}, class: {}, kernels: {} };

const stage = () => document.querySelector("#stages input:checked").value;
const explainClass = () => `v1/explain?layer=class${chosen ? `&class=${classes[chosen].index}` : ""}`;
const explainKernels = () => `v1/explain?layer=${stage()}`;

class ApiError extends Error {
  constructor({ code, message }) {
    super(MESSAGES[code] ?? message);
    this.code = code;
  }
}

async function ask(path, options) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const response = await fetch(path, { ...options, headers }).catch((error) => {
    throw error.name === "AbortError" ? error : new ApiError({ message: "The server is not reachable." });
  });
  if (!response.ok) {
    const body = await response.json().catch(() => ({ error: { message: `The server answered ${response.status}.` } }));
    throw new ApiError(body.error);
  }
  return response;
}

async function send(name, path) {
  pending.get(name)?.abort();
  pending.set(name, new AbortController());
  const { signal } = pending.get(name);
  const started = performance.now();
  const response = await ask(path, { method: "POST", body: photo.file, signal });
  const answer = await (path.includes("explain") ? response.blob() : response.json());
  const timing = response.headers.get("Server-Timing") ?? "";
  const parts = Object.fromEntries([...timing.matchAll(/(\w+);dur=([\d.]+)/g)].map(([, part, ms]) => [part, Number(ms)]));
  times[name] = { ...parts, all: performance.now() - started };
  return answer;
}

// Runs a function that sends requests, and shows its errors.
async function attempt(work, retry) {
  byId("error").hidden = true;
  byId("answer").classList.add("busy");
  try {
    await work();
    byId("answer").classList.remove("busy");
  } catch (error) {
    if (error.name === "AbortError") return; // a newer request has replaced this one
    byId("answer").classList.remove("busy");
    if (!(error instanceof ApiError)) throw error;
    if (error.code === "unauthorized") askForKey(retry);
    else showError(error.message);
  }
}

function showError(message) {
  byId("error").textContent = message;
  byId("error").hidden = false;
  byId("status").textContent = "";
}

function askForKey(retry) {
  const form = byId("key-form");
  form.querySelector("label").textContent = key ? "The server does not accept this API key" : "This server requires an API key";
  form.hidden = false;
  form.onsubmit = (event) => {
    event.preventDefault();
    key = byId("key").value.trim();
    form.hidden = true;
    retry();
  };
  byId("key").focus();
}

async function describe() {
  const model = await (await ask("v1/model")).json();
  const { name, architecture, labels, device, precision } = model;
  described = name;
  byId("model").textContent = `${name}: ${architecture}, ${labels.length} classes, ${precision} on ${device}`;
  byId("known").textContent = `The network knows ${labels.length} and assigns every photo to one of them.`;
}

// Shows a new photo. The file may be a promise.
function open(file, name) {
  photo = { file, name };
  chosen = 0;
  attempt(showAll, () => open(file, name));
}

async function showAll() {
  byId("status").textContent = "Waiting for the server";
  const wanted = photo;
  wanted.file = await wanted.file;
  if (wanted !== photo) return; // a newer photo has replaced this one
  const answers = [send("predict", "v1/predict?top_k=5"), send("class", "v1/explain?layer=class"), send("kernels", explainKernels())];
  const [{ model, predictions }, classMap, kernelMap] = await Promise.all(answers).catch((error) => {
    if (error instanceof ApiError) byId("answer").hidden = true; // it belongs to another photo
    throw error;
  });
  if (model !== described) await describe();
  classes = predictions[0].classes;
  for (const image of document.querySelectorAll(".photo")) show(image, photo.file);
  showClassMap(classMap);
  showKernelMap(kernelMap);
  shown = wanted;
  byId("answer").hidden = false;
  byId("status").textContent = `${classes[0].label}, ${percent(classes[0].probability)}. The heat maps are below.`;
}

function show(image, blob) {
  URL.revokeObjectURL(image.src);
  image.src = URL.createObjectURL(blob);
}

function showClassMap(png) {
  const map = byId("class-map").querySelector(".map");
  show(map, png);
  map.alt = `The photo with a heat map: what each position contributes to ${classes[chosen].label}`;
  byId("explained").textContent = classes[chosen].label;
  showClasses();
  showAsides();
}

function showKernelMap(png) {
  const map = byId("kernel-map").querySelector(".map");
  show(map, png);
  map.alt = `The photo with a heat map: the kernels of stage ${stage().at(-1)}`;
  showAsides();
}

const percent = (share) => `${(100 * share).toFixed(1)}%`;

function element(name, content, properties = {}) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...content);
  return made;
}

function showClasses() {
  const focused = document.activeElement.closest("#classes button") !== null;
  const rows = classes.map(({ label, probability }, index) => {
    const fill = element("span", []);
    fill.style.setProperty("--share", probability);
    const bar = element("span", [fill], { className: "bar" });
    const share = element("span", [percent(probability)], { className: "share" });
    const button = element("button", [element("span", [label]), share, bar], { type: "button", onclick: () => choose(index) });
    button.setAttribute("aria-pressed", index === chosen);
    return element("li", [button]);
  });
  byId("classes").replaceChildren(...rows);
  if (focused) rows[chosen].firstChild.focus();
}

function choose(index) {
  if (photo !== shown) return; // the classes belong to another photo
  chosen = index;
  attempt(async () => showClassMap(await send("class", explainClass())), () => choose(index));
}

function chooseStage() {
  if (photo !== shown) open(photo.file, photo.name);
  else attempt(async () => showKernelMap(await send("kernels", explainKernels())), chooseStage);
}

// Shows the timings and the equivalent curl commands.
function showAsides() {
  const cell = (ms) => element("td", [ms === undefined ? "–" : ms.toFixed(1)]);
  const rows = Object.entries(times).map(([name, took]) => {
    const head = element("th", [name], { scope: "row" });
    return element("tr", [head, ...[...STAGES, "all"].map((part) => cell(took[part]))]);
  });
  byId("times").replaceChildren(...rows);
  byId("copy").textContent = "Copy";
  const file = quoted(`@${photo.name}`);
  const start = `curl ${key ? '-H "Authorization: Bearer $KEY" ' : ""}--data-binary ${file} `;
  const at = (path) => quoted(new URL(path, document.baseURI).href);
  byId("curl").textContent = [
    start + at("v1/predict?top_k=5"),
    `${start}${at(explainClass())} -o class.png`,
    `${start}${at(explainKernels())} -o ${stage()}.png`,
  ].join("\n");
}

const quoted = (text) => (/^[\w@.:/-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);

byId("file").addEventListener("change", ({ target }) => {
  if (target.files.length) open(target.files[0], target.files[0].name);
  target.value = ""; // so that the same photo can be chosen again
});

for (const button of document.querySelectorAll("[data-photo]")) {
  button.addEventListener("click", () => {
    open(ask(button.querySelector("img").src).then((response) => response.blob()), button.dataset.photo);
  });
}

document.addEventListener("paste", ({ clipboardData }) => {
  const [file] = clipboardData.files;
  if (file) open(file, file.name);
});

for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    byId("drop").classList.toggle("over", kind === "dragover");
    const [file] = kind === "drop" ? event.dataTransfer.files : [];
    if (file) open(file, file.name);
  });
}

byId("stages").addEventListener("change", chooseStage);
byId("fade").addEventListener("input", ({ target }) => byId("answer").style.setProperty("--fade", target.value / 100));
byId("copy").hidden = !navigator.clipboard; // browsers provide it on secure origins only
byId("copy").addEventListener("click", async ({ target }) => {
  await navigator.clipboard.writeText(byId("curl").textContent);
  target.textContent = "Copied";
});

const start = () => attempt(describe, start);
start();
