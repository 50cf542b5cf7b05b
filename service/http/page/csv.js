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
  const finished = photos.filter(({ state }) => state === "done" || state === "failed");
  const ranks = Math.max(0, ...finished.map(({ answer }) => answer?.classes.length ?? 0));
  const header = ["file", "error_code", "error_message"];
  for (let rank = 1; rank <= ranks; rank += 1) header.push(...SCORE.map((name) => `${name}_${rank}`));
  const rows = finished.map(({ name, error, answer }) => {
    if (error) return [name, error.code ?? "", error.message];
    return [name, "", "", ...answer.classes.flatMap((score) => SCORE.map((field) => score[field]))];
  });
  const lines = [header, ...rows].map((row) => [...row, ...Array(header.length - row.length).fill("")].map(cell).join(","));
  return `${MARK}${lines.join("\n")}\n`;
}
