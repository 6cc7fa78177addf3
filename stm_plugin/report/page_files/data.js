// What the page holds: the data of its JSON block, unpacked, and how values are written.

const data = JSON.parse(document.getElementById("data").textContent);
const stops = data.stops;
const nats = stops.map((stop) => (stop.nats === "inf" ? Infinity : stop.nats));
const sources = data.sources;
const two = sources.length > 1;
const MOST_TOKENS = 4000; // shown of a row at a time
const PAGE = 60; // rows listed at a time
const BANDS = [1.5, 2.5, 10, 100, Infinity];
const byId = (id) => document.getElementById(id);
const number = (value) => value.toLocaleString("en-US");
const percent = (part, whole) => (whole ? ((100 * part) / whole).toFixed(2) : "0.00") + "\u00a0%";
const perplexity = (value) => shortNumber(Math.exp(Math.min(value, 700)));

function shortNumber(value) {
  if (value >= 1e6) return value.toExponential(3);
  return value >= 1000 ? number(Math.round(value)) : String(Number(value.toPrecision(4)));
}

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") node.className = value;
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

function draw(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function unpack(text, Type) {
  const packed = atob(text);
  const bytes = new Uint8Array(packed.length);
  for (let i = 0; i < packed.length; i++) bytes[i] = packed.charCodeAt(i);
  return Type === Uint8Array ? bytes : new Type(bytes.buffer);
}

// The rows of each source. All arrays are little-endian, as are the machines that browsers run on.
for (const source of sources) {
  const shown = source.shown;
  shown.index = unpack(shown.index, shown.wide ? Uint32Array : Uint16Array);
  shown.bits = unpack(shown.is_label, Uint8Array);
  shown.nll = unpack(shown.nll, Float32Array);
  shown.effective = shown.effective ? unpack(shown.effective, Float32Array) : shown.nll;
  shown.isLabel = (position) => (shown.bits[position >> 3] >> (position & 7)) & 1;
  const count = shown.row.length;
  shown.tokenAt = new Uint32Array(count + 1);
  shown.labelAt = new Uint32Array(count + 1);
  shown.masked = new Uint32Array(count);
  let labels = 0;
  for (let i = 0; i < count; i++) {
    const end = shown.tokenAt[i] + shown.lengths[i];
    for (let p = shown.tokenAt[i]; p < end; p++) labels += shown.isLabel(p);
    shown.tokenAt[i + 1] = end;
    shown.labelAt[i + 1] = labels;
  }
}
// Rows of all sources that belong together; a place is -1 where a source has none.
const rows = data.pairs.map((places, at) => {
  const numbers = places.map((place, of) => (place < 0 ? -1 : sources[of].shown.row[place]));
  const same = numbers.every((row) => row === numbers[0]);
  return {
    at,
    places,
    numbers,
    name: same ? `#${numbers[0]}` : numbers.map((row) => (row < 0 ? "–" : `#${row}`)).join(" | "),
  };
});
const partOf = (source, entry) => entry.places[sources.indexOf(source)];
const byOrder = (a, b) => a.at - b.at;
const maskedShare = (source) => percent(source.masked[stop], source.label_tokens);
const labelsOf = (source, place) => source.shown.labelAt[place + 1] - source.shown.labelAt[place];

let stop = data.start;
const open = []; // rows whose tokens are shown
const heat = []; // their label tokens: {node, source, label}
