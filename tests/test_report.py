"""The report's data against loops, and what the page may contain."""

import base64
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
from report_helpers import IGNORE, WORDS, kept_of, masked_rows, nll_rows, random_rows, scored, stored

from stm_plugin import mask_labels
from stm_plugin.cli import main
from stm_plugin.inspection.scored import ScoredData
from stm_plugin.options import STMOptions
from stm_plugin.report.figures import make_figures, pair_rows
from stm_plugin.report.page import chosen_rows, make_page, write_report

ROOT = Path(__file__).resolve().parents[1]
HOSTILE = [
    "<|im_end|>",
    "</script><script>document.title='run'</script>",
    "<img src=x onerror=\"document.title='run'\">",
    "<!--<script>",
    "\u202e evil \u2066",
    "\ud800",
    "\x00",
    "%DATA%",
    "&lt;b&gt;",
    "]]>",
    "'\"`${document.title='run'}",
    "\u2028",
]


def content_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def page_of(*datas, options=None):
    return make_page(make_figures(list(datas), options or [data.options for data in datas]))


def thresholds(content):
    return [math.inf if stop["nats"] == "inf" else stop["nats"] for stop in content["stops"]]


def array(text, dtype):
    return np.frombuffer(base64.b64decode(text), dtype)


@pytest.fixture(scope="module")
def data():
    return scored(random_rows(40), groups=("web", "books"), row_groups=[i % 2 for i in range(40)])


@pytest.fixture(scope="module")
def content(data):
    return content_of(page_of(data))


def test_every_stop_masks_what_mask_labels_masks(data, content):
    (source,) = content["sources"]
    offsets = data.documents.row_offsets.tolist()
    for stop, masked, empty, of_stop in zip(
        content["stops"],
        source["masked"],
        source["rows_without_kept_tokens"],
        source["stop_tokens_masked"],
        strict=True,
    ):
        expected = [0, 0, 0]
        for nll, start, end in zip(nll_rows(data), offsets[:-1], offsets[1:], strict=True):
            labels = data.documents.labels[start:end].tolist()
            kept = mask_labels(labels, np.array(nll, np.float32), threshold=float(stop["text"]))
            gone = [label for label, left in zip(labels, kept, strict=True) if label != left]
            expected[0] += len(gone)
            expected[1] += all(label == IGNORE for label in kept)
            expected[2] += gone.count(0)
        assert [masked, empty, of_stop] == expected
    assert source["label_tokens"] == len(data.nll)
    assert source["stop_tokens"] == data.documents.labels.tolist().count(0)


def test_stops_are_fine_and_start_at_the_threshold(data, content):
    (source,) = content["sources"]
    stops = content["stops"]
    assert thresholds(content) == sorted(set(thresholds(content)))
    assert stops[content["start"]]["text"] == "2.5"
    assert {"1.5", "3", "10", "100", "inf"} <= {stop["text"] for stop in stops}
    shares = [0, *sorted(masked / len(data.nll) for masked in source["masked"])]
    assert max(np.diff(shares)) < 0.03
    for percent, at in source["for_percent"]:
        assert source["masked"][at] == math.floor(percent / 100 * len(data.nll))


def group(content, title):
    (found,) = [one for one in content["sources"][0]["groups"] if one["title"] == title]
    return found


def answers(data):
    """(row, turn, tokens) of each answer, a token as (position in the answer, id, nll)."""
    offsets = data.documents.row_offsets.tolist()
    for row, nll in enumerate(nll_rows(data)):
        ids = data.documents.input_ids[offsets[row] : offsets[row + 1]].tolist()
        turn = 0
        for is_label, part in groupby(zip(ids, nll, strict=True), key=lambda pair: not math.isnan(pair[1])):
            if is_label:
                yield row, turn, [(place, *pair) for place, pair in enumerate(part)]
                turn += 1


def check_group(found, content, classes):
    """Compare with counting (class, nll) pairs one by one."""
    totals = Counter(name for name, _ in classes)
    assert dict(zip(found["labels"], found["totals"], strict=True)) == totals
    for at in range(0, len(content["stops"]), 7):
        threshold = thresholds(content)[at]
        masked = Counter(name for name, score in classes if score > threshold)
        assert {name: row[at] for name, row in zip(found["labels"], found["masked"], strict=True)} == {
            name: masked[name] for name in found["labels"]
        }


def test_groups_are_those_of_a_loop(data, content):
    by_turn, by_place, by_group, by_class = [], [], [], []
    for row, turn, tokens in answers(data):
        for place, token, score in tokens:
            low = 2 ** int(math.log2(place + 1))
            by_place.append(("1" if low == 1 else f"{low}–{2 * low - 1}", score))
            by_turn.append((str(turn + 1), score))
            by_group.append((("web", "books")[row % 2], score))
            by_class.append((token == 0, score))
    check_group(group(content, "position in the answer"), content, by_place)
    check_group(group(content, "turn"), content, by_turn)
    check_group(group(content, "data set"), content, by_group)
    classes = group(content, "token class")
    at = classes["labels"].index("stop tokens")
    assert classes["totals"][at] == sum(stop for stop, _ in by_class)
    start = content["start"]
    assert classes["masked"][at][start] == content["sources"][0]["stop_tokens_masked"][start]
    assert sum(classes["totals"]) == len(data.nll)
    assert sum(row[start] for row in classes["masked"]) == content["sources"][0]["masked"][start]


def test_one_data_set_is_no_group():
    assert "data set" not in [one["title"] for one in content_of(page_of(scored()))["sources"][0]["groups"]]


def test_strings_masked_most(data, content):
    strings = content["sources"][0]["strings"]
    assert strings["labels"] == sorted(strings["labels"])
    for at in range(0, len(content["stops"]), 11):
        counts = Counter()
        for _, _, tokens in answers(data):
            counts.update(
                WORDS[token].replace("\n", "⏎") for _, token, score in tokens if score > thresholds(content)[at]
            )
        assert {
            name: row[at] for name, row in zip(strings["labels"], strings["masked"], strict=True) if row[at]
        } == counts


def test_many_strings_are_cut_to_those_masked_most_somewhere():
    words = ["<|im_end|>", *(f"w{number}" for number in range(300))]
    data = scored(random_rows(60, words=words), words=words)
    content = content_of(page_of(data))
    strings = content["sources"][0]["strings"]
    for at, threshold in enumerate(thresholds(content)):
        counts = Counter()
        for _, _, tokens in answers(data):
            counts.update(words[token] for _, token, score in tokens if score > threshold)
        shown = sorted((row[at] for row in strings["masked"]), reverse=True)[:24]
        assert [count for count in shown if count] == [count for _, count in counts.most_common(24)]


def test_the_histogram_counts_every_token(data, content):
    histogram = content["sources"][0]["histogram"]
    assert sum(histogram) == len(data.nll)
    per_decade = content["bins_per_decade"]
    assert len(histogram) % per_decade == 0
    for at in range(len(histogram) - 1):
        low, high = 10 ** (at / per_decade), 10 ** ((at + 1) / per_decade)
        assert abs(histogram[at] - sum(low <= math.exp(score) < high for score in data.nll.tolist())) <= 1


def test_rows_are_those_of_the_data(data, content):
    shown = content["sources"][0]["shown"]
    assert shown["row"] == list(range(40))
    ids = [shown["ids"][index] for index in array(shown["index"], "<u2")]
    assert ids == data.documents.input_ids.tolist()
    assert [shown["texts"][index] for index in array(shown["index"], "<u2")] == [
        WORDS[i].replace("\n", "⏎\n") for i in ids
    ]
    bits = np.unpackbits(array(shown["is_label"], np.uint8), count=len(ids), bitorder="little")
    np.testing.assert_array_equal(bits.astype(bool), data.documents.labels != IGNORE)
    np.testing.assert_array_equal(array(shown["nll"], "<f4"), data.nll)
    assert shown["effective"] is None


@pytest.mark.parametrize("strategy", ["low", "random"])
@pytest.mark.parametrize("keep", [False, True])
def test_controls_are_masked_at_every_stop(data, strategy, keep):
    options = STMOptions(stm_strategy=strategy, stm_seed=5, stm_keep_stop_tokens=keep)
    content = content_of(page_of(data, options=[options]))
    effective = array(content["sources"][0]["shown"]["effective"], "<f4")
    for at in range(0, len(content["stops"]), 9):
        stop = content["stops"][at]
        here = STMOptions(
            stm_threshold=float(stop["text"]), stm_strategy=strategy, stm_seed=5, stm_keep_stop_tokens=keep
        )
        masked = data.masks(here).masked[data.documents.label_mask]
        np.testing.assert_array_equal(effective > thresholds(content)[at], masked)
        assert content["sources"][0]["masked"][at] == masked.sum()


def test_ties_and_infinite_scores_are_masked_as_the_rule_says():
    exact = np.float32(math.log(2.5))
    nll = np.array(
        [0, np.nextafter(exact, np.float32(0)), exact, np.nextafter(exact, np.float32(9)), np.inf], np.float32
    )
    rows = [{"input_ids": [3, 1, 1, 1, 1, 1], "labels": [IGNORE, 1, 1, 1, 1, 1]}]
    data = scored(rows, nll)
    source = content_of(page_of(data))["sources"][0]
    assert source["masked"][source["start"]] == sum(masked_rows(data, 2.5)[0])


def test_a_fraction_of_infinite_scores():
    rows = [{"input_ids": [3, 1, 1, 1], "labels": [IGNORE, 1, 1, 1]}]
    data = scored(rows, np.array([0, np.inf, np.inf], np.float32))
    content = content_of(page_of(data, options=[STMOptions(stm_mask_fraction=0.5)]))
    assert content["stops"][content["start"]]["text"] == "inf"
    assert content["sources"][0]["masked"][-2:] == [2, 0]


def test_a_score_at_the_threshold_of_a_fraction_is_kept(data):
    content = content_of(page_of(data, options=[STMOptions(stm_mask_fraction=0.22)]))
    (source,) = content["sources"]
    texts = [stop["text"] for stop in content["stops"]]
    assert len(texts) == len(set(texts))
    threshold = float(texts[content["start"]])
    assert sum(map(sum, masked_rows(data, threshold))) == math.floor(0.22 * len(data.nll))
    assert source["masked"][source["start"]] == math.floor(0.22 * len(data.nll))


def test_the_same_data_make_the_same_bytes(tmp_path):
    _, entry = stored()
    pages = []
    for seed in ("1", "2"):
        path = tmp_path / f"{seed}.html"
        command = [sys.executable, "-m", "stm_plugin.cli", "report", str(entry), "--out", str(path)]
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        subprocess.run(command, check=True, env=environment, cwd=tmp_path, capture_output=True)
        pages.append(path.read_bytes())
    assert pages[0] == pages[1]


def test_the_page_is_one_file_that_loads_nothing(data):
    page = page_of(data)
    tags = re.sub(r"<(script|style)\b.*?</\1>", "", page, flags=re.DOTALL)
    assert not re.search(r"\bsrc=|href=(?!\"data:,\")|url\(|@import", tags)
    code = re.sub(r'<script type="application/json".*?</script>', "", page, flags=re.DOTALL)
    assert "http" not in code.replace("http://www.w3.org/2000/svg", "").replace("http-equiv", "")
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", code)
    assert "default-src 'none'" in code.replace("&#x27;", "'")


def test_hostile_text_stays_within_its_block():
    rows = random_rows(8, words=HOSTILE)
    page = page_of(scored(rows, words=HOSTILE, name="</title><script>document.title='run'</script>"))
    plain = page_of(scored(random_rows(8)))
    for mark in ("<script", "</script", "<img", "<!--", "<title", "</title"):
        assert page.count(mark) == plain.count(mark), mark
    block = re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1]
    assert re.fullmatch(r"[ -;=?-~]+", block)  # printable ASCII without < and >
    assert "</script><script>document.title='run'</script>" in content_of(page)["sources"][0]["shown"]["texts"]
    assert not {"\x00", "\u202e", "\u2028", "\ud800"} & {*page}
    page.encode()


def test_rows_shown_are_cut_to_a_size(data):
    figures = make_figures([data], [STMOptions()])
    pairs = pair_rows(figures)
    assert chosen_rows(figures, pairs).tolist() == [[row] for row in range(40)]
    size = 4 * np.diff(data.documents.row_offsets) + 4 * figures[0].labels_per_row
    share = figures[0].masks.masked_per_row / figures[0].labels_per_row
    for most in (400, 2000, 5000):
        chosen = chosen_rows(figures, pairs, most)[:, 0]
        assert size[chosen].sum() <= most
        assert sorted(chosen) == chosen.tolist()
        assert most < 2000 or np.argmax(share) in chosen
    assert share[chosen].mean() > share.mean()
    assert (share[chosen] < np.median(share)).any()


def test_rows_of_two_data_sets_belong_together_by_their_context():
    rows = random_rows(6, turns=1)
    other = [
        {"input_ids": [*row["input_ids"], 5], "labels": [*row["labels"], 5]} for row in (rows[4], rows[1], rows[0])
    ]
    alone = {"input_ids": [1, 1, 1, 1, 1, 1, 1, 2], "labels": [*[IGNORE] * 7, 2]}
    figures = make_figures([scored(rows), scored([*other, alone])], [STMOptions()] * 2)
    assert pair_rows(figures).tolist() == [[0, 2], [1, 1], [2, -1], [3, -1], [4, 0], [5, -1], [-1, 3]]


def test_two_sources_share_their_stops():
    one, two = scored(), scored(random_rows(9, seed=4))
    options = [STMOptions(stm_mask_fraction=0.22), STMOptions(stm_threshold=7.125)]
    content = content_of(page_of(one, two, options=options))
    for data, source, some in zip((one, two), content["sources"], options, strict=True):
        assert source["masked"][source["start"]] == data.masks(some).num_masked
        for at in range(0, len(content["stops"]), 13):
            assert source["masked"][at] == int((data.nll.astype(float) > thresholds(content)[at]).sum())


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data, entry = stored()
    assert main(["report", str(entry)]) == 0
    assert (tmp_path / "stm_report.html").read_text(encoding="utf-8") == page_of(data)
    assert main(["report", str(entry), str(entry), "--names", "one", "two", "--out", "two.html"]) == 0
    names = [source["name"] for source in content_of((tmp_path / "two.html").read_text("utf-8"))["sources"]]
    assert names == ["one", "two"]
    assert main(["report", *[str(entry)] * 3]) == 1
    assert main(["report", str(entry), "--names", "a", "b"]) == 1
    assert "got 3" in capsys.readouterr().err


def test_no_label_token_is_an_error():
    kept = kept_of([{"input_ids": [1, 2], "labels": [IGNORE, IGNORE]}])
    with pytest.raises(ValueError, match="no label token"):
        make_figures([ScoredData(kept, np.zeros(0, np.float32), scored().key)], [STMOptions()])


def test_plots(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib, of the extra 'report', is not installed")
    from matplotlib.image import imread

    _, entry = stored()
    assert (
        main(["report", str(entry), str(entry), "--out", str(tmp_path / "r.html"), "--png", str(tmp_path / "png")])
        == 0
    )
    names = {path.stem for path in (tmp_path / "png").iterdir()}
    assert names == {"distribution", "masked_share", "by_position_in_the_answer", "by_token_class", "by_turn"}
    for path in (tmp_path / "png").iterdir():
        pixels = imread(path)
        assert pixels.shape[1] == 1050
        assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 20


# Runs.


@pytest.mark.parametrize(
    "options",
    [{"stm_threshold": 1500.0}, {"stm_mask_fraction": 0.22, "stm_strategy": "random", "stm_keep_stop_tokens": True}],
    ids=["threshold", "fraction"],
)
def test_a_run_leaves_its_report(options, tokenizer, make_model, chats, tmp_path):
    pytest.importorskip("trl", reason="trl is not installed")
    from trl_helpers import stm_trainer

    trainer = stm_trainer(make_model(), chats, tokenizer, tmp_path / "out", stm_report=True, **options)
    trainer.train()
    page = (tmp_path / "out" / "stm_report.html").read_text(encoding="utf-8")
    check_against_receipt(page, tmp_path / "out")
    monkey = tmp_path / "again.html"
    assert main(["report", str(tmp_path / "out"), "--out", str(monkey)]) == 0
    assert monkey.read_text(encoding="utf-8") == page


def check_against_receipt(page, folder):
    receipt = json.loads((folder / "stm.json").read_text())
    content = content_of(page)
    (source,) = content["sources"]
    start = source["start"]
    shown = {name: source[name] for name in ("label_tokens", "rows", "documents", "stop_tokens")}
    assert shown == {name: receipt[name] for name in shown}
    assert source["masked"][start] == receipt["masked_tokens"] > 0
    assert source["stop_tokens_masked"][start] == receipt["stop_tokens_masked"]
    assert source["rows_without_kept_tokens"][start] == receipt["rows_without_kept_tokens"]
    assert thresholds(content)[start] == receipt["threshold_nats"]
    assert content["stops"][start]["note"] == "the run's threshold"
    assert dict(source["receipt"])["mask_digest"] == receipt["mask_digest"]
    assert source["strategy"] == receipt["strategy"]


def test_no_report_unless_asked_for(tokenizer, make_model, chats, tmp_path):
    pytest.importorskip("trl", reason="trl is not installed")
    from trl_helpers import stm_trainer

    stm_trainer(make_model(), chats, tokenizer, tmp_path / "out", stm_threshold=1500.0).train()
    assert not list(tmp_path.glob("out/*.html"))


def test_a_run_goes_on_where_the_report_cannot_be_written(tokenizer, make_model, chats, tmp_path, caplog):
    pytest.importorskip("trl", reason="trl is not installed")
    from trl_helpers import stm_trainer

    (tmp_path / "out" / "stm_report.html").mkdir(parents=True)
    trainer = stm_trainer(make_model(), chats, tokenizer, tmp_path / "out", stm_threshold=1500.0, stm_report=True)
    trainer.train()
    assert trainer.state.global_step > 0
    assert "The report could not be written" in caplog.text
    assert list((tmp_path / "out").glob(".stm_report*")) == []


def test_large_data_make_a_page_of_bounded_size(tmp_path):
    words = ["<|im_end|>", *(f" word{number}" for number in range(2000))]
    draw = np.random.default_rng(0)
    rows = []
    for _ in range(3000):
        ids = draw.integers(1, len(words), size=900).tolist()
        rows.append({"input_ids": ids, "labels": [*[IGNORE] * 100, *ids[100:]]})
    page = write_report([scored(rows, words=words)], tmp_path / "r.html")
    assert page.stat().st_size < 30e6
    content = content_of(page.read_text(encoding="utf-8"))
    assert content["num_pairs"] == 3000 > len(content["pairs"]) > 1000
    assert content["sources"][0]["label_tokens"] == 3000 * 800
