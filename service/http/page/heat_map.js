// Draws the values of a map on a canvas, and the legend of its colours.

const SIZE = 224; // pixels of a side
const STEPS = 256; // colours of a palette
const CLIPPED = 0.02; // of a kernel map's values at either end, which would take up most of the colours

// Colours at even steps, as [red, green, blue, opacity], with those between interpolated.
function palette(stops) {
  return Array.from({ length: STEPS }, (_, step) => {
    const at = (step / (STEPS - 1)) * (stops.length - 1);
    const index = Math.min(Math.floor(at), stops.length - 2);
    return stops[index].map((value, channel) => value + (at - index) * (stops[index + 1][channel] - value));
  });
}

// Blue and orange, which colour-blind readers can tell apart. What counts for nothing leaves the photo as it is.
const EVIDENCE = palette([
  [26, 58, 158, 255],
  [74, 124, 222, 190],
  [130, 160, 220, 0],
  [255, 170, 60, 190],
  [232, 72, 12, 255],
]);
const VIRIDIS = ["440154", "472d7b", "3b528b", "2c728e", "21918c", "28ae80", "5ec962", "addc30", "fde725"];
const KERNELS = palette(VIRIDIS.map((hex) => [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16)).concat(255)));

// One row at `size` places, by cubic interpolation between the centres of its cells.
function resampled(row, size) {
  const cell = (index) => row[Math.min(Math.max(index, 0), row.length - 1)];
  return Array.from({ length: size }, (_, place) => {
    const at = ((place + 0.5) * row.length) / size - 0.5;
    const index = Math.floor(at);
    const t = at - index;
    const [a, b, c, d] = [-1, 0, 1, 2].map((offset) => cell(index + offset));
    return b + 0.5 * t * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)));
  });
}

const transposed = (rows) => rows[0].map((_, column) => rows.map((row) => row[column]));

function paint(canvas, rows, colours) {
  Object.assign(canvas, { width: rows[0].length, height: rows.length });
  const image = new ImageData(canvas.width, canvas.height);
  rows.flat().forEach((share, pixel) => {
    const step = Math.min(Math.max(Math.round(share * (STEPS - 1)), 0), STEPS - 1);
    image.data.set(colours[step], 4 * pixel);
  });
  canvas.getContext("2d").putImageData(image, 0, 0);
}

// Values from `low` to `high` have the colours of the palette.
function paintBetween(canvas, grid, low, high, colours) {
  const wide = grid.map((row) => resampled(row, SIZE));
  const smooth = transposed(transposed(wide).map((column) => resampled(column, SIZE)));
  paint(canvas, smooth.map((row) => row.map((value) => (value - low) / (high - low || 1))), colours);
}

// What each place adds to the score of a class. Zero is in the middle of the colours.
export function drawEvidence(canvas, grid) {
  const most = Math.max(...grid.flat().map(Math.abs));
  paintBetween(canvas, grid, -most, most, EVIDENCE);
}

export function drawKernels(canvas, grid) {
  const values = grid.flat().sort((a, b) => a - b);
  const clipped = Math.floor(CLIPPED * values.length);
  paintBetween(canvas, grid, values[clipped], values.at(-1 - clipped), KERNELS);
}

export function drawLegends(evidence, kernels) {
  const steps = Array.from({ length: STEPS }, (_, step) => step / (STEPS - 1));
  paint(evidence, [steps], EVIDENCE);
  paint(kernels, [steps], KERNELS);
}

// Where the highest value is, in words.
export function strongestPlace(grid) {
  const flat = grid.flat();
  const at = flat.indexOf(Math.max(...flat));
  const third = (index, length) => Math.min(2, Math.floor((3 * (index + 0.5)) / length));
  const row = third(Math.floor(at / grid[0].length), grid.length);
  const column = third(at % grid[0].length, grid[0].length);
  if (row === 1 && column === 1) return "in the middle";
  return `at the ${[["top", "", "bottom"][row], ["left", "", "right"][column]].filter(Boolean).join(" ")}`;
}
