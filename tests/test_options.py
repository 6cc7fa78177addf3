"""Every option: its name, its default, and what a bad value is told."""

import contextlib
import math
import re
from dataclasses import fields
from fractions import Fraction

import numpy as np
import pytest

from stm_plugin.options import STMOptions, nearest_option, option_names

THRESHOLD = "stm_threshold must be a perplexity, a number greater than 1 (inf masks nothing), got "
FRACTION = "stm_mask_fraction must be a number between 0 and 1, exclusive, got "
STRATEGY = "stm_strategy must be one of 'high', 'low', 'random', 'difference', 'hybrid', got "
SEED = "stm_seed must be an integer of at most 64 bits, got "
REFERENCE = "stm_reference must be 'initial', 'current' or the path or id of a model, got "
REFERENCE_KWARGS = "stm_reference_kwargs must be a mapping of keyword arguments, got "
KEEP_STOP_TOKENS = "stm_keep_stop_tokens must be true or false, got "
TOKENS_PER_BATCH = "stm_tokens_per_batch must be a positive number of tokens, got "


def refused(message: str, **values: object) -> None:
    """Assert that some values are refused with a message that starts like this."""
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        STMOptions(**values).check()


def test_names_and_defaults_are_frozen():
    assert option_names() == [
        "stm_threshold",
        "stm_mask_fraction",
        "stm_reference",
        "stm_reference_kwargs",
        "stm_strategy",
        "stm_tuned_model",
        "stm_seed",
        "stm_keep_stop_tokens",
        "stm_scores_dir",
        "stm_tokens_per_batch",
        "stm_report",
    ]
    assert vars(STMOptions()) == {
        "stm_threshold": None,
        "stm_mask_fraction": None,
        "stm_reference": "initial",
        "stm_reference_kwargs": None,
        "stm_strategy": "high",
        "stm_tuned_model": None,
        "stm_seed": 0,
        "stm_keep_stop_tokens": False,
        "stm_scores_dir": None,
        "stm_tokens_per_batch": None,
        "stm_report": False,
    }
    STMOptions().check()


def test_every_option_has_a_help_text():
    for option in fields(STMOptions):
        assert len(option.metadata["help"]) > 20, option.name


@pytest.mark.parametrize(
    "value",
    [
        1,
        1.0,
        0.999,
        0,
        0.0,
        -2.5,
        -math.inf,
        math.nan,
        np.float32("nan"),
        True,
        False,
        "2.5",
        "inf",
        "",
        [2.5],
        2 + 1j,
    ],
    ids=repr,
)
def test_bad_threshold(value):
    refused(f"{THRESHOLD}{value!r}. The paper's value is 2.5.", stm_threshold=value)


@pytest.mark.parametrize(
    "value", [math.nextafter(1, 2), 2, 2.5, 1e300, math.inf, np.float32(2.5), np.int64(3), Fraction(5, 2)], ids=repr
)
def test_good_threshold(value):
    options = STMOptions(stm_threshold=value)
    options.check()
    assert options.threshold == value


def test_a_threshold_beyond_any_float():
    with contextlib.suppress(ValueError):  # taken or refused, but no OverflowError
        STMOptions(stm_threshold=10**400).check()
    refused(THRESHOLD, stm_threshold=-(10**400))


@pytest.mark.parametrize(
    "value",
    [0, 0.0, -0.0, 1, 1.0, 1.5, -0.2, 22, math.nan, math.inf, -math.inf, True, False, "0.2", "20%", [0.2]],
    ids=repr,
)
def test_bad_fraction(value):
    refused(f"{FRACTION}{value!r}.", stm_mask_fraction=value)


@pytest.mark.parametrize("value", [5e-324, 0.22, math.nextafter(1, 0), np.float32(0.25), Fraction(1, 5)], ids=repr)
def test_good_fraction(value):
    options = STMOptions(stm_mask_fraction=value)
    options.check()
    assert options.threshold is None


@pytest.mark.parametrize("threshold", [2.5, math.inf, 0, "2.5"], ids=repr)
@pytest.mark.parametrize("fraction", [0.2, 0, True], ids=repr)
def test_threshold_and_fraction_exclude_each_other(threshold, fraction):
    refused(
        f"stm_threshold={threshold!r} and stm_mask_fraction={fraction!r} were both given, but each decides which "
        "tokens are masked. Remove one of them.",
        stm_threshold=threshold,
        stm_mask_fraction=fraction,
    )


def test_threshold_in_force():
    assert STMOptions().threshold == 2.5
    assert STMOptions(stm_threshold=None).threshold == 2.5
    assert STMOptions(stm_threshold=7).threshold == 7
    assert STMOptions(stm_mask_fraction=0.1).threshold is None


@pytest.mark.parametrize("value", ["High", "hihg", "", "none", None, 0, ["high"], {"high"}], ids=repr)
def test_bad_strategy(value):
    refused(f"{STRATEGY}{value!r}.", stm_strategy=value)


@pytest.mark.parametrize("value", ["high", "low", "random"])
def test_good_strategy(value):
    STMOptions(stm_strategy=value).check()


@pytest.mark.parametrize("value", [True, False, None, 1.0, math.nan, "0", 2**63, -(2**63) - 1, [1]], ids=repr)
def test_bad_seed(value):
    refused(f"{SEED}{value!r}.", stm_seed=value)


@pytest.mark.parametrize("value", [0, -1, 2**63 - 1, -(2**63), np.int32(7)], ids=repr)
def test_good_seed(value):
    STMOptions(stm_seed=value).check()


@pytest.mark.parametrize("value", ["", None, 3, True, ["initial"]], ids=repr)
def test_bad_reference(value):
    refused(f"{REFERENCE}{value!r}.", stm_reference=value)


def test_current_reference_keeps_no_scores():
    STMOptions(stm_reference="current").check()
    refused(
        "stm_scores_dir='scores' has no effect while stm_reference is 'current', which scores anew at every step",
        stm_reference="current",
        stm_scores_dir="scores",
    )


@pytest.mark.parametrize("value", ['{"dtype": "bfloat16"}', ["dtype"], 4, True, ""], ids=repr)
def test_bad_reference_kwargs(value):
    refused(f"{REFERENCE_KWARGS}{value!r}.", stm_reference="some/model", stm_reference_kwargs=value)


@pytest.mark.parametrize("value", [{"dtype": "bfloat16"}, {}], ids=repr)
def test_reference_kwargs_without_a_reference_have_no_effect_and_say_so(value):
    refused(
        f"stm_reference_kwargs={value!r} has no effect while stm_reference is 'initial'.", stm_reference_kwargs=value
    )


def test_reference_with_kwargs():
    STMOptions(stm_reference="some/model").check()
    STMOptions(stm_reference="some/model", stm_reference_kwargs={"dtype": "bfloat16"}).check()
    STMOptions(stm_reference="./initial", stm_reference_kwargs={}).check()


@pytest.mark.parametrize("value", [None, 0, 1, "true", "false", np.bool_(True)], ids=repr)
def test_bad_keep_stop_tokens(value):
    refused(f"{KEEP_STOP_TOKENS}{value!r}.", stm_keep_stop_tokens=value)


@pytest.mark.parametrize("value", [0, -4096, 4096.0, "4096", True, math.inf, math.nan], ids=repr)
def test_bad_tokens_per_batch(value):
    refused(f"{TOKENS_PER_BATCH}{value!r}.", stm_tokens_per_batch=value)


def test_tokens_per_batch_in_force():
    STMOptions(stm_tokens_per_batch=None).check()
    assert [STMOptions().tokens_per_batch(device) for device in ("cpu", "cuda", "mps")] == [1024, 4096, 4096]
    assert STMOptions(stm_tokens_per_batch=7).tokens_per_batch("cpu") == 7


@pytest.mark.parametrize("value", ["", 3, True, ["scores"]], ids=repr)
def test_bad_scores_dir(value):
    refused("stm_scores_dir must be ", stm_scores_dir=value)


def test_from_args_takes_the_options_of_a_host_and_checks_them():
    class HostArguments:
        learning_rate = 1e-4

        def __init__(self, **values):
            vars(self).update(vars(STMOptions()) | values)

    given = {"stm_threshold": 3.0, "stm_seed": 5, "stm_keep_stop_tokens": True, "stm_tokens_per_batch": 64}
    assert STMOptions.from_args(HostArguments(**given)) == STMOptions(**given)
    with pytest.raises(ValueError, match=re.escape(THRESHOLD + "0.5")):
        STMOptions.from_args(HostArguments(stm_threshold=0.5))


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [
        ("stm_treshold", "stm_threshold"),
        ("stm_fraction", "stm_mask_fraction"),
        ("stm_keep_stop_token", "stm_keep_stop_tokens"),
        ("stm_scoresdir", "stm_scores_dir"),
        ("stm_strategie", "stm_strategy"),
    ],
)
def test_nearest_option(misspelt, meant):
    assert nearest_option(misspelt) == meant


def test_plain_reference_kwargs():
    class Config:
        def to_dict(self):
            return {"bits": 4}

    options = STMOptions(
        stm_reference="m", stm_reference_kwargs={"config": Config(), "dtype": complex, "revision": "a"}
    )
    assert options.plain_reference_kwargs() == {"config": {"bits": 4}, "dtype": str(complex), "revision": "a"}
    assert STMOptions().plain_reference_kwargs() is None
