// The list of rows, the search, and the tokens of the rows that are open.

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
  for (let p = tokenAt[place]; p < tokenAt[place + 1] && content.length < 80; p++)
    if (isLabel(p)) content += words[index[p]];
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
  if (!texts)
    texts = rows.map((entry) =>
      sources.map((source) =>
        partOf(source, entry) < 0
          ? ""
          : textOf(source, partOf(source, entry)).toLowerCase().replace(/⏎\n/g, "\n").replace(/→/g, "\t"),
      ),
    );
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
  const most = (entry) =>
    Math.max(...sources.map((source) => (partOf(source, entry) < 0 ? 0 : labelsOf(source, partOf(source, entry)))));
  found.sort(orders[sort.value]);
  byId("found").textContent =
    (search.value.trim() ? `${number(found.length)} found of ` : "") +
    `${number(rows.length)} rows` +
    (data.num_pairs > rows.length
      ? ` shown of ${number(data.num_pairs)} (those with the largest share, others at even intervals)`
      : "");
  listBody.replaceChildren(
    ...found.slice(0, listed).map((entry) => {
      const first = sources.find((source) => partOf(source, entry) >= 0);
      const button = make(
        "button",
        { type: "button", class: "row", "data-row": entry.at, "aria-expanded": open.includes(entry) },
        entry.name,
        make("span", { class: "preview" }, answerStart(first, partOf(first, entry))),
      );
      const line = make("tr", open.includes(entry) ? { class: "open" } : {}, make("td", {}, button));
      for (const source of sources) {
        const place = partOf(source, entry);
        const labels = place < 0 ? 0 : labelsOf(source, place);
        if (!two)
          line.append(
            make("td", { class: "n" }, labels ? `${number(source.shown.masked[place])} / ${number(labels)}` : "–"),
          );
        line.append(
          make(
            "td",
            { class: "n" },
            labels ? make("b", {}, ((100 * source.shown.masked[place]) / labels).toFixed(1) + "\u00a0%") : "–",
          ),
        );
      }
      line.addEventListener("click", () => toggle(entry));
      return line;
    }),
  );
  byId("more").hidden = found.length <= listed;
}

function toggle(entry) {
  const at = open.indexOf(entry);
  if (at >= 0) open.splice(at, 1);
  else {
    open.unshift(entry);
    open.length = Math.min(open.length, 4);
  }
  const focused =
    document.activeElement && document.activeElement.dataset ? document.activeElement.dataset.row : undefined;
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
    heat.push({
      node,
      source,
      label,
      position: p - tokenAt[place],
      id: source.shown.ids[index[p]],
      row: source.shown.row[place],
    });
    node.dataset.at = heat.length - 1;
    target.append(node);
    label += 1;
  }
  flush();
  if (until < end) {
    const more = make(
      "button",
      { type: "button" },
      `show ${number(Math.min(MOST_TOKENS, end - until))} of ${number(end - until)} more tokens`,
    );
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
      const head = make(
        "div",
        { class: "head" },
        make("h3", {}, place < 0 ? source.name : `Row ${source.shown.row[place]}` + (two ? ` of ${source.name}` : "")),
        share,
      );
      const card = make("div", { class: "card" }, head);
      if (place < 0) card.append(make("p", { class: "muted" }, "This data set has no such row."));
      else {
        share.dataset.place = place;
        share.dataset.source = sources.indexOf(source);
        const close = make("button", { type: "button", "aria-label": `Close row ${entry.name}` }, "close");
        close.addEventListener("click", () => toggle(entry));
        head.append(close);
        const box = make("div", {
          class: "text",
          tabindex: 0,
          role: "group",
          "aria-label": `Tokens of row ${entry.name}; the arrow keys go from one to the next`,
        });
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
    if (first)
      box.scrollTop += first.getBoundingClientRect().top - box.getBoundingClientRect().top - box.clientHeight / 3;
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
    share.textContent =
      `${number(shown.masked[place])} of ${number(labels)} label tokens masked (${percent(shown.masked[place], labels)})` +
      (shown.group ? ` · ${shown.groups[shown.group[place]]}` : "");
  }
}
