"""Rows in the terminal: the right tokens struck through, readable without colour, and nothing that acts."""

import re

import numpy as np
import pytest
from report_helpers import IGNORE, WORDS, masked_rows, nll_rows, random_rows, scored, stored

from stm_plugin.cli import main
from stm_plugin.inspection.rows import Style, heading, row_lines
from stm_plugin.options import STMOptions

ANSI = re.compile(r"\x1b\[([0-9;]*)m")
PLAIN, COLOUR = Style(colour=False), Style(colour=True)


def parse(lines):
    """(text, codes) of each run of a coloured text."""
    text, codes, runs = "\n".join(lines[1:]), "", []
    for number, part in enumerate(ANSI.split(text)):
        if number % 2:
            codes = "" if part == "0" else part
        elif part:
            runs.append((part, codes.split(";")))
    return runs


@pytest.fixture
def data():
    return scored(random_rows(6, words=WORDS))


def signs(text, masked):
    if masked and text.isspace():
        return text.replace(" ", "·").replace("\n", "⏎\n")
    return text.replace("\n", "⏎\n") if masked else text


@pytest.mark.parametrize("threshold", [1.5, 2.5, 10.0, float("inf")])
def test_masked_tokens_stand_between_signs(data, threshold):
    masks = data.masks(STMOptions(stm_threshold=threshold))
    offsets = data.documents.row_offsets.tolist()
    for row, (masked, nll) in enumerate(zip(masked_rows(data, threshold), nll_rows(data), strict=True)):
        ids = data.documents.input_ids[offsets[row] : offsets[row + 1]].tolist()
        expected, open_ = "", False
        for token, flag in zip(ids, masked, strict=True):
            expected += ("[-" if flag and not open_ else "-]" if open_ and not flag else "") + signs(
                WORDS[token], flag
            )
            open_ = flag
        expected += "-]" if open_ else ""
        lines = row_lines(data, masks, row, PLAIN)
        assert "\n".join(lines[1:]) == expected
        labels = int((~np.isnan(nll)).sum())
        assert lines[0] == f"row {row}: {sum(masked)} of {labels} label tokens masked ({sum(masked) / labels:.1%})"


def test_colours_say_the_perplexity_and_strikes_what_is_masked(data):
    masks = data.masks(STMOptions(stm_threshold=2.5))
    for row, (masked, nll) in enumerate(zip(masked_rows(data, 2.5), nll_rows(data), strict=True)):
        struck = "".join(text for text, codes in parse(row_lines(data, masks, row, COLOUR)) if "9" in codes)
        ids = data.documents.input_ids[data.documents.row_offsets[row] :][: len(nll)].tolist()
        expected = "".join(
            signs(WORDS[token], True).replace("\n", "") for token, flag in zip(ids, masked, strict=True) if flag
        )
        assert struck.replace("\n", "") == expected


def test_bands():
    ids = [3, 1, 1, 1, 1, 1]
    nll = np.log(np.array([1.2, 2.4, 2.6, 50.0, 1e9])).astype(np.float32)
    data = scored([{"input_ids": ids, "labels": [IGNORE, *ids[1:]]}], nll)
    runs = parse(row_lines(data, data.masks(), 0, COLOUR))
    assert [codes[-1] for text, codes in runs if text == "def"] == ["", "229", "222", "215", "209"]
    assert ["9" in codes for text, codes in runs if text == "def"] == [False, False, True, True, True]


def test_redacted(data):
    masks = data.masks(STMOptions(stm_threshold=1.5))
    plain = "\n".join(row_lines(data, masks, 0, Style(False, redact=True)))
    runs = re.findall(r"\[REDACTED(?: ×(\d+))?\]", plain)
    assert sum(int(number or 1) for number in runs) == sum(masked_rows(data, 1.5)[0])
    assert "[-" not in plain


def test_context_and_long_rows_are_cut():
    ids = [*[2] * 50, *[1] * 30]
    data = scored([{"input_ids": ids, "labels": [IGNORE] * 50 + [1] * 30}], np.zeros(30, np.float32))
    masks = data.masks()
    assert "\n".join(row_lines(data, masks, 0, Style(False, context=3))[1:]) == "… " + " add" * 3 + "def" * 30
    cut = "\n".join(row_lines(data, masks, 0, Style(False, context=3, most_tokens=60))[1:])
    assert cut == "… " + " add" * 3 + "def" * 10 + " … 20 more tokens (--most_tokens)"


@pytest.mark.parametrize("colour", [True, False])
@pytest.mark.parametrize("redact", [True, False])
def test_hostile_text_does_nothing(colour, redact):
    words = ["<|im_end|>", "\x1b[2J", "\x07\x9b31m", "\u202e", "\ud800", "\x00", "\r", "ok"]
    rows = [{"input_ids": [7, 1, 2, 3, 4, 5, 6, 7], "labels": [IGNORE, 1, 2, 3, IGNORE, 5, 6, 7]}]
    data = scored(rows, np.array([0, 9, 0, 9, 0, 9], np.float32), words=words)
    text = "\n".join(row_lines(data, data.masks(), 0, Style(colour, redact)))
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\ud800]", ANSI.sub("", text))
    assert "<U+001B>[2J" in ANSI.sub("", text)
    assert "<U+D800>" in ANSI.sub("", text)
    text.encode()


def test_the_heading_counts(data):
    masks = data.masks(STMOptions(stm_threshold=2.5))
    text = "\n".join(heading(data, masks, STMOptions(), PLAIN))
    number = sum(map(sum, masked_rows(data, 2.5)))
    assert f"{number:,} of {len(data.nll):,} label tokens masked ({number / len(data.nll):.2%})" in text
    assert "perplexity above 2.5 " in text


# The command.


def shown_rows(text):
    return [int(number) for number in re.findall(r"^row (\d+):", text, flags=re.MULTILINE)]


def test_rows_by_choice(capsys):
    data, entry = stored(random_rows(20))
    assert main(["inspect", str(entry), "--rows", "3,10-12"]) == 0
    assert shown_rows(capsys.readouterr().out) == [3, 10, 11, 12]
    assert main(["inspect", str(entry), "--most", "4", "--stm_threshold", "3"]) == 0
    shares = [
        sum(row) / sum(not np.isnan(x) for x in nll)
        for row, nll in zip(masked_rows(data, 3), nll_rows(data), strict=True)
    ]
    assert shown_rows(capsys.readouterr().out) == sorted(range(20), key=lambda row: -shares[row])[:4]
    draws = []
    for seed in ("0", "0", "1"):
        assert main(["inspect", str(entry), "--random", "6", "--random_seed", seed]) == 0
        draws.append(capsys.readouterr().out)
    assert len(set(shown_rows(draws[0]))) == 6
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("3-", "numbers and ranges"),
        ("x", "numbers and ranges"),
        ("5-3", "numbers and ranges"),
        ("20", "no row 20"),
    ],
)
def test_rows_that_are_not_there(rows, message, capsys):
    _, entry = stored(random_rows(20))
    assert main(["inspect", str(entry), "--rows", rows]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--most", "--random"])
@pytest.mark.parametrize("number", ["-1", "0", "x"])
def test_numbers_of_rows_that_are_none(flag, number, capsys):
    with pytest.raises(SystemExit):
        main(["inspect", "anything", f"{flag}={number}"])
    assert f"argument {flag}: a number of at least 1 is needed, got '{number}'" in capsys.readouterr().err


def test_options_of_the_command_decide(capsys):
    data, entry = stored(random_rows(20))
    masked = data.masks(STMOptions(stm_mask_fraction=0.1)).num_masked
    assert masked == len(data.nll) // 10
    assert main(["inspect", str(entry), "--stm_mask_fraction", "0.1"]) == 0
    assert f": {masked:,} of " in capsys.readouterr().out
    assert main(["inspect", str(entry), "--stm_mask_fraction", "0.1", "--stm_threshold", "2"]) == 1
    assert "both given" in capsys.readouterr().err


def test_colour_is_for_terminals(capsys, monkeypatch):
    _, entry = stored()
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")

    def coloured(*arguments):
        assert main(["inspect", str(entry), *arguments]) == 0
        return "\x1b[" in capsys.readouterr().out

    assert not coloured()
    assert coloured("--color", "always")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert coloured()
    assert not coloured("--color", "never")
    monkeypatch.setenv("NO_COLOR", "1")
    assert not coloured()
