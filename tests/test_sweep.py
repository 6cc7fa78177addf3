"""What thresholds and fractions would mask, against counting one by one."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from report_helpers import masked_rows, nll_rows, random_rows, scored, stored

from stm_plugin.cli import main
from stm_plugin.inspection.sweep import (
    FRACTIONS,
    PAPER_FRACTION,
    QUANTILES,
    THRESHOLDS,
    Sweep,
    shortest_threshold,
    sweep_of,
)
from stm_plugin.options import STMOptions

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def data():
    return scored(random_rows(60))


def count(data, threshold):
    """Masked tokens, rows that keep none, masked stop tokens."""
    masked, ids = masked_rows(data, threshold), data.documents.input_ids.tolist()
    flat = [flag for row in masked for flag in row]
    labels = [[not math.isnan(score) for score in row] for row in nll_rows(data)]
    empty = sum(any(some) and some == flags for some, flags in zip(labels, masked, strict=True))
    return sum(flat), empty, sum(flag and token == 0 for flag, token in zip(flat, ids, strict=True))


def test_counts_are_those_of_a_loop(data):
    sweep = sweep_of(data, thresholds=[*THRESHOLDS, 1.0001])
    assert sweep.label_tokens == len(data.nll)
    assert sweep.rows == 60
    assert [row.threshold for row in sweep.thresholds] == [*THRESHOLDS, 1.0001]
    empty = 0
    for row in sweep.thresholds:
        masked, without, stop = count(data, row.threshold)
        assert (row.masked_tokens, row.rows_without_kept_tokens, row.stop_tokens_masked) == (masked, without, stop)
        assert row.masked_fraction == masked / len(data.nll)
        assert row.kept_tokens == len(data.nll) - masked
        assert row.in_paper_band == (0.2 <= masked / len(data.nll) <= 0.24)
        empty += without
    assert empty > 0
    assert sweep.stop_tokens == data.documents.input_ids.tolist().count(0)


def test_fractions_name_a_threshold_that_masks_as_much(data):
    for row in sweep_of(data).fractions:
        assert row.masked_tokens == math.floor(row.mask_fraction * len(data.nll))
        assert count(data, row.threshold)[0] == row.masked_tokens


def test_a_tie_is_kept():
    threshold = 2.5
    exact = np.float32(math.log(threshold))
    below, above = np.nextafter(exact, np.float32(0)), np.nextafter(exact, np.float32(9))
    data = scored([{"input_ids": [3, 1, 2], "labels": [-100, 1, 2]}], np.array([below, above], np.float32))
    assert sweep_of(data, thresholds=[threshold]).thresholds[0].masked_fraction == 0.5


@pytest.mark.parametrize("share", [0.22, 0.5, 0.013])
def test_the_threshold_for_a_share_masks_it(data, share):
    sweep = sweep_of(data, share=share)
    assert sweep.share == share
    assert sweep.for_share.masked_tokens == math.floor(share * len(data.nll))
    assert count(data, sweep.for_share.threshold)[0] == sweep.for_share.masked_tokens


def test_ties_mask_fewer_than_the_share():
    data = scored(
        [{"input_ids": [3, *[1] * 10], "labels": [-100, *[1] * 10]}], np.array([1.0] * 9 + [2.0], np.float32)
    )
    assert sweep_of(data, share=0.5).for_share.masked_tokens == 1


def test_stop_tokens_may_be_kept(data):
    sweep = sweep_of(data, options=STMOptions(stm_keep_stop_tokens=True))
    assert {row.stop_tokens_masked for row in sweep.thresholds} == {0}
    masked, _, stop = count(data, 2.5)
    assert stop > 0
    assert next(row for row in sweep.thresholds if row.threshold == 2.5).masked_tokens == masked - stop


def test_controls_mask_as_many(data):
    high = sweep_of(data)
    for strategy in ("low", "random"):
        other = sweep_of(data, options=STMOptions(stm_strategy=strategy))
        assert [row.masked_tokens for row in other.thresholds] == [row.masked_tokens for row in high.thresholds]
        assert [row.stop_tokens_masked for row in other.thresholds] != [
            row.stop_tokens_masked for row in high.thresholds
        ]


def test_quantiles_are_of_the_perplexity(data):
    ordered = sorted(math.exp(float(score)) for score in data.nll)
    for quantile, perplexity in sweep_of(data).quantiles.items():
        position = quantile * (len(ordered) - 1)
        assert ordered[math.floor(position)] * (1 - 1e-9) <= perplexity <= ordered[math.ceil(position)] * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_the_shortest_threshold_masks_the_same(seed):
    nll = np.random.default_rng(seed).exponential(0.01 * 10**seed, 500).astype(np.float32)
    for nats in np.sort(nll)[::50].tolist():
        value = shortest_threshold(nll, nats)
        assert [score > math.log(value) for score in nll.tolist()] == [score > nats for score in nll.tolist()]
    assert shortest_threshold(np.array([0.5, 1.0], np.float32), 0.5) == 1.7  # exp(0.5) is 1.6487
    assert shortest_threshold(np.array([0.5, np.inf], np.float32), 0.5) == 1.7
    assert shortest_threshold(np.array([0.5, np.inf], np.float32), math.inf) == math.inf


def test_the_table_says_it_all(data):
    text = "\n".join(sweep_of(data).lines())
    assert text.startswith(f"{len(data.nll):,} label tokens in 60 rows; quantiles of their perplexity: 5% ")
    assert text.count("%") >= len(THRESHOLDS) + len(FRACTIONS) + len(QUANTILES)
    starred = [line for line in text.splitlines() if " * " in line]
    assert any(line.strip().startswith("0.22 ") for line in starred)
    assert not any(line.strip().startswith("0.4 ") for line in starred)
    assert "stm_mask_fraction: 0.22" in text


def test_scores_beyond_any_perplexity_overflow_nothing():
    rows = [{"input_ids": [3, 1, 1, 1], "labels": [-100, 1, 1, 1]}]
    sweep = sweep_of(scored(rows, np.array([0.5, 5000.0, np.inf], np.float32)))
    assert sweep.quantiles[0.99] > 1e300
    json.dumps(sweep.as_json(), allow_nan=False)


def test_nothing_to_sweep_over():
    data = scored([{"input_ids": [3, 1], "labels": [-100, -100]}])
    with pytest.raises(ValueError, match="no label token"):
        sweep_of(data)
    with pytest.raises(ValueError, match="NaN"):
        sweep_of(replace(scored(), nll=np.full(len(scored().nll), np.nan, np.float32)))


@pytest.mark.parametrize("bad", [{"thresholds": [0.5]}, {"fractions": [22]}, {"share": 0}])
def test_values_out_of_range_are_refused(data, bad):
    with pytest.raises(ValueError, match="must be"):
        sweep_of(data, **bad)


def test_a_reader_that_goes_away_is_no_error():
    _, entry = stored()
    command = [sys.executable, "-m", "stm_plugin.cli", "sweep", str(entry)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        process.stdout.close()
        assert process.stderr.read() == b""


def test_the_command(capsys):
    data, entry = stored(random_rows(30))
    assert main(["sweep", str(entry), "--share", "0.3"]) == 0
    text = capsys.readouterr().out
    expected = Sweep.of(data.documents, data.nll, {0}, share=0.3)
    assert text.splitlines()[1:] == expected.lines()
    assert main(["sweep", str(entry), "--json", "--thresholds", "2", "inf", "--fractions", "0.22"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [row["threshold"] for row in facts["thresholds"]] == [2.0, "inf"]
    assert facts["thresholds"][0]["masked_tokens"] == count(data, 2)[0]
    assert facts["thresholds"][1]["masked_tokens"] == 0
    assert facts["fractions"][0]["mask_fraction"] == PAPER_FRACTION
