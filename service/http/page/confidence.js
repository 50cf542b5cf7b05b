// Says in words how sure a prediction is. The probabilities are calibrated: of those of 80%, about 80% are right.

import { isolated, percent } from "./dom.js";

const SURE = 0.9;
const LIKELY = 0.75;
const EVEN = 0.5;

// The words before the label of the predicted class.
export function certainty(probability) {
  if (probability >= LIKELY) return "";
  return probability >= EVEN ? "Probably " : "Perhaps ";
}

// A sentence about the predicted class and the next one, as nodes.
export function confidence([first, second]) {
  const share = percent(first.probability);
  if (first.probability >= SURE) return [`The model is sure: ${share}.`];
  if (first.probability >= LIKELY) return [`The model is fairly sure: ${share}.`];
  const next = second ? [" It may also be ", isolated(second.label), ` (${percent(second.probability)}).`] : [];
  return [first.probability >= EVEN ? `The model is not certain: ${share}.` : `The model is unsure: only ${share}.`, ...next];
}
