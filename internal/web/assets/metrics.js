// The text format of Prometheus, and what the page computes from it.

// parse returns the samples of a text: {name, labels, value}.
export function parse(text) {
  const samples = [];
  for (const line of text.split("\n")) {
    const match = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)/.exec(line);
    if (!match) {
      continue; // a comment or an empty line
    }
    const labels = {};
    for (const [, key, value] of (match[2] ?? "").matchAll(/([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"/g)) {
      labels[key] = value.replace(/\\(.)/g, (_, c) => c === "n" ? "\n" : c);
    }
    samples.push({ name: match[1], labels, value: Number(match[3]) });
  }
  return samples;
}

// total adds up the samples of a name that match.
export function total(samples, name, matches = () => true) {
  return samples.filter((s) => s.name === name && matches(s.labels)).reduce((sum, s) => sum + s.value, 0);
}

// totals adds up the samples of a name by the value of a label.
export function totals(samples, name, label, matches = () => true) {
  const sums = new Map();
  for (const sample of samples) {
    if (sample.name === name && matches(sample.labels)) {
      sums.set(sample.labels[label], (sums.get(sample.labels[label]) ?? 0) + sample.value);
    }
  }
  return sums;
}

// minus subtracts sums from others.
export function minus(sums, earlier) {
  return new Map([...sums].map(([key, value]) => [key, value - (earlier.get(key) ?? 0)]));
}

// quantile estimates a quantile from the buckets of a histogram, as Prometheus does: evenly
// spread in a bucket. It returns NaN if nothing was measured, and Infinity if the quantile
// is above all buckets.
export function quantile(buckets, q) {
  const sorted = [...buckets].map(([bound, count]) => [Number(bound.replace("+Inf", "Infinity")), count]).sort((a, b) => a[0] - b[0]);
  const rank = q * (sorted.at(-1)?.[1] ?? 0);
  if (!rank) {
    return NaN;
  }
  let below = [0, 0];
  for (const bucket of sorted) {
    if (bucket[1] >= rank) {
      return bucket[0] === Infinity ? Infinity : below[0] + (bucket[0] - below[0]) * (rank - below[1]) / (bucket[1] - below[1]);
    }
    below = bucket;
  }
  return NaN;
}
