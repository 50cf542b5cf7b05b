// One photo at a time: its classes, what speaks for one of them, and where a stage's kernels aggregate.
// Every answer comes from an ordinary request to the API, the one that the page shows for curl.

const byId = (id) => document.getElementById(id);
const KINDLY = {
  unsupported_media_type: "This is no photo that the server can read. JPEG, PNG, WebP, GIF, BMP and TIFF work.",
  unreadable_image: "This photo is damaged: it begins like one, but cannot be read to its end.",
  payload_too_large: "This photo is too large for the server.",
  overloaded: "The server has too much to do. Please try again in a moment.",
  not_ready: "The server is starting. Please try again in a moment.",
  draining: "The server is stopping. Please try again in a moment.",
};
const STAGES = ["decode", "queue", "inference", "draw"]; // of a request, as Server-Timing names them

let key = ""; // kept in this variable only
let photo = null; // a file and its name
let shown = null; // the photo whose answer is on the page
let classes = []; // the likeliest ones
let chosen = 0; // which of them is explained
const asking = new Map(); // what ends a request that is not wanted any more, by its name
const times = { predict: {}, class: {}, kernels: {} };

const stage = () => document.querySelector("#stages input:checked").value;
const explainClass = () => `v1/explain?layer=class${chosen ? `&class=${classes[chosen].index}` : ""}`;
const explainKernels = () => `v1/explain?layer=${stage()}`;

class Refusal extends Error {
  constructor({ code, message }) {
    super(KINDLY[code] ?? message);
    this.code = code;
  }
}

async function ask(path, options) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const response = await fetch(path, { ...options, headers }).catch((error) => {
    throw error.name === "AbortError" ? error : new Refusal({ message: "The server cannot be reached." });
  });
  if (!response.ok) {
    const body = await response.json().catch(() => ({ error: { message: `The server answered ${response.status}.` } }));
    throw new Refusal(body.error);
  }
  return response;
}

async function send(name, path) {
  asking.get(name)?.abort();
  asking.set(name, new AbortController());
  const { signal } = asking.get(name);
  const started = performance.now();
  const response = await ask(path, { method: "POST", body: photo.file, signal });
  const answer = await (path.includes("explain") ? response.blob() : response.json());
  const timing = response.headers.get("Server-Timing") ?? "";
  const parts = Object.fromEntries([...timing.matchAll(/(\w+);dur=([\d.]+)/g)].map(([, part, ms]) => [part, Number(ms)]));
  times[name] = { ...parts, all: performance.now() - started };
  return answer;
}

// Runs what asks the server, and says what came of it.
async function attempt(work, retry) {
  byId("error").hidden = true;
  byId("answer").classList.add("busy");
  try {
    await work();
    byId("answer").classList.remove("busy");
  } catch (error) {
    if (error.name === "AbortError") return; // the answer to something newer is on its way
    byId("answer").classList.remove("busy");
    if (!(error instanceof Refusal)) throw error;
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
  form.querySelector("label").textContent = key ? "This is none of the server's API keys" : "This server wants an API key";
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
  byId("model").textContent = `${name}: ${architecture}, ${labels.length} classes, ${precision} on ${device}`;
  byId("known").textContent = `The network knows ${labels.length} and takes everything for one of them.`;
}

// Shows a new photo; the file may still be on its way.
function open(file, name) {
  photo = { file, name };
  chosen = 0;
  attempt(showAll, () => open(file, name));
}

async function showAll() {
  byId("status").textContent = "Asking the server";
  const wanted = photo;
  wanted.file = await wanted.file;
  if (wanted !== photo) return; // there is a newer one
  const answers = [send("predict", "v1/predict?top_k=5"), send("class", "v1/explain?layer=class"), send("kernels", explainKernels())];
  const [{ predictions }, classMap, kernelMap] = await Promise.all(answers).catch((error) => {
    if (error instanceof Refusal) byId("answer").hidden = true; // another photo's
    throw error;
  });
  classes = predictions[0].classes;
  for (const image of document.querySelectorAll(".photo")) show(image, photo.file);
  showClassMap(classMap);
  showKernelMap(kernelMap);
  shown = wanted;
  byId("answer").hidden = false;
  byId("status").textContent = `${classes[0].label}, ${percent(classes[0].probability)}. The heat-maps are below.`;
}

function show(image, blob) {
  URL.revokeObjectURL(image.src);
  image.src = URL.createObjectURL(blob);
}

function showClassMap(png) {
  const map = byId("class-map").querySelector(".map");
  show(map, png);
  map.alt = `The photo under a heat-map: what each place adds to ${classes[chosen].label}`;
  byId("explained").textContent = classes[chosen].label;
  showClasses();
  showAsides();
}

function showKernelMap(png) {
  const map = byId("kernel-map").querySelector(".map");
  show(map, png);
  map.alt = `The photo under a heat-map: the kernels of stage ${stage().at(-1)}`;
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
  if (photo !== shown) return; // these are the classes of another photo
  chosen = index;
  attempt(async () => showClassMap(await send("class", explainClass())), () => choose(index));
}

function chooseStage() {
  if (photo !== shown) open(photo.file, photo.name);
  else attempt(async () => showKernelMap(await send("kernels", explainKernels())), chooseStage);
}

// Beside the pictures: times, and the commands that do the same.
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
byId("copy").hidden = !navigator.clipboard; // which browsers have only where nobody can listen
byId("copy").addEventListener("click", async ({ target }) => {
  await navigator.clipboard.writeText(byId("curl").textContent);
  target.textContent = "Copied";
});

const start = () => attempt(describe, start);
start();
