// The charts and the tables: each is drawn once, and adds to `updates` what a new threshold changes.

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
  return draw(
    "defs",
    {},
    draw(
      "pattern",
      { id, width: 5, height: 5, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" },
      draw("rect", { width: 5, height: 5, class: "masked" }),
      draw("line", { x1: 0, y1: 0, x2: 0, y2: 5, class: "hatch" }),
    ),
  );
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
  return exponent < 5
    ? number(10 ** exponent)
    : "10" + [...String(exponent)].map((digit) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[digit]).join("");
}

function perplexityAxis(svg, left, right, bottom, decades, title, andMore) {
  const x = (value) => left + ((right - left) * Math.min(Math.max(value, 0) / Math.LN10, decades)) / decades;
  svg.append(draw("line", { x1: left, x2: right, y1: bottom, y2: bottom, class: "axis" }));
  const every = decades > 8 ? 2 : 1;
  for (let d = 0; d <= decades; d++) {
    const at = left + ((right - left) * d) / decades;
    svg.append(draw("line", { x1: at, x2: at, y1: bottom, y2: bottom + 5, class: "axis" }));
    if (d % every === 0)
      svg.append(text(at, bottom + 18, power(d) + (d === decades && andMore ? "+" : ""), { "text-anchor": "middle" }));
    if (d < decades && decades <= 6) {
      for (const m of [2, 5]) {
        const minor = left + ((right - left) * (d + Math.log10(m))) / decades;
        svg.append(draw("line", { x1: minor, x2: minor, y1: bottom, y2: bottom + 3, class: "axis" }));
      }
    }
  }
  svg.append(text((left + right) / 2, bottom + 38, title, { "text-anchor": "middle" }));
  return x;
}

function shareAxis(svg, left, right, top, bottom, most, title, ticks = ticksUpTo(most)[0], scale = (share) => share) {
  const y = (share) => bottom - ((bottom - top) * scale(share)) / scale(most);
  for (const tick of ticks) {
    if (tick) svg.append(draw("line", { x1: left, x2: right, y1: y(tick), y2: y(tick), class: "grid" }));
    svg.append(text(left - 7, y(tick) + 4, String(tick), { "text-anchor": "end" }));
  }
  svg.append(
    text(0, 0, title, { transform: `translate(11 ${(top + bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }),
  );
  return y;
}

const updates = [];
const decadesOf = (source) => Math.max(1, source.histogram.length / data.bins_per_decade);
const allDecades = Math.max(...sources.map(decadesOf));

function distribution(source, place) {
  const [figure, svg] = chart(
    "Distribution of perplexity",
    [two ? source.name : "", source.keep_stop_tokens ? "Stop tokens are kept wherever they lie." : ""]
      .filter(Boolean)
      .join(". "),
    290,
    "Histogram of the label tokens' perplexity",
  );
  const [left, right, top, bottom] = [56, WIDTH - 14, 24, 236];
  const total = source.label_tokens;
  const shares = source.histogram.map((count) => (100 * count) / total);
  const most = Math.max(
    ...sources.flatMap((other) => other.histogram.map((count) => (100 * count) / other.label_tokens)),
  );
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
      group.append(
        draw("rect", { x: from, width: Math.max(0.6, to - from - 0.8), y: y(share), height: bottom - y(share) }),
      );
    });
    return group;
  };
  svg.append(hatch(`hatch-${place}`), draw("defs", {}, draw("clipPath", { id }, clip)), bars({ class: "kept" }));
  // What lies to the right of the threshold is masked, which holds for the strategy `high` alone.
  if (source.strategy === "high")
    svg.append(
      draw("g", { "clip-path": `url(#${id})` }, bars({ fill: "var(--card)" }), bars({ fill: `url(#hatch-${place})` })),
    );
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
    const masked = maskedShare(source);
    if (source.strategy !== "high") label.textContent = `threshold; masked ${masked}`;
    else label.textContent = `kept | masked ${masked}` + (late ? "" : " →");
  });
  return figure;
}

function shareCurve() {
  const [figure, svg] = chart(
    "Masked share by threshold",
    two ? "Solid: the first data set; dashed: the second." : "",
    290,
    "Masked share of the label tokens at each threshold",
  );
  const [left, right, top, bottom] = [56, WIDTH - 14, 24, 236];
  const y = shareAxis(svg, left, right, top, bottom, 100, "masked label tokens (%)");
  const [low, high] = data.paper_band.map((share) => 100 * share);
  svg.append(
    draw("rect", { x: left, width: right - left, y: y(high), height: y(low) - y(high), class: "band" }),
    text(right - 4, y(high) - 5, `${low} to ${high} %: best in the paper`, {
      "text-anchor": "end",
      class: "band-ink",
    }),
  );
  const x = perplexityAxis(svg, left, right, bottom, allDecades, "threshold (perplexity, log scale)");
  const line = draw("line", { y1: top - 8, y2: bottom, class: "mark" });
  const label = text(0, top - 12, "", { class: "strong" });
  svg.append(line);
  const dots = sources.map((source, place) => {
    const share = (at) => (100 * source.masked[at]) / source.label_tokens;
    const points = stops.map((_, at) =>
      nats[at] === Infinity ? "" : `${x(nats[at]).toFixed(1)},${y(share(at)).toFixed(1)}`,
    );
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
    label.textContent = `${stops[stop].text}: ${sources.map(maskedShare).join(" | ")}`;
  });
  return figure;
}

function shareTable() {
  const table = make(
    "table",
    {},
    make(
      "thead",
      {},
      make(
        "tr",
        {},
        make("th", {}, "to mask"),
        ...sources[0].for_percent.map(([share]) => make("th", { class: "n" }, `${share}\u00a0%`)),
      ),
    ),
  );
  const body = make("tbody");
  for (const source of sources) {
    body.append(
      make(
        "tr",
        {},
        make("td", {}, two ? source.name : "threshold"),
        ...source.for_percent.map(([, at]) => {
          const button = make("button", { type: "button", class: "link" }, stops[at].text);
          button.addEventListener("click", () => go(at));
          return make("td", { class: "n" }, button);
        }),
      ),
    );
  }
  table.append(body);
  return make(
    "figure",
    { class: two ? "" : "wide" },
    make(
      "figcaption",
      {},
      make("h3", {}, "Threshold for a share"),
      make(
        "span",
        { class: "muted" },
        "The perplexity that masks so many of the label tokens, or just fewer where scores are equal.",
      ),
    ),
    make("div", { class: "scroll" }, table),
  );
}

function groupChart(source, place, group) {
  const step = 24;
  const height = group.labels.length * step + 52;
  const [figure, svg] = chart(
    `By ${group.title}`,
    [two ? source.name : "", group.note].filter(Boolean).join(". "),
    height,
    `Masked share by ${group.title}`,
  );
  const longest = Math.max(...group.labels.map((label) => label.length));
  const [left, right, bottom] = [Math.min(170, 16 + 7.2 * longest), WIDTH - 132, group.labels.length * step + 2];
  const x = (share) => left + ((right - left) * share) / 100;
  svg.append(hatch(`bars-${place}`));
  for (const tick of [0, 25, 50, 75, 100]) {
    svg.append(
      draw("line", { x1: x(tick), x2: x(tick), y1: 0, y2: bottom, class: "grid" }),
      text(x(tick), bottom + 16, String(tick), { "text-anchor": "middle" }),
    );
  }
  svg.append(
    text((left + right) / 2, bottom + 36, "masked label tokens of the class (%)", { "text-anchor": "middle" }),
  );
  const bars = group.labels.map((label, at) => {
    const name = label.length > 24 ? label.slice(0, 23) + "…" : label;
    const bar = draw("rect", { x: left, y: at * step + 5, height: step - 9, width: 0, fill: `url(#bars-${place})` });
    const value = text(WIDTH, at * step + step / 2 + 5, "", { "text-anchor": "end" });
    svg.append(
      draw("rect", { x: left, y: at * step + 5, height: step - 9, width: right - left, class: "rest" }),
      bar,
      text(left - 8, at * step + step / 2 + 5, name, { "text-anchor": "end", class: "ink" }),
      value,
    );
    return [bar, value];
  });
  updates.push(() =>
    bars.forEach(([bar, value], at) => {
      const [masked, total] = [group.masked[at][stop], group.totals[at]];
      bar.setAttribute("width", ((right - left) * masked) / total);
      value.replaceChildren(
        draw("tspan", { class: "strong" }, ((100 * masked) / total).toFixed(1) + "\u00a0%"),
        ` of ${number(total)}`,
      );
    }),
  );
  return figure;
}

function stringTable(source, from, to) {
  const body = make("tbody");
  const table = make(
    "table",
    {},
    make(
      "thead",
      {},
      make(
        "tr",
        {},
        make("th", {}, "string"),
        make("th", { class: "n" }, "masked"),
        make("th", { class: "n" }, "occurs"),
        make("th", { class: "n" }, "share"),
      ),
    ),
    body,
  );
  const { labels, totals, masked } = source.strings;
  updates.push(() => {
    const order = labels.map((_, at) => at).filter((at) => masked[at][stop] > 0);
    order.sort((a, b) => masked[b][stop] - masked[a][stop] || a - b);
    body.replaceChildren(
      ...order
        .slice(from, to)
        .map((at) =>
          make(
            "tr",
            {},
            make("td", {}, make("span", { class: "code" }, labels[at].replace(/ /g, "·"))),
            make("td", { class: "n" }, number(masked[at][stop])),
            make("td", { class: "n" }, number(totals[at])),
            make("td", { class: "n" }, percent(masked[at][stop], totals[at])),
          ),
        ),
    );
    if (!order.length && !from)
      body.append(make("tr", {}, make("td", { colspan: 4, class: "muted" }, "nothing is masked")));
  });
  const card = make("div", { class: "card" });
  if (two) card.append(make("h3", {}, source.name));
  card.append(table);
  return card;
}
