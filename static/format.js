// How figures read. Sizes are decimal everywhere: 1 GB is 1,000,000,000 bytes, as Ollama has it.

const MIB = 2 ** 20;
const UNITS = [
  ["TB", 1e12],
  ["GB", 1e9],
];

export function size(bytes) {
  if (bytes == null) return "?";
  if (bytes > 0 && bytes < 5e4) return "under\u00a00.1\u00a0MB";
  const [unit, one] = UNITS.find(([, least]) => bytes >= least) ?? ["MB", 1e6];
  const number = bytes / one;
  const digits = number < 10 && bytes > 0 ? 1 : 0;
  return `${number.toFixed(digits)}\u00a0${unit}`;
}

// Fields that end in `_mb` count MiB.
export const megabytes = (value) => size(value == null ? null : value * MIB);
export const percent = (value) => `${Math.round(value)}\u00a0%`;
export const clock = (moment) => new Date(moment).toTimeString().slice(0, 8);
export const count = (number, word) => `${number} ${word}${number === 1 ? "" : "s"}`;

export function span(seconds) {
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
}

// A name as Ollama lists it.
export function fullName(name) {
  const lower = name.toLowerCase();
  return lower.includes(":", lower.lastIndexOf("/") + 1) ? lower : `${lower}:latest`;
}
