"""The page in headless Chromium: the slider, the tokens, the search, the keyboard, and text that would run."""

import json
import math
import re
import shutil
from itertools import pairwise

import numpy as np
import pytest
from report_helpers import IGNORE, WORDS, random_rows, scored
from test_report import HOSTILE, page_of

from stm_plugin import mask_labels
from stm_plugin.options import STMOptions

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian's package: chromium)")

TEN = ["1.1", "1.5", "2", "2.5", "3", "5", "10", "25", "100", "inf"]


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as tools:
        running = tools.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def open_page(browser, tmp_path):
    """Open pages of scored data; at the end, none may have said anything in the console or asked for anything."""
    said, asked, contexts = [], [], []

    def make(*datas, options=None, **settings):
        path = tmp_path / f"page{len(contexts)}.html"
        path.write_text(page_of(*datas, options=options), encoding="utf-8")
        contexts.append(browser.new_context(**{"viewport": {"width": 1240, "height": 900}} | settings))
        page = contexts[-1].new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(dialog.message))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-ready]")
        return page

    yield make
    for context in contexts:
        context.close()
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []


@pytest.fixture(scope="module")
def data():
    return scored(random_rows(80, turns=1))


def stops(page):
    return json.loads(page.evaluate("document.getElementById('data').textContent"))["stops"]


def go_to(page, threshold):
    texts = [stop["text"] for stop in stops(page)]
    page.locator("#slider").fill(str(texts.index(threshold)))


def rows_of(data):
    """(ids, labels, nll) of each row."""
    offsets, labels = data.documents.row_offsets.tolist(), data.documents.labels
    nll = np.full(len(labels), np.nan, np.float32)
    nll[labels != IGNORE] = data.nll
    return [(data.documents.input_ids[a:b].tolist(), labels[a:b].tolist(), nll[a:b]) for a, b in pairwise(offsets)]


def masked_by_rule(data, threshold):
    """Whether each label token of each row is masked, by `mask_labels`."""
    return [
        [left == IGNORE for left, label in zip(kept, labels, strict=True) if label != IGNORE]
        for _, labels, nll in rows_of(data)
        for kept in [mask_labels(labels, nll, threshold=float(threshold))]
    ]


def open_row(page, row):
    page.locator("#search").fill(f"#{row}")
    assert page.locator("#list tbody tr").count() == 1
    button = page.locator("#list button.row")
    if button.get_attribute("aria-expanded") == "false":
        button.click()


def test_the_slider_shows_what_mask_labels_masks(open_page, data):
    page = open_page(data)
    total = len(data.nll)
    assert page.locator("#threshold").inner_text() == "2.5"
    for threshold in TEN:
        go_to(page, threshold)
        masked = masked_by_rule(data, threshold)
        number = sum(map(sum, masked))
        assert page.locator("#threshold").inner_text() == ("∞" if threshold == "inf" else threshold)
        shown = page.locator("#shares").inner_text().replace("\xa0", " ")
        assert shown.startswith(f"{100 * number / total:.2f} % masked · {number:,} of {total:,} label tokens ·")
        assert f"{sum(map(all, masked)):,} of 80 rows keep none" in shown
        shares = sorted((sum(row) / len(row) for row in masked), reverse=True)[:60]
        listed = [float(text.split()[0]) for text in page.locator("#list td b").all_inner_texts()]
        assert listed == pytest.approx([100 * share for share in shares], abs=0.0501)


def test_tokens_are_masked_anew_as_the_slider_moves(open_page, data):
    page = open_page(data)
    open_row(page, 7)
    card = page.locator("#heat .card").first
    for threshold in ["2.5", "1.5", "10", "inf"]:
        go_to(page, threshold)
        flags = card.locator(".t").evaluate_all("nodes => nodes.map(node => node.classList.contains('m'))")
        assert flags == masked_by_rule(data, threshold)[7]
        lines = card.locator(".t.m").evaluate_all(
            "nodes => nodes.map(node => getComputedStyle(node).textDecorationLine)"
        )
        assert set(lines) <= {"line-through"}
    texts = card.locator(".t").evaluate_all("nodes => nodes.map(node => node.textContent)")
    ids, labels, _ = rows_of(data)[7]
    expected = [WORDS[token] for token, label in zip(ids, labels, strict=True) if label != IGNORE]
    assert [text.replace("⏎", "") for text in texts] == expected


def test_a_score_at_the_threshold_of_a_fraction_is_kept(open_page):
    ids = [3, *range(1, 11)]
    nll = np.arange(1, 11, dtype=np.float32)
    page = open_page(
        scored([{"input_ids": ids, "labels": [IGNORE, *ids[1:]]}], nll), options=[STMOptions(stm_mask_fraction=0.3)]
    )
    assert page.locator("#list td b").inner_text() == "30.0\xa0%"
    assert page.locator("#heat .t.m").count() == 3


@pytest.mark.parametrize("strategy", ["low", "random"])
def test_controls_are_masked_as_in_training(open_page, data, strategy):
    options = STMOptions(stm_threshold=3.0, stm_strategy=strategy, stm_seed=4)
    page = open_page(data, options=[options])
    open_row(page, 5)
    flags = (
        page.locator("#heat .card")
        .first.locator(".t")
        .evaluate_all("nodes => nodes.map(node => node.classList.contains('m'))")
    )
    _, labels, nll = rows_of(data)[5]
    kept = mask_labels(labels, nll, threshold=3.0, strategy=strategy, seed=4)
    assert flags == [left == IGNORE for left, label in zip(kept, labels, strict=True) if label != IGNORE]


def test_hovering_shows_the_perplexity(open_page, data):
    page = open_page(data)
    open_row(page, 3)
    ids, labels, nll = rows_of(data)[3]
    tokens = [(token, score) for token, label, score in zip(ids, labels, nll.tolist(), strict=True) if label != IGNORE]
    for at, (token, score) in enumerate(tokens):
        page.locator("#heat .card").first.locator(".t").nth(at).hover()
        shown = page.locator("#tip").inner_text()
        assert float(re.search(r"perplexity ([\d.,e+]+)", shown)[1].replace(",", "")) == pytest.approx(
            math.exp(score), rel=1e-3
        )
        assert float(re.search(r"([\d.e-]+) nats", shown)[1]) == pytest.approx(score, rel=1e-4)
        assert ("masked at 2.5" in shown) == (score > math.log(2.5))
        assert f"token {token} " in shown


def test_searching_finds_rows(open_page):
    rows = random_rows(90, turns=1)
    words = [*WORDS, "needle"]
    rows[71]["input_ids"][-2] = rows[71]["labels"][-2] = 16
    page = open_page(scored(rows, words=words))
    assert page.locator("#found").inner_text() == "90 rows"
    page.locator("#search").fill("NEEDLE")
    assert page.locator("#found").inner_text() == "1 found of 90 rows"
    assert page.locator("#list button.row").inner_text().startswith("#71")
    page.locator("#search").fill("nothing has this")
    assert page.locator("#list tbody tr").count() == 0
    page.locator("#search").fill("")
    assert page.locator("#list tbody tr").count() == 60
    page.locator("#more").click()
    assert page.locator("#list tbody tr").count() == 90


def test_sorting(open_page, data):
    page = open_page(data)
    counts = [sum(label != IGNORE for label in labels) for _, labels, _ in rows_of(data)]
    page.locator("#sort").select_option("labels")
    listed = [int(re.match(r"#(\d+)", text)[1]) for text in page.locator("#list button.row").all_inner_texts()]
    assert listed == sorted(range(80), key=lambda row: -counts[row])[:60]
    page.locator("#sort").select_option("row")
    assert page.locator("#list button.row").first.inner_text().startswith("#0\n")


def test_the_keyboard_does_all(open_page, data):
    page = open_page(data)
    before = page.locator("#threshold").inner_text()
    page.locator("#slider").focus()
    page.keyboard.press("ArrowRight")
    texts = [stop["text"] for stop in stops(page)]
    assert page.locator("#threshold").inner_text() == texts[texts.index(before) + 1]
    page.locator("#list button.row").nth(2).focus()
    page.keyboard.press("Enter")
    assert page.locator("#list button.row").nth(2).get_attribute("aria-expanded") == "true"
    assert page.evaluate("document.activeElement.classList.contains('row')")
    page.locator("#heat .text").first.focus()
    shown = []
    for _ in range(3):
        page.keyboard.press("ArrowRight")
        shown.append(page.locator("#tip").inner_text())
    assert len(set(shown)) == 3
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()


def test_both_themes(open_page, data):
    colours = []
    for scheme in ("light", "dark"):
        page = open_page(data, color_scheme=scheme)
        colours.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert page.evaluate("document.documentElement.dataset.theme") == scheme
    page.locator("#theme").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == colours[0] != colours[1]


def test_every_axis_has_numbers_and_a_unit(open_page, data):
    page = open_page(data)
    for figure in page.locator("figure:has(svg)").all():
        texts = figure.locator("svg text").all_text_contents()
        assert sum(bool(re.fullmatch(r"[\d,.⁰-⁹¹²³]+\+?", text)) for text in texts) >= 4, texts
        assert any("(%" in text for text in texts)


def test_redacted(open_page, data):
    page = open_page(data)
    open_row(page, 7)
    page.locator("#redact").check()
    token = page.locator("#heat .t.m").first
    assert token.evaluate("node => getComputedStyle(node, '::after').content") == '"[REDACTED]"'
    assert token.evaluate("node => getComputedStyle(node).fontSize") == "0px"


def test_perplexities_as_numbers(open_page, data):
    page = open_page(data)
    open_row(page, 7)
    page.locator("#numbers").check()
    _, labels, nll = rows_of(data)[7]
    scores = [score for score, label in zip(nll.tolist(), labels, strict=True) if label != IGNORE]
    shown = (
        page.locator("#heat .card")
        .first.locator(".t")
        .evaluate_all("nodes => nodes.map(node => getComputedStyle(node, '::after').content)")
    )
    numbers = [float(text.strip('"').replace(",", "")) for text in shown]
    assert numbers == pytest.approx([math.exp(score) for score in scores], rel=1e-3)


def test_hostile_text_runs_nothing(open_page):
    rows = [{"input_ids": [3, *range(12)], "labels": [IGNORE, *range(12)]} for _ in range(3)]
    name = "</title><script>document.title='run'</script>"
    page = open_page(scored(rows, words=HOSTILE, name=name, groups=("<b>x", "\x00"), row_groups=[0, 1, 0]))
    go_to(page, "1.1")
    page.locator("#search").fill("<img src=x")
    assert page.locator("#found").inner_text() == "3 found of 3 rows"
    page.locator("#search").fill("")
    for node in page.locator("#heat .t").all():
        node.hover()
    assert page.title().startswith("STM report: ")
    assert page.locator("img, #heat script, b b").count() == 0
    text = page.locator("#heat .text").first.inner_text()
    for shown in (
        "</script><script>",
        "<img src=x onerror=",
        "<U+202E>",
        "<U+D800>",
        "<U+0000>",
        "%DATA%",
        "&lt;b&gt;",
    ):
        assert shown in text
    assert name in page.locator("h1").inner_text()


def test_a_hostile_receipt_runs_nothing(open_page):
    receipt = {
        "model": "<img src=x onerror=alert(1)>",
        "threshold_nats": 1.0,
        "versions": {"\u202e<b>": "</script>\x00"},
    }
    page = open_page(scored(receipt=receipt), options=[STMOptions()])
    assert page.locator("h1").inner_text() == "<img src=x onerror=alert(1)> on some data"
    text = page.locator("#receipt").inner_text()
    assert "versions.<U+202E><b>" in text
    assert "</script><U+0000>" in text
    assert page.locator("img").count() == 0


def test_rows_of_a_hundred_thousand_characters(open_page):
    words = [*WORDS, "x" * 100_000]
    ids = [3, *[1, 2] * 20_000, 16, 0]
    data = scored([{"input_ids": ids, "labels": [IGNORE, *ids[1:]]}, *random_rows(3)], words=words)
    page = open_page(data)
    open_row(page, 0)
    assert page.locator("#heat .card").first.locator(".t").count() <= 4000
    page.locator("#heat button", has_text="more tokens").first.click()
    assert page.locator("#heat .card").first.locator(".t").count() <= 8000
    go_to(page, "1.5")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_two_sources_side_by_side(open_page):
    one, two = (
        scored(random_rows(20, turns=1)),
        scored(random_rows(20, seed=0, turns=1), nll=scored(random_rows(20, turns=1)).nll[::-1].copy()),
    )
    page = open_page(one, two)
    go_to(page, "3")
    shown = page.locator("#shares .share").all_inner_texts()
    for data, text in zip((one, two), shown, strict=True):
        assert f"{sum(map(sum, masked_by_rule(data, 3))):,} of {len(data.nll):,} label tokens" in text
    open_row(page, 4)
    cards = page.locator("#heat .pair").first.locator(".card")
    for data, card in zip((one, two), cards.all(), strict=True):
        flags = card.locator(".t").evaluate_all("nodes => nodes.map(node => node.classList.contains('m'))")
        assert flags == masked_by_rule(data, 3)[4]


@pytest.mark.parametrize("width", [390, 1600])
def test_nothing_is_wider_than_the_window(open_page, data, width):
    page = open_page(data, viewport={"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
