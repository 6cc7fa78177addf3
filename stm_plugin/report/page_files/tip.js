// What a token's perplexity is, under the pointer or the arrow keys.

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
  tip.replaceChildren(
    make("div", { class: "code" }, shown.length > 300 ? shown.slice(0, 300) + "…" : shown),
    make("div", {}, `perplexity ${perplexity(score)} · ${Number(score.toPrecision(5))} nats`),
    make(
      "div",
      {},
      `${isMasked(token) ? "masked" : "kept"} at ${stops[stop].text} · token ${token.id} · position ${token.position}`,
    ),
  );
  token.node.classList.add("at");
  const box = token.node.getBoundingClientRect();
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(6, Math.min(box.left, innerWidth - width - 6))}px`;
  const above = box.top - height - 6;
  tip.style.top = `${above > 0 ? above : Math.min(box.bottom + 6, innerHeight - height - 6)}px`;
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
