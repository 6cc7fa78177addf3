
"use strict";
(() => {
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
const percent = (part, whole) => (whole ? (100 * part / whole).toFixed(2) : "0.00") + "\u00a0%";
const perplexity = (value) => shortNumber(Math.exp(Math.min(value, 700)));

function shortNumber(value) {
  if (value >= 1e6) return value.toExponential(3);
  return value >= 1000 ? number(Math.round(value)) : String(Number(value.toPrecision(4)));
}

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") node.className = value; else node.setAttribute(name, value);
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
  return { at, places, numbers, name: same ? `#${numbers[0]}` : numbers.map((row) => (row < 0 ? "–" : `#${row}`)).join(" | ") };
});
const partOf = (source, entry) => entry.places[sources.indexOf(source)];
const byOrder = (a, b) => a.at - b.at;
const labelsOf = (source, place) => source.shown.labelAt[place + 1] - source.shown.labelAt[place];

let stop = data.start;
const open = []; // rows whose tokens are shown
const heat = []; // their label tokens: {node, source, label}

// ---------------------------------------------------------------- charts

const WIDTH = 540;

function chart(title, note, height, label) {
  const svg = draw("svg", { viewBox: `0 0 ${WIDTH} ${height}`, role: "img", "aria-label": label });
  const caption = make("figcaption", {}, make("h3", {}, title));
  if (note) caption.append(make("span", { class: "muted" }, note));
  return [make("figure", {}, caption, svg), svg];
}

function text(x, y, content, attributes = {}) {
  return draw("text", { x, y, ...attributes }, content);
}

function hatch(id) {
  return draw("defs", {}, draw("pattern", { id, width: 5, height: 5, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" },
    draw("rect", { width: 5, height: 5, class: "masked" }), draw("line", { x1: 0, y1: 0, x2: 0, y2: 5, class: "hatch" })));
}

function ticksUpTo(most) {
  const raw = most / 4;
  const base = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * base).find((s) => s >= raw * 0.999);
  const ticks = [];
  for (let value = 0; value < most * 1.0001; value += step) ticks.push(Number(value.toPrecision(6)));
  return [ticks, step];
}

function power(exponent) {
  return exponent < 5 ? number(10 ** exponent) : "10" + String(exponent).replace(/\d/g, (d) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[d]);
}

function perplexityAxis(svg, left, right, bottom, decades, title, andMore) {
  const x = (value) => left + (right - left) * Math.min(Math.max(value, 0) / Math.LN10, decades) / decades;
  svg.append(draw("line", { x1: left, x2: right, y1: bottom, y2: bottom, class: "axis" }));
  const every = decades > 8 ? 2 : 1;
  for (let d = 0; d <= decades; d++) {
    const at = left + (right - left) * d / decades;
    svg.append(draw("line", { x1: at, x2: at, y1: bottom, y2: bottom + 5, class: "axis" }));
    if (d % every === 0) svg.append(text(at, bottom + 18, power(d) + (d === decades && andMore ? "+" : ""), { "text-anchor": "middle" }));
    if (d < decades && decades <= 6) {
      for (const m of [2, 5]) {
        const minor = left + (right - left) * (d + Math.log10(m)) / decades;
        svg.append(draw("line", { x1: minor, x2: minor, y1: bottom, y2: bottom + 3, class: "axis" }));
      }
    }
  }
  svg.append(text((left + right) / 2, bottom + 38, title, { "text-anchor": "middle" }));
  return x;
}

function shareAxis(svg, left, right, top, bottom, most, title, ticks = ticksUpTo(most)[0], scale = (share) => share) {
  const y = (share) => bottom - (bottom - top) * scale(share) / scale(most);
  for (const tick of ticks) {
    if (tick) svg.append(draw("line", { x1: left, x2: right, y1: y(tick), y2: y(tick), class: "grid" }));
    svg.append(text(left - 7, y(tick) + 4, String(tick), { "text-anchor": "end" }));
  }
  svg.append(text(0, 0, title, { transform: `translate(11 ${(top + bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }));
  return y;
}

const updates = [];
const decadesOf = (source) => Math.max(1, source.histogram.length / data.bins_per_decade);
const allDecades = Math.max(...sources.map(decadesOf));

function distribution(source, place) {
  const [figure, svg] = chart("Distribution of perplexity", [two ? source.name : "", source.keep_stop_tokens ? "Stop tokens are kept wherever they lie." : ""].filter(Boolean).join(". "), 290, "Histogram of the label tokens' perplexity");
  const [left, right, top, bottom] = [56, WIDTH - 14, 24, 236];
  const total = source.label_tokens;
  const shares = source.histogram.map((count) => 100 * count / total);
  const most = Math.max(...sources.flatMap((other) => other.histogram.map((count) => 100 * count / other.label_tokens)));
  const upTo = Math.ceil(most / 10) * 10;
  const ticks = [0, 0.1, 1, 5, 10, 20, 40, 60, 80, 100].filter((tick) => tick <= upTo);
  const y = shareAxis(svg, left, right, top, bottom, upTo, "label tokens (%, square-root scale)", ticks, Math.sqrt);
  const x = perplexityAxis(svg, left, right, bottom, allDecades, "perplexity of the token (log scale)", true);
  const width = Math.LN10 / data.bins_per_decade;
  const id = `past-${place}`;
  const clip = draw("rect", { x: left, y: 0, width: 0, height: bottom });
  const bars = (className) => {
    const group = draw("g", className);
    shares.forEach((share, bin) => {
      if (!share) return;
      const [from, to] = [x(bin * width), x((bin + 1) * width)];
      group.append(draw("rect", { x: from, width: Math.max(0.6, to - from - 0.8), y: y(share), height: bottom - y(share) }));
    });
    return group;
  };
  svg.append(hatch(`hatch-${place}`), draw("defs", {}, draw("clipPath", { id }, clip)), bars({ class: "kept" }));
  // What lies to the right of the threshold is masked, which holds for the strategy `high` alone.
  if (source.strategy === "high") svg.append(draw("g", { "clip-path": `url(#${id})` }, bars({ fill: "var(--card)" }), bars({ fill: `url(#hatch-${place})` })));
  const line = draw("line", { y1: top - 8, y2: bottom, class: "mark" });
  const label = text(0, top - 12, "", { class: "strong" });
  svg.append(line, label);
  updates.push(() => {
    const at = x(nats[stop]);
    clip.setAttribute("x", at);
    clip.setAttribute("width", Math.max(0, WIDTH - at));
    line.setAttribute("x1", at);
    line.setAttribute("x2", at);
    const late = at > WIDTH / 2;
    label.setAttribute("x", at + (late ? -2 : 2));
    label.setAttribute("text-anchor", late ? "end" : "start");
    const masked = percent(source.masked[stop], total);
    if (source.strategy !== "high") label.textContent = `threshold; masked ${masked}`;
    else label.textContent = `kept | masked ${masked}` + (late ? "" : " →");
  });
  return figure;
}

function shareCurve() {
  const [figure, svg] = chart("Masked share by threshold", two ? "Solid: the first data set; dashed: the second." : "", 290, "Masked share of the label tokens at each threshold");
  const [left, right, top, bottom] = [56, WIDTH - 14, 24, 236];
  const y = shareAxis(svg, left, right, top, bottom, 100, "masked label tokens (%)");
  const [low, high] = data.paper_band.map((share) => 100 * share);
  svg.append(draw("rect", { x: left, width: right - left, y: y(high), height: y(low) - y(high), class: "band" }),
    text(right - 4, y(high) - 5, `${low} to ${high} %: best in the paper`, { "text-anchor": "end", class: "band-ink" }));
  const x = perplexityAxis(svg, left, right, bottom, allDecades, "threshold (perplexity, log scale)");
  const line = draw("line", { y1: top - 8, y2: bottom, class: "mark" });
  const label = text(0, top - 12, "", { class: "strong" });
  svg.append(line);
  const dots = sources.map((source, place) => {
    const share = (at) => 100 * source.masked[at] / source.label_tokens;
    const points = stops.map((_, at) => (nats[at] === Infinity ? "" : `${x(nats[at]).toFixed(1)},${y(share(at)).toFixed(1)}`));
    svg.append(draw("polyline", { points: points.join(" ").trim(), class: place ? "curve second" : "curve" }));
    return [draw("circle", { r: 5, class: "dot" }), share];
  });
  svg.append(...dots.map(([dot]) => dot), label);
  updates.push(() => {
    const at = x(nats[stop]);
    line.setAttribute("x1", at);
    line.setAttribute("x2", at);
    for (const [dot, share] of dots) {
      dot.setAttribute("cx", at);
      dot.setAttribute("cy", y(share(stop)));
    }
    const late = at > WIDTH / 2;
    label.setAttribute("x", at + (late ? -4 : 4));
    label.setAttribute("text-anchor", late ? "end" : "start");
    label.textContent = `${stops[stop].text}: ${sources.map((source) => percent(source.masked[stop], source.label_tokens)).join(" | ")}`;
  });
  return figure;
}

function shareTable() {
  const table = make("table", {}, make("thead", {}, make("tr", {}, make("th", {}, "to mask"), ...sources[0].for_percent.map(([share]) => make("th", { class: "n" }, `${share}\u00a0%`)))));
  const body = make("tbody");
  for (const source of sources) {
    body.append(make("tr", {}, make("td", {}, two ? source.name : "threshold"), ...source.for_percent.map(([, at]) => {
      const button = make("button", { type: "button", class: "link" }, stops[at].text);
      button.addEventListener("click", () => go(at));
      return make("td", { class: "n" }, button);
    })));
  }
  table.append(body);
  return make("figure", { class: two ? "" : "wide" }, make("figcaption", {}, make("h3", {}, "Threshold for a share"),
    make("span", { class: "muted" }, "The perplexity that masks so many of the label tokens, or just fewer where scores are equal.")), make("div", { class: "scroll" }, table));
}

function groupChart(source, place, group) {
  const step = 24;
  const height = group.labels.length * step + 52;
  const [figure, svg] = chart(`By ${group.title}`, [two ? source.name : "", group.note].filter(Boolean).join(". "), height, `Masked share by ${group.title}`);
  const longest = Math.max(...group.labels.map((label) => label.length));
  const [left, right, bottom] = [Math.min(170, 16 + 7.2 * longest), WIDTH - 132, group.labels.length * step + 2];
  const x = (share) => left + (right - left) * share / 100;
  svg.append(hatch(`bars-${place}`));
  for (const tick of [0, 25, 50, 75, 100]) {
    svg.append(draw("line", { x1: x(tick), x2: x(tick), y1: 0, y2: bottom, class: "grid" }),
      text(x(tick), bottom + 16, String(tick), { "text-anchor": "middle" }));
  }
  svg.append(text((left + right) / 2, bottom + 36, "masked label tokens of the class (%)", { "text-anchor": "middle" }));
  const bars = group.labels.map((label, at) => {
    const name = label.length > 24 ? label.slice(0, 23) + "…" : label;
    const bar = draw("rect", { x: left, y: at * step + 5, height: step - 9, width: 0, fill: `url(#bars-${place})` });
    const value = text(WIDTH, at * step + step / 2 + 5, "", { "text-anchor": "end" });
    svg.append(draw("rect", { x: left, y: at * step + 5, height: step - 9, width: right - left, class: "rest" }), bar,
      text(left - 8, at * step + step / 2 + 5, name, { "text-anchor": "end", class: "ink" }), value);
    return [bar, value];
  });
  updates.push(() => bars.forEach(([bar, value], at) => {
    const [masked, total] = [group.masked[at][stop], group.totals[at]];
    bar.setAttribute("width", (right - left) * masked / total);
    value.replaceChildren(draw("tspan", { class: "strong" }, (100 * masked / total).toFixed(1) + "\u00a0%"), ` of ${number(total)}`);
  }));
  return figure;
}

function stringTable(source, from, to) {
  const body = make("tbody");
  const table = make("table", {}, make("thead", {}, make("tr", {}, make("th", {}, "string"), make("th", { class: "n" }, "masked"), make("th", { class: "n" }, "occurs"), make("th", { class: "n" }, "share"))), body);
  const { labels, totals, masked } = source.strings;
  updates.push(() => {
    const order = labels.map((_, at) => at).filter((at) => masked[at][stop] > 0);
    order.sort((a, b) => masked[b][stop] - masked[a][stop] || a - b);
    body.replaceChildren(...order.slice(from, to).map((at) => make("tr", {},
      make("td", {}, make("span", { class: "code" }, labels[at].replace(/ /g, "·"))),
      make("td", { class: "n" }, number(masked[at][stop])), make("td", { class: "n" }, number(totals[at])),
      make("td", { class: "n" }, percent(masked[at][stop], totals[at])))));
    if (!order.length && !from) body.append(make("tr", {}, make("td", { colspan: 4, class: "muted" }, "nothing is masked")));
  });
  const card = make("div", { class: "card" });
  if (two) card.append(make("h3", {}, source.name));
  card.append(table);
  return card;
}

// ---------------------------------------------------------------- rows

const search = byId("search");
const sort = byId("sort");
const listBody = byId("list").tBodies[0];
let listed = PAGE;
let texts = null;

function textOf(source, place) {
  const { index, tokenAt, texts: words } = source.shown;
  let content = "";
  for (let p = tokenAt[place]; p < tokenAt[place + 1]; p++) content += words[index[p]];
  return content;
}

function answerStart(source, place) {
  const { index, tokenAt, texts: words, isLabel } = source.shown;
  let content = "";
  for (let p = tokenAt[place]; p < tokenAt[place + 1] && content.length < 80; p++) if (isLabel(p)) content += words[index[p]];
  return content.replace(/[⏎←→\s]+/g, " ").slice(0, 80);
}

function countMasked() {
  for (const { shown } of sources) {
    const { effective, labelAt, masked } = shown;
    const threshold = nats[stop];
    for (let i = 0; i < masked.length; i++) {
      let count = 0;
      for (let at = labelAt[i]; at < labelAt[i + 1]; at++) count += effective[at] > threshold;
      masked[i] = count;
    }
  }
}

function shareOf(entry) {
  let most = -1;
  for (const source of sources) {
    const place = partOf(source, entry);
    if (place < 0) continue;
    const labels = labelsOf(source, place);
    if (labels) most = Math.max(most, source.shown.masked[place] / labels);
  }
  return most;
}

function matching() {
  const wanted = search.value;
  if (!wanted.trim()) return rows.slice();
  const byNumber = /^#(\d+)$/.exec(wanted.trim());
  if (byNumber) return rows.filter((entry) => entry.numbers.includes(Number(byNumber[1])));
  if (!texts) texts = rows.map((entry) => sources.map((source) => (partOf(source, entry) < 0 ? "" : textOf(source, partOf(source, entry)).toLowerCase().replace(/⏎\n/g, "\n").replace(/→/g, "\t"))));
  const lower = wanted.toLowerCase();
  return rows.filter((entry) => texts[entry.at].some((content) => content.includes(lower)));
}

function list() {
  const found = matching();
  const orders = {
    share: (a, b) => shareOf(b) - shareOf(a) || byOrder(a, b),
    least: (a, b) => shareOf(a) - shareOf(b) || byOrder(a, b),
    row: byOrder,
    labels: (a, b) => most(b) - most(a) || byOrder(a, b),
  };
  const most = (entry) => Math.max(...sources.map((source) => (partOf(source, entry) < 0 ? 0 : labelsOf(source, partOf(source, entry)))));
  found.sort(orders[sort.value]);
  byId("found").textContent = (search.value.trim() ? `${number(found.length)} found of ` : "") + `${number(rows.length)} rows` +
    (data.num_pairs > rows.length ? ` shown of ${number(data.num_pairs)} (those with the largest share, others at even intervals)` : "");
  listBody.replaceChildren(...found.slice(0, listed).map((entry) => {
    const first = sources.find((source) => partOf(source, entry) >= 0);
    const button = make("button", { type: "button", class: "row", "data-row": entry.at, "aria-expanded": open.includes(entry) },
      entry.name, make("span", { class: "preview" }, answerStart(first, partOf(first, entry))));
    const line = make("tr", open.includes(entry) ? { class: "open" } : {}, make("td", {}, button));
    for (const source of sources) {
      const place = partOf(source, entry);
      const labels = place < 0 ? 0 : labelsOf(source, place);
      if (!two) line.append(make("td", { class: "n" }, labels ? `${number(source.shown.masked[place])} / ${number(labels)}` : "–"));
      line.append(make("td", { class: "n" }, labels ? make("b", {}, (100 * source.shown.masked[place] / labels).toFixed(1) + "\u00a0%") : "–"));
    }
    line.addEventListener("click", () => toggle(entry));
    return line;
  }));
  byId("more").hidden = found.length <= listed;
}

function toggle(entry) {
  const at = open.indexOf(entry);
  if (at >= 0) open.splice(at, 1);
  else {
    open.unshift(entry);
    open.length = Math.min(open.length, 4);
  }
  const focused = document.activeElement && document.activeElement.dataset ? document.activeElement.dataset.row : undefined;
  list();
  showHeat();
  if (focused !== undefined) {
    const again = listBody.querySelector(`button[data-row="${focused}"]`);
    if (again) again.focus();
  }
}

function band(score) {
  const value = Math.exp(score);
  return BANDS.findIndex((upper) => value <= upper) + 1;
}

function tokenNodes(source, place, from, target) {
  const { index, tokenAt, labelAt, isLabel, texts: words, nll } = source.shown;
  const end = tokenAt[place + 1];
  let label = labelAt[place];
  for (let p = tokenAt[place]; p < from; p++) label += isLabel(p);
  let context = "";
  const flush = () => {
    if (context) target.append(make("span", { class: "context" }, context));
    context = "";
  };
  const until = Math.min(end, from + MOST_TOKENS);
  for (let p = from; p < until; p++) {
    if (!isLabel(p)) {
      context += words[index[p]].replace(/⏎\n/g, "\n");
      continue;
    }
    flush();
    const node = make("span", { class: `t h${band(nll[label])}`, "data-p": perplexity(nll[label]) }, words[index[p]]);
    heat.push({ node, source, label, position: p - tokenAt[place], id: source.shown.ids[index[p]], row: source.shown.row[place] });
    node.dataset.at = heat.length - 1;
    target.append(node);
    label += 1;
  }
  flush();
  if (until < end) {
    const more = make("button", { type: "button" }, `show ${number(Math.min(MOST_TOKENS, end - until))} of ${number(end - until)} more tokens`);
    more.addEventListener("click", () => {
      more.remove();
      tokenNodes(source, place, until, target);
      markMasked();
    });
    target.append(more);
  }
}

function showHeat() {
  heat.length = 0;
  const answers = [];
  const parts = open.map((entry) => {
    const pair = make("div", { class: two ? "pair two" : "pair" });
    for (const source of sources) {
      const place = partOf(source, entry);
      const share = make("span", { class: "muted share" });
      const head = make("div", { class: "head" }, make("h3", {}, place < 0 ? source.name : `Row ${source.shown.row[place]}` + (two ? ` of ${source.name}` : "")), share);
      const card = make("div", { class: "card" }, head);
      if (place < 0) card.append(make("p", { class: "muted" }, "This data set has no such row."));
      else {
        share.dataset.place = place;
        share.dataset.source = sources.indexOf(source);
        const close = make("button", { type: "button", "aria-label": `Close row ${entry.name}` }, "close");
        close.addEventListener("click", () => toggle(entry));
        head.append(close);
        const box = make("div", { class: "text", tabindex: 0, role: "group", "aria-label": `Tokens of row ${entry.name}; the arrow keys go from one to the next` });
        tokenNodes(source, place, source.shown.tokenAt[place], box);
        card.append(box);
        answers.push(box);
      }
      pair.append(card);
    }
    return pair;
  });
  if (!parts.length) parts.push(make("p", { class: "muted" }, "Choose a row to see its tokens."));
  byId("heat").replaceChildren(...parts);
  for (const box of answers) {
    const first = box.querySelector(".t");
    if (first) box.scrollTop += first.getBoundingClientRect().top - box.getBoundingClientRect().top - box.clientHeight / 3;
  }
  markMasked();
}

const isMasked = ({ source, label }) => source.shown.effective[label] > nats[stop];

function markMasked() {
  for (const token of heat) token.node.classList.toggle("m", isMasked(token));
  for (const share of byId("heat").querySelectorAll(".share")) {
    if (share.dataset.place === undefined) continue;
    const { shown } = sources[share.dataset.source];
    const place = Number(share.dataset.place);
    const labels = shown.labelAt[place + 1] - shown.labelAt[place];
    share.textContent = `${number(shown.masked[place])} of ${number(labels)} label tokens masked (${percent(shown.masked[place], labels)})` +
      (shown.group ? ` · ${shown.groups[shown.group[place]]}` : "");
  }
}

// ---------------------------------------------------------------- what a token's perplexity is

const tip = byId("tip");
let current = -1;

function tell(at) {
  if (current >= 0 && heat[current]) heat[current].node.classList.remove("at");
  current = at;
  tip.hidden = at < 0 || !heat[at];
  if (tip.hidden) return;
  const token = heat[at];
  const score = token.source.shown.nll[token.label];
  const shown = token.node.textContent.replace(/ /g, "·");
  tip.replaceChildren(make("div", { class: "code" }, shown.length > 300 ? shown.slice(0, 300) + "…" : shown),
    make("div", {}, `perplexity ${perplexity(score)} · ${Number(score.toPrecision(5))} nats`),
    make("div", {}, `${isMasked(token) ? "masked" : "kept"} at ${stops[stop].text} · token ${token.id} · position ${token.position}`));
  token.node.classList.add("at");
  const box = token.node.getBoundingClientRect();
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(6, Math.min(box.left, innerWidth - width - 6))}px`;
  tip.style.top = `${box.top - height - 6 > 0 ? box.top - height - 6 : Math.min(box.bottom + 6, innerHeight - height - 6)}px`;
}

const tokenUnder = (event) => (event.target.closest ? event.target.closest("#heat .t") : null);
byId("heat").addEventListener("pointerover", (event) => {
  const node = tokenUnder(event);
  tell(node ? Number(node.dataset.at) : -1);
});
byId("heat").addEventListener("pointerleave", () => tell(-1));
byId("heat").addEventListener("focusout", () => tell(-1));
byId("heat").addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  const box = event.target;
  if (event.key === "Escape") tell(-1);
  if (!step || !box.classList.contains("text")) return;
  event.preventDefault();
  const tokens = [...box.querySelectorAll(".t")];
  if (!tokens.length) return;
  const now = tokens.findIndex((node) => Number(node.dataset.at) === current);
  const next = tokens[Math.max(0, Math.min(tokens.length - 1, now < 0 ? 0 : now + step))];
  next.scrollIntoView({ block: "nearest" });
  tell(Number(next.dataset.at));
});
addEventListener("scroll", () => tell(-1), { passive: true });

// ---------------------------------------------------------------- the threshold

const slider = byId("slider");

function update() {
  tell(-1);
  countMasked();
  const { text: shown, note } = stops[stop];
  byId("threshold").textContent = shown === "inf" ? "∞" : shown;
  slider.setAttribute("aria-valuetext", `perplexity ${shown}, ${sources.map((source) => percent(source.masked[stop], source.label_tokens)).join(" and ")} masked`);
  byId("shares").replaceChildren(...sources.map((source, place) => make("div", { class: "share", "data-stop": stop, "data-masked": source.masked[stop] },
    ...(two ? [make("span", { class: "sign" }, place ? "╌" : "─"), make("span", { class: "source" }, `${source.name}: `)] : []),
    make("b", {}, `${percent(source.masked[stop], source.label_tokens)} masked`),
    ` · ${number(source.masked[stop])} of ${number(source.label_tokens)} label tokens · ${number(source.label_tokens - source.masked[stop])} kept · ` +
    `${number(source.rows_without_kept_tokens[stop])} of ${number(source.rows)} rows keep none · ${number(source.stop_tokens_masked[stop])} of ${number(source.stop_tokens)} stop tokens masked` +
    (note && !two ? ` · ${note}` : ""))));
  for (const step of updates) step();
  list();
  markMasked();
}

function go(to) {
  stop = to;
  slider.value = to;
  update();
}

function jump(label, to) {
  const button = make("button", { type: "button" }, label);
  button.addEventListener("click", () => go(to));
  byId("jumps").append(button);
}

// ---------------------------------------------------------------- the page

byId("title").textContent = two ? "Two sets of scores side by side" : sources[0].name;
const facts = (source) => `${number(source.rows)} rows, ${number(source.documents)} documents, ${number(source.label_tokens)} label tokens` +
  (source.strategy === "high" ? "" : `; strategy ${source.strategy}`) + (source.keep_stop_tokens ? "; stop tokens are kept" : "");
byId("subtitle").replaceChildren(...sources.flatMap((source, place) => [...(place ? [make("br")] : []), (two ? `${source.name}: ` : "") + facts(source)]));
const jumps = new Map();
for (const source of sources) jumps.set(source.start, `${stops[source.start].note}: ${stops[source.start].text}`);
stops.forEach((one, at) => {
  if (jumps.has(at)) return;
  if (one.text === data.default_threshold) jumps.set(at, `the default: ${one.text}`);
});
for (const [at, label] of jumps) jump(label, at);
byId("charts").append(...(two ? [...sources.map(distribution), shareCurve(), shareTable()] : [distribution(sources[0], 0), shareCurve(), shareTable()]));
const titles = [...new Set(sources.flatMap((source) => source.groups.map((group) => group.title)))];
for (const title of titles) {
  sources.forEach((source, place) => {
    const group = source.groups.find((one) => one.title === title);
    if (group) byId("groups").append(groupChart(source, `${place}-${titles.indexOf(title)}`, group));
    else if (two) byId("groups").append(make("div"));
  });
}
byId("strings").append(...(two ? sources.map((source) => stringTable(source, 0, 24)) : [stringTable(sources[0], 0, 12), stringTable(sources[0], 12, 24)]));
byId("list").tHead.append(make("tr", {}, make("th", {}, "row"), ...sources.flatMap((_, place) => (two ?
  [make("th", { class: "n narrow" }, `share ${place ? "╌" : "─"}`)] : [make("th", { class: "n" }, "masked / labels"), make("th", { class: "n narrow" }, "share")]))));
byId("legend").append("perplexity", ...BANDS.map((upper, at) => make("span", { class: `t h${at + 1}` },
  `\u00a0${at ? `${BANDS[at - 1]}${upper === Infinity ? " and more" : `–${upper}`}` : `up to ${upper}`}\u00a0`)),
  make("span", { class: "t m" }, "masked"), make("span", { class: "context" }, "grey: context, no label"), make("span", {}, "⏎ line break, → tab, ← carriage return"));
byId("receipt").append(...sources.map((source) => {
  const card = make("div", { class: "card" });
  if (two) card.append(make("h3", {}, source.name));
  if (!source.receipt.length) card.append(make("p", { class: "muted" }, "These scores were looked at without a run, so there is no receipt."));
  else card.append(make("table", {}, make("tbody", {}, ...source.receipt.map(([name, value]) => make("tr", {}, make("td", {}, name), make("td", {}, make("code", {}, value)))))));
  return card;
}));
slider.max = stops.length - 1;
slider.addEventListener("input", () => go(Number(slider.value)));
search.addEventListener("input", () => { listed = PAGE; list(); });
sort.addEventListener("change", list);
byId("more").addEventListener("click", () => { listed += PAGE; list(); });
for (const id of ["redact", "numbers"]) byId(id).addEventListener("change", (event) => byId("heat").classList.toggle(id, event.target.checked));
const theme = byId("theme");
function paint(dark) {
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  theme.textContent = dark ? "Light" : "Dark";
}
const preferred = matchMedia("(prefers-color-scheme: dark)");
paint(preferred.matches);
preferred.addEventListener("change", () => paint(preferred.matches));
theme.addEventListener("click", () => paint(document.documentElement.dataset.theme !== "dark"));
go(data.start);
const worst = rows.slice().sort((a, b) => shareOf(b) - shareOf(a) || byOrder(a, b))[0];
if (worst) toggle(worst);
document.documentElement.dataset.ready = "true";
})();
