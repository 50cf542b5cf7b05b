// The chosen photos, and the queue that sends each of them to the server once.

import { ApiError, explain } from "./api.js";

const AT_A_TIME = 2; // one is in the network while the other is on its way
const TRIES = 5; // while the server is busy
const MAX_PAUSE_S = 20;
const THUMBNAIL = 96; // pixels

export class Photo {
  state = "waiting"; // then "busy", then "done" or "failed"
  answer = null; // of the server
  error = null;
  thumbnail = null; // an ImageBitmap, if the browser can read the file
  maps = new Map(); // answers for other classes and for kernels, by their parameters

  constructor(file, name = file.name) {
    this.file = file;
    this.name = name;
  }

  async prepare() {
    if (this.thumbnail) return;
    await this.file.slice(0, 1).arrayBuffer().catch(() => {
      throw new ApiError({ message: "This is not a file that the browser can read." }); // a folder, or moved meanwhile
    });
    const options = { resizeWidth: THUMBNAIL, resizeQuality: "medium" };
    this.thumbnail = await createImageBitmap(this.file, options).catch(() => null);
  }
}

const pause = (seconds, signal) =>
  new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, 1000 * Math.min(seconds, MAX_PAUSE_S));
    signal.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    });
  });

export class Queue {
  photos = []; // in the order in which they were added
  #running = 0;
  #stop = new AbortController();
  #changed; // called with a photo whose state has changed
  #keyMissing; // called if the server wants another key; the queue waits for `resume`

  constructor(changed, keyMissing) {
    this.#changed = changed;
    this.#keyMissing = keyMissing;
  }

  add(photos) {
    this.photos.push(...photos);
    this.resume();
  }

  again(photo) {
    Object.assign(photo, { state: "waiting", error: null });
    photo.maps.clear();
    this.#changed(photo);
    this.resume();
  }

  clear() {
    this.#stop.abort();
    this.#stop = new AbortController();
    this.#running = 0;
    this.photos = [];
  }

  resume() {
    while (this.#running < AT_A_TIME) {
      const next = this.photos.find(({ state }) => state === "waiting");
      if (!next) return;
      this.#run(next, this.#stop.signal);
    }
  }

  async #run(photo, signal) {
    this.#running += 1;
    photo.state = "busy";
    this.#changed(photo);
    try {
      await photo.prepare();
      this.#changed(photo);
      photo.answer = await this.#explain(photo, signal);
      photo.state = "done";
    } catch (error) {
      if (signal.aborted) return; // the list has been cleared
      if (!(error instanceof ApiError)) throw error;
      if (error.code === "unauthorized") {
        photo.state = "waiting";
        this.#running -= 1;
        this.#changed(photo);
        this.#keyMissing();
        return;
      }
      Object.assign(photo, { state: "failed", error });
    }
    if (signal.aborted) return;
    this.#running -= 1;
    this.#changed(photo);
    this.resume();
  }

  async #explain(photo, signal) {
    for (let left = TRIES; ; left -= 1) {
      try {
        return await explain(photo.file, {}, signal);
      } catch (error) {
        if (left === 1 || !error.retryAfter) throw error;
        await pause(error.retryAfter, signal);
      }
    }
  }
}
