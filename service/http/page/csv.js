// The answers as a file for spreadsheets, with the columns of `rednet predict --output`.

const SCORE = ["index", "id", "label", "probability"];
const MARK = "\ufeff"; // without it, Excel reads UTF-8 as another encoding

// A name that begins like a formula would be run by a spreadsheet.
const harmless = (text) => (/^[=+\-@\t\r]/.test(text) ? `'${text}` : text);

const cell = (value) => {
  const text = typeof value === "number" ? String(value) : harmless(value);
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
};

export function toCsv(photos) {
  const finished = photos
    .filter(({ state }) => state === "done" || state === "failed")
    .map(({ name, error, answer }) => ({ name, error, answer: error ? null : answer }));
  const ranks = Array(Math.max(0, ...finished.map(({ answer }) => answer?.classes.length ?? 0))).keys();
  const columns = [
    ["file", ({ name }) => name],
    ["error_code", ({ error }) => error?.code],
    ["error_message", ({ error }) => error?.message],
    ...[...ranks].flatMap((rank) => SCORE.map((field) => [`${field}_${rank + 1}`, ({ answer }) => answer?.classes[rank]?.[field]])),
  ];
  if (finished.some(({ answer }) => answer?.familiarity !== undefined)) columns.push(["familiarity", ({ answer }) => answer?.familiarity]);
  const rows = finished.map((photo) => columns.map(([, value]) => value(photo) ?? ""));
  const lines = [columns.map(([name]) => name), ...rows].map((row) => row.map(cell).join(","));
  return `${MARK}${lines.join("\n")}\n`;
}
