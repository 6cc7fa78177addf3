// The threshold, and the page put together.

const slider = byId("slider");

function countsOf(source) {
  const of = (part, whole) => `${number(part)} of ${number(whole)}`;
  return [
    `${of(source.masked[stop], source.label_tokens)} label tokens`,
    `${number(source.label_tokens - source.masked[stop])} kept`,
    `${of(source.rows_without_kept_tokens[stop], source.rows)} rows keep none`,
    `${of(source.stop_tokens_masked[stop], source.stop_tokens)} stop tokens masked`,
  ];
}

function update() {
  tell(-1);
  countMasked();
  const { text: shown, note } = stops[stop];
  byId("threshold").textContent = shown === "inf" ? "∞" : shown;
  slider.setAttribute("aria-valuetext", `perplexity ${shown}, ${sources.map(maskedShare).join(" and ")} masked`);
  byId("shares").replaceChildren(
    ...sources.map((source, place) =>
      make(
        "div",
        { class: "share", "data-stop": stop, "data-masked": source.masked[stop] },
        ...(two
          ? [make("span", { class: "sign" }, place ? "╌" : "─"), make("span", { class: "source" }, `${source.name}: `)]
          : []),
        make("b", {}, `${maskedShare(source)} masked`),
        ["", ...countsOf(source), ...(note && !two ? [note] : [])].join(" · "),
      ),
    ),
  );
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

byId("title").textContent = two ? "Two sets of scores side by side" : sources[0].name;
const facts = (source) =>
  `${number(source.rows)} rows, ${number(source.documents)} documents, ${number(source.label_tokens)} label tokens` +
  (source.strategy === "high" ? "" : `; strategy ${source.strategy}`) +
  (source.keep_stop_tokens ? "; stop tokens are kept" : "");
byId("subtitle").replaceChildren(
  ...sources.flatMap((source, place) => [
    ...(place ? [make("br")] : []),
    (two ? `${source.name}: ` : "") + facts(source),
  ]),
);
const jumps = new Map();
for (const source of sources) jumps.set(source.start, `${stops[source.start].note}: ${stops[source.start].text}`);
stops.forEach((one, at) => {
  if (jumps.has(at)) return;
  if (one.text === data.default_threshold) jumps.set(at, `the default: ${one.text}`);
});
for (const [at, label] of jumps) jump(label, at);
byId("charts").append(
  ...(two
    ? [...sources.map(distribution), shareCurve(), shareTable()]
    : [distribution(sources[0], 0), shareCurve(), shareTable()]),
);
const titles = [...new Set(sources.flatMap((source) => source.groups.map((group) => group.title)))];
for (const title of titles) {
  sources.forEach((source, place) => {
    const group = source.groups.find((one) => one.title === title);
    if (group) byId("groups").append(groupChart(source, `${place}-${titles.indexOf(title)}`, group));
    else if (two) byId("groups").append(make("div"));
  });
}
byId("strings").append(
  ...(two
    ? sources.map((source) => stringTable(source, 0, 24))
    : [stringTable(sources[0], 0, 12), stringTable(sources[0], 12, 24)]),
);
byId("list").tHead.append(
  make(
    "tr",
    {},
    make("th", {}, "row"),
    ...sources.flatMap((_, place) =>
      two
        ? [make("th", { class: "n narrow" }, `share ${place ? "╌" : "─"}`)]
        : [make("th", { class: "n" }, "masked / labels"), make("th", { class: "n narrow" }, "share")],
    ),
  ),
);
byId("legend").append(
  "perplexity",
  ...BANDS.map((upper, at) =>
    make(
      "span",
      { class: `t h${at + 1}` },
      `\u00a0${at ? `${BANDS[at - 1]}${upper === Infinity ? " and more" : `–${upper}`}` : `up to ${upper}`}\u00a0`,
    ),
  ),
  make("span", { class: "t m" }, "masked"),
  make("span", { class: "context" }, "grey: context, no label"),
  make("span", {}, "⏎ line break, → tab, ← carriage return"),
);
byId("receipt").append(
  ...sources.map((source) => {
    const card = make("div", { class: "card" });
    if (two) card.append(make("h3", {}, source.name));
    if (!source.receipt.length)
      card.append(make("p", { class: "muted" }, "These scores were looked at without a run, so there is no receipt."));
    else
      card.append(
        make(
          "table",
          {},
          make(
            "tbody",
            {},
            ...source.receipt.map(([name, value]) =>
              make("tr", {}, make("td", {}, name), make("td", {}, make("code", {}, value))),
            ),
          ),
        ),
      );
    return card;
  }),
);
slider.max = stops.length - 1;
slider.addEventListener("input", () => go(Number(slider.value)));
search.addEventListener("input", () => {
  listed = PAGE;
  list();
});
sort.addEventListener("change", list);
byId("more").addEventListener("click", () => {
  listed += PAGE;
  list();
});
for (const id of ["redact", "numbers"])
  byId(id).addEventListener("change", (event) => byId("heat").classList.toggle(id, event.target.checked));
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
