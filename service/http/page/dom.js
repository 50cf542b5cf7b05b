// Helpers for the document. Texts from outside (labels, names of files) only ever become text nodes.

export const byId = (id) => document.getElementById(id);

export function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

// Text in its own direction, so that a label in Arabic or Hebrew does not reorder what stands beside it.
export const isolated = (text) => element("bdi", {}, text);

export const percent = (share) => `${(100 * share).toFixed(share > 0.0995 && share < 0.9995 ? 0 : 1)}%`;
