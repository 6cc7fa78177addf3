"""What thresholds would mask, against counting one by one."""

import math

import numpy as np
import pytest

from stm_plugin.sweep import PAPER_FRACTION, QUANTILES, THRESHOLDS, Sweep


@pytest.fixture
def nll():
    return np.random.default_rng(0).exponential(1.0, 1001).astype(np.float32)


def test_shares_are_those_of_a_count(nll):
    sweep = Sweep.of(nll)
    assert sweep.label_tokens == 1001
    assert list(sweep.masked) == list(THRESHOLDS)
    for threshold, share in sweep.masked.items():
        assert share == sum(float(score) > math.log(threshold) for score in nll) / 1001


def test_a_tie_is_kept():
    threshold = 2.5
    exact = np.float32(math.log(threshold))
    below, above = np.nextafter(exact, np.float32(0)), np.nextafter(exact, np.float32(9))
    share = Sweep.of(np.array([below, above], np.float32), [threshold]).masked[threshold]
    assert share == 0.5


def test_the_threshold_for_the_papers_share_masks_it(nll):
    tau = Sweep.of(nll).threshold_for_paper
    masked = sum(float(score) > math.log(tau) * (1 + 1e-12) for score in nll)
    assert masked == math.floor(PAPER_FRACTION * 1001)


def test_quantiles_are_of_the_perplexity(nll):
    ordered = sorted(math.exp(float(score)) for score in nll)
    for quantile, perplexity in Sweep.of(nll).quantiles.items():
        position = quantile * 1000
        assert ordered[math.floor(position)] * (1 - 1e-9) <= perplexity <= ordered[math.ceil(position)] * (1 + 1e-9)


def test_the_table_says_it_all(nll):
    text = "\n".join(Sweep.of(nll).lines())
    assert text.startswith("1,001 label tokens; quantiles of their perplexity: 5% ")
    assert text.count("%") >= len(THRESHOLDS) + len(QUANTILES)
    assert "stm_mask_fraction: 0.22" in text


def test_scores_beyond_any_perplexity_overflow_nothing():
    assert Sweep.of(np.array([0.5, 5000.0, np.inf], np.float32)).quantiles[0.99] > 1e300
