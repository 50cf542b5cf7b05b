// Requests to the server that serves the page. Their errors are sentences for people.

const MESSAGES = {
  unsupported_media_type: "This kind of file cannot be read here. Try a JPEG, PNG or WebP.",
  unreadable_image: "This photo is damaged.",
  payload_too_large: "This photo is too large for the server.",
  overloaded: "The server is busy. Try again in a moment.",
  not_ready: "The server is starting. Try again in a moment.",
  draining: "The server is stopping. Try again in a moment.",
  deadline_exceeded: "The server took too long. Try again in a moment.",
};
const LATER = new Set(["overloaded", "not_ready", "draining"]); // the server says when to try again

export class ApiError extends Error {
  constructor({ code, message }, retryAfter) {
    super(MESSAGES[code] ?? message);
    this.code = code;
    this.retryAfter = LATER.has(code) ? Number(retryAfter) || 1 : null; // seconds
    this.mayPass = code === undefined || code === "deadline_exceeded" || LATER.has(code); // another try may help
  }
}

let key = ""; // stored nowhere else

export const hasKey = () => key !== "";
export const setKey = (text) => {
  key = text;
};

function unreachable(error) {
  throw error.name === "AbortError" ? error : new ApiError({ message: "The server cannot be reached." });
}

async function request(path, options = {}) {
  const sent = key;
  const headers = { ...options.headers, ...(sent && { Authorization: `Bearer ${sent}` }) };
  const response = await fetch(path, { ...options, headers }).catch(unreachable);
  if (response.ok) return response;
  if (response.status === 401 && key !== sent) return request(path, options); // another key was entered meanwhile
  const body = await response.json().catch(() => ({})); // a proxy's errors are HTML
  const code = response.status === 413 ? "payload_too_large" : undefined;
  throw new ApiError(body.error ?? { code, message: `The server answered ${response.status}.` }, response.headers.get("Retry-After"));
}

const bodyOf = (response) => response.json().catch(unreachable);

export const getJson = async (path) => bodyOf(await request(path));

export const getBlob = async (path) => (await request(path)).blob();

export const isServed = async (path) => (await fetch(path, { method: "HEAD" }).catch(() => null))?.ok ?? false;

export const explainPath = (parameters) => `v1/explain.json${Object.keys(parameters).length ? "?" : ""}${new URLSearchParams(parameters)}`;

// The classes of a photo and one map, from one request.
export async function explain(file, parameters, signal) {
  const started = performance.now();
  // Without this header, a file that is named photo.json would be sent as JSON.
  const headers = { "Content-Type": "application/octet-stream" };
  const response = await request(explainPath(parameters), { method: "POST", body: file, headers, signal });
  const { model, explanations: [explanation] } = await bodyOf(response);
  const timing = response.headers.get("Server-Timing") ?? "";
  const times = Object.fromEntries([...timing.matchAll(/(\w+);dur=([\d.]+)/g)].map(([, part, ms]) => [part, Number(ms)]));
  return { ...explanation, model, times: { ...times, all: performance.now() - started } };
}
