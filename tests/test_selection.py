"""Which tokens are masked, against oracles written from DESIGN.md as plain loops."""

import hashlib
import math
import random
import re
from collections import deque

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stm_plugin.selection import (
    check_scores,
    effective_scores,
    fraction_threshold_nats,
    label_positions,
    mask_labels,
    select_masked,
)

LOG_2_5 = math.log(2.5)


# The oracles: one document at a time, one token at a time.


def naive_high(nll, threshold_nats, candidates):
    return [bool(c) and float(x) > threshold_nats for x, c in zip(nll, candidates, strict=True)]


def naive_low(nll, threshold_nats, candidates):
    wanted = sum(naive_high(nll, threshold_nats, candidates))
    masked = [False] * len(nll)
    for _ in range(wanted):
        best = None
        for t in range(len(nll)):  # the first of the lowest that are left
            if candidates[t] and not masked[t] and (best is None or float(nll[t]) < float(nll[best])):
                best = t
        masked[best] = True
    return masked


def naive_random(nll, threshold_nats, candidates, seed, label_ids):
    """DESIGN.md: 'NumPy PCG64 seeded by SHA-256 of stm_seed and the document's label ids in order, as int64'.

    It leaves open, and this fixes: the digest is read as one little-endian number, the permutation is that of the
    document's candidates, and its first entries are masked.
    """
    wanted = sum(naive_high(nll, threshold_nats, candidates))
    content = b"".join(int(number).to_bytes(8, "little", signed=True) for number in [seed, *label_ids])
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(hashlib.sha256(content).digest(), "little")))
    pool = [t for t in range(len(nll)) if candidates[t]]
    drawn = [pool[index] for index in generator.permutation(len(pool))[:wanted]]
    return [t in drawn for t in range(len(nll))]


def naive(documents, threshold_nats, strategy, seed):
    masked = []
    for nll, label_ids, candidates in documents:
        if strategy == "high":
            masked += naive_high(nll, threshold_nats, candidates)
        elif strategy == "low":
            masked += naive_low(nll, threshold_nats, candidates)
        else:
            masked += naive_random(nll, threshold_nats, candidates, seed, label_ids)
    return masked


def naive_fraction_threshold(nll, fraction):
    """Smallest score such that at most floor(fraction * N) scores exceed it, by trying every score."""
    allowed = math.floor(fraction * len(nll))
    return min(float(score) for score in nll if sum(float(x) > float(score) for x in nll) <= allowed)


# The data: scores on a coarse grid (many ties), anywhere in float32, or right around log(2.5).

near_the_threshold = [
    np.float32(LOG_2_5),
    np.nextafter(np.float32(LOG_2_5), np.float32(0)),
    np.nextafter(np.float32(LOG_2_5), np.float32(9)),
]
score = st.one_of(
    st.integers(0, 6).map(lambda n: np.float32(n / 4)),
    st.floats(0, 20, width=32).map(np.float32),
    st.sampled_from([*near_the_threshold, np.float32(0), np.float32("inf")]),
)
token = st.tuples(score, st.integers(0, 130_000), st.booleans())
document = st.lists(token, max_size=9).map(lambda tokens: tuple(zip(*tokens, strict=True)) or ((), (), ()))
data_set = st.lists(document, max_size=6)
seeds = st.one_of(st.integers(0, 3), st.integers(-(2**63), 2**63 - 1))


def selected(documents, threshold_nats, strategy, seed=0, with_candidates=True):
    """`select_masked` on documents given as (nll, label_ids, candidates)."""
    flat = [[value for one in documents for value in one[field]] for field in range(3)]
    return select_masked(
        np.array(flat[0], dtype=np.float32),
        np.array([len(nll) for nll, _, _ in documents], dtype=np.int64),
        threshold_nats=threshold_nats,
        strategy=strategy,
        seed=seed,
        label_ids=np.array(flat[1], dtype=np.int32),
        candidates=np.array(flat[2], dtype=bool) if with_candidates else None,
    )


@st.composite
def data_set_and_threshold(draw):
    """Some documents, and a threshold that often ties with one of their scores."""
    documents = draw(data_set)
    scores = [float(x) for nll, _, _ in documents for x in nll]
    return documents, draw(st.sampled_from([*scores, LOG_2_5, 1e-9, 0.6, math.inf]))


@pytest.mark.parametrize("strategy", ["high", "low", "random"])
@given(case=data_set_and_threshold(), seed=seeds)
def test_select_masked_is_the_rule(strategy, case, seed):
    documents, threshold_nats = case
    masked = selected(documents, threshold_nats, strategy, seed)
    assert masked.dtype == bool
    assert masked.tolist() == naive(documents, threshold_nats, strategy, seed)


@pytest.mark.parametrize("strategy", ["high", "low", "random"])
@pytest.mark.parametrize("with_candidates", [True, False])
@given(case=data_set_and_threshold(), seed=seeds)
def test_effective_scores_say_which_thresholds_mask_a_token(strategy, with_candidates, case, seed):
    documents, threshold_nats = case
    if not with_candidates:
        documents = [(nll, ids, (True,) * len(nll)) for nll, ids, _ in documents]
    flat = [[value for one in documents for value in one[field]] for field in range(3)]
    effective = effective_scores(
        np.array(flat[0], dtype=np.float32),
        np.array([len(nll) for nll, _, _ in documents], dtype=np.int64),
        strategy=strategy,
        seed=seed,
        label_ids=np.array(flat[1], dtype=np.int32),
        candidates=np.array(flat[2], dtype=bool) if with_candidates else None,
    )
    assert [float(score) > threshold_nats for score in effective] == naive(documents, threshold_nats, strategy, seed)


@pytest.mark.parametrize("strategy", ["high", "low", "random"])
@given(case=data_set_and_threshold(), seed=seeds)
def test_without_candidates_all_tokens_are(strategy, case, seed):
    documents, threshold_nats = case
    everything = [(nll, ids, (True,) * len(nll)) for nll, ids, _ in documents]
    masked = selected(documents, threshold_nats, strategy, seed, with_candidates=False)
    assert masked.tolist() == naive(everything, threshold_nats, strategy, seed)


@pytest.mark.parametrize("strategy", ["low", "random"])
@given(case=data_set_and_threshold(), seed=seeds)
def test_controls_mask_as_many_in_each_document_and_spare_what_is_no_candidate(strategy, case, seed):
    documents, threshold_nats = case
    high, control = selected(documents, threshold_nats, "high"), selected(documents, threshold_nats, strategy, seed)
    start = 0
    for nll, _, candidates in documents:
        end = start + len(nll)
        assert control[start:end].sum() == high[start:end].sum()
        assert not (control[start:end] & ~np.array(candidates, dtype=bool)).any()
        start = end


@pytest.mark.parametrize("strategy", ["high", "low", "random"])
@given(case=data_set_and_threshold(), seed=seeds, order=st.randoms(use_true_random=False))
def test_a_document_is_masked_alike_wherever_it_stands(strategy, case, seed, order):
    documents, threshold_nats = case
    places = list(range(len(documents)))
    order.shuffle(places)
    sizes = [len(nll) for nll, _, _ in documents]
    parts = np.split(selected(documents, threshold_nats, strategy, seed), np.cumsum(sizes)[:-1]) if sizes else []
    moved = selected([documents[place] for place in places], threshold_nats, strategy, seed)
    assert moved.tolist() == [value for place in places for value in parts[place].tolist()]


def test_low_on_an_example():
    nll = np.array([0.5, 0.1, 3.0, 0.1, 2.0, 0.0], dtype=np.float32)
    masked = select_masked(nll, np.array([6]), threshold_nats=LOG_2_5, strategy="low")
    assert masked.tolist() == [
        False,
        True,
        False,
        False,
        False,
        True,
    ]  # the lowest, then the earlier of the equal ones


def test_random_is_pinned():
    """The draw of a document is for ever: stored masks, other hosts and other languages rely on it."""
    nll = np.array([3.0, 0.1, 3.0, 0.1, 3.0, 0.1, 0.1, 0.1], dtype=np.float32)
    ids = np.arange(100, 108)
    drawn = {
        seed: np.flatnonzero(
            select_masked(nll, np.array([8]), threshold_nats=1.0, strategy="random", seed=seed, label_ids=ids)
        ).tolist()
        for seed in (0, 1, -1)
    }
    assert drawn == {
        seed: np.flatnonzero(naive_random(nll, 1.0, [True] * 8, seed, ids.tolist())).tolist() for seed in drawn
    }
    assert drawn == {0: [0, 4, 7], 1: [2, 4, 6], -1: [4, 5, 7]}


def test_random_varies_with_seed_and_document():
    nll = np.tile(np.array([3.0, 0.1], dtype=np.float32), 20)
    draws = {
        tuple(select_masked(nll, np.array([40]), threshold_nats=1.0, strategy="random", seed=seed, label_ids=ids))
        for seed in range(4)
        for ids in (np.arange(40), np.arange(40)[::-1].copy(), np.arange(1, 41))
    }
    assert len(draws) == 12


def test_random_moves_no_global_generator():
    random.seed(3)
    np.random.seed(3)
    before = random.getstate(), np.random.get_state()[1].tolist()
    mask_labels(list(range(50)), [3.0] * 25 + [0.1] * 25, strategy="random")
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before


@pytest.mark.parametrize("strategy", ["high", "low", "random"])
def test_no_token_at_all(strategy):
    nothing = np.zeros(0, dtype=np.float32)
    for counts in ([], [0], [0, 0, 0]):
        masked = select_masked(
            nothing,
            np.array(counts, dtype=np.int64),
            threshold_nats=1.0,
            strategy=strategy,
            label_ids=np.zeros(0, dtype=np.int32),
        )
        assert masked.shape == (0,)


# The threshold.


def test_threshold_is_a_perplexity():
    """2.0 nats is a perplexity of 7.4: above 2.5, though 2.0 is below 2.5. 0.95 nats is 2.586, 0.9 nats 2.46."""
    assert mask_labels([7, 7, 7, 7], [0.0, 2.0, 0.95, 0.9]) == [7, -100, -100, 7]
    assert mask_labels([7, 7], [0.0, 1.5], threshold=1.6) == [7, -100]
    assert mask_labels([7, 7], [0.0, 0.1], threshold=1.2) == [7, 7]


def test_a_tie_is_kept():
    """exp(x) of a float32 x is a threshold that x meets exactly, as far as float64's exp and log undo each other."""
    kept = 0
    for x in np.linspace(0.01, 9, 200, dtype=np.float32):
        threshold = math.exp(float(x))
        if math.log(threshold) == float(x):
            assert mask_labels([1, 2], [0.0, x], threshold=threshold) == [1, 2]
            above = np.nextafter(x, np.float32(np.inf))
            assert mask_labels([1, 2], [0.0, above], threshold=threshold) == [1, -100]
            kept += 1
    assert kept > 50


def test_scores_are_compared_in_float64():
    """float32(log 2.5) lies 3e-8 above log 2.5: a comparison in float32 would call it a tie and keep it."""
    rounded = np.float32(LOG_2_5)
    assert float(rounded) > LOG_2_5
    nll = np.array([rounded, np.nextafter(rounded, np.float32(0))])
    assert select_masked(nll, np.array([2]), threshold_nats=LOG_2_5).tolist() == [True, False]
    assert mask_labels([1, 2, 3], [0.0, *nll]) == [1, -100, 3]


@pytest.mark.parametrize("strategy", ["high", "low", "random"])
def test_an_infinite_threshold_keeps_all(strategy):
    nll = [0.0, 1e-3, 700.0, 3e38, math.inf]
    assert mask_labels([1, 2, 3, 4, 5], nll, threshold=math.inf, strategy=strategy) == [1, 2, 3, 4, 5]


def test_an_infinite_score_is_above_every_finite_threshold():
    assert mask_labels([1, 2, 3], [0.0, math.inf, 1.0], threshold=1e300) == [1, -100, 3]


# The share.


@given(
    nll=st.lists(score, min_size=1, max_size=40),
    fraction=st.one_of(
        st.floats(0, 1, exclude_min=True, exclude_max=True), st.sampled_from([0.1, 0.2, 0.22, 0.25, 0.5, 0.75, 0.9])
    ),
)
def test_fraction_threshold_is_the_rule(nll, fraction):
    nll = np.array(nll, dtype=np.float32)
    threshold_nats = fraction_threshold_nats(nll, fraction)
    assert isinstance(threshold_nats, float)
    assert threshold_nats == naive_fraction_threshold(nll, fraction)
    assert (nll.astype(np.float64) > threshold_nats).sum() <= math.floor(fraction * len(nll))


def test_fraction_is_exact_without_ties_and_less_with_them():
    distinct = np.random.default_rng(0).permutation(1000).astype(np.float32) / 50
    for fraction in (0.001, 0.2, 0.224, 0.5, 0.999):
        assert (distinct > fraction_threshold_nats(distinct, fraction)).sum() == math.floor(fraction * 1000)
    tied = np.array([0, 1, 1, 1, 1, 2], dtype=np.float32)
    assert fraction_threshold_nats(tied, 0.5) == 1.0  # three of six allowed, but only one lies above the four equal
    assert fraction_threshold_nats(tied, 0.1) == 2.0  # none allowed


def test_fraction_leaves_its_argument_alone():
    nll = np.random.default_rng(1).random(99).astype(np.float32)
    before = nll.copy()
    fraction_threshold_nats(nll, 0.3)
    assert (nll == before).all()


@pytest.mark.parametrize("fraction", [0, 1, -0.1, math.nan, "0.2", True])
def test_bad_fraction(fraction):
    with pytest.raises(ValueError, match=r"^stm_mask_fraction must be a number between 0 and 1, exclusive, got "):
        fraction_threshold_nats(np.ones(3, dtype=np.float32), fraction)


def test_fraction_of_nothing():
    with pytest.raises(ValueError, match=r"^stm_mask_fraction needs at least one label token that may be masked"):
        fraction_threshold_nats(np.zeros(0, dtype=np.float32), 0.2)


# NaN.


def test_nan_is_an_error_that_says_where():
    nll = np.array([0.1, np.nan, 0.3, np.nan], dtype=np.float32)
    message = "^2 of 4 scores are NaN, the first at label token 1: the model yields no probability there"
    for attempt in (
        lambda: check_scores(nll),
        lambda: select_masked(nll, np.array([4]), threshold_nats=1.0),
        lambda: select_masked(nll, np.array([4]), threshold_nats=math.inf),
        lambda: select_masked(nll, np.array([4]), threshold_nats=1.0, candidates=np.array([True, False, True, False])),
        lambda: fraction_threshold_nats(nll, 0.5),
        lambda: mask_labels([9, 1, 2, 3, 4], [0.0, *nll]),
    ):
        with pytest.raises(ValueError, match=message):
            attempt()


def test_nan_where_nothing_is_predicted_is_never_read():
    labels = [5, -100, 6, 7]
    assert mask_labels(labels, [math.nan, math.nan, 3.0, 0.1]) == [5, -100, -100, 7]


# One row of labels.


@st.composite
def labelled_row(draw):
    size = draw(st.integers(0, 12))
    labels = draw(st.lists(st.sampled_from([-100, 0, 1, 2, 31999]), min_size=size, max_size=size))
    return labels, draw(st.lists(score, min_size=size, max_size=size))


@given(row=labelled_row(), threshold=st.sampled_from([1.0001, 1.5, 2.5, 10.0, math.inf]))
def test_mask_labels_is_its_naive_equivalent(row, threshold):
    labels, nll = row
    assert mask_labels(labels, nll, threshold=threshold) == [
        -100 if t > 0 and label != -100 and float(nll[t]) > math.log(threshold) else label
        for t, label in enumerate(labels)
    ]


@pytest.mark.parametrize("strategy", ["high", "low", "random"])
@given(row=labelled_row(), seed=seeds)
def test_mask_labels_only_ever_removes(strategy, row, seed):
    labels, nll = row
    masked = mask_labels(labels, nll, strategy=strategy, seed=seed)
    assert len(masked) == len(labels)
    assert all(after in (before, -100) for before, after in zip(labels, masked, strict=True))
    assert masked[:1] == labels[:1]


@pytest.mark.parametrize("strategy", ["low", "random"])
@given(row=labelled_row(), seed=seeds)
def test_mask_labels_is_select_masked_of_one_document(strategy, row, seed):
    labels, nll = row
    at = [t for t in range(1, len(labels)) if labels[t] != -100]
    document = (tuple(nll[t] for t in at), tuple(labels[t] for t in at), (True,) * len(at))
    expected = list(labels)
    for t, masked in zip(at, naive([document], LOG_2_5, strategy, seed), strict=True):
        expected[t] = -100 if masked else labels[t]
    assert mask_labels(labels, nll, strategy=strategy, seed=seed) == expected


def test_scores_belong_to_their_own_label():
    """Each shift by one masks another token: the score at t is that of the label at t."""
    labels = [10, 11, 12, 13, 14, 15]
    for t in range(1, 6):
        nll = [9.0 if position == t else 0.1 for position in range(6)]
        assert [position for position in range(6) if mask_labels(labels, nll)[position] == -100] == [t]
    assert mask_labels(labels, [9.0, 0.1, 0.1, 0.1, 0.1, 0.1]) == labels  # nothing predicts position 0


def test_label_positions():
    assert label_positions(np.array([4, -100, 5, 6, -100])).tolist() == [2, 3]
    assert label_positions(np.array([-100, 5])).tolist() == [1]
    assert label_positions(np.array([4])).tolist() == []
    assert label_positions(np.array([], dtype=np.int64)).tolist() == []


LABELS = [3, -100, 5, 6, 7]
SCORES = [9.0, 9.0, 9.0, 0.1, 9.0]
MASKED = [3, -100, -100, 6, -100]


@pytest.mark.parametrize("kind", [list, tuple, deque])
def test_a_sequence_gives_one_of_its_kind(kind):
    labels = kind(LABELS)
    masked = mask_labels(labels, SCORES)
    assert type(masked) is kind
    assert list(masked) == MASKED
    assert all(type(label) is int for label in masked)
    assert list(labels) == LABELS


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.int64, ">i4", np.float32])
@pytest.mark.parametrize("scores_dtype", [np.float16, np.float32, np.float64])
def test_an_array_gives_an_array_of_its_dtype(dtype, scores_dtype):
    labels = np.array(LABELS, dtype=dtype)
    masked = mask_labels(labels, np.array(SCORES, dtype=scores_dtype))
    assert isinstance(masked, np.ndarray)
    assert masked.dtype == labels.dtype
    assert masked.tolist() == MASKED
    assert labels.tolist() == LABELS


def test_a_view_of_an_array():
    labels = np.array([LABELS, LABELS]).T
    assert mask_labels(labels[:, 1], np.array(SCORES * 2)[:5]).tolist() == MASKED
    assert mask_labels(np.array(LABELS[::-1])[::-1], SCORES).tolist() == MASKED


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.uint64])
def test_a_dtype_without_minus_100_is_refused(dtype):
    """-100 would wrap around to a token id (65,436 for uint16) and be trained."""
    with pytest.raises(ValueError, match="uint"):
        mask_labels(np.array([3, 4, 5], dtype=dtype), [0.0, 9.0, 0.1])


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="torch is not installed")


@pytest.mark.parametrize("dtype", ["int16", "int32", "int64"])
@pytest.mark.parametrize("scores_dtype", ["float16", "bfloat16", "float32", "float64"])
def test_a_tensor_gives_a_tensor_of_its_dtype_and_device(torch, dtype, scores_dtype):
    labels = torch.tensor(LABELS, dtype=getattr(torch, dtype))
    masked = mask_labels(labels, torch.tensor(SCORES, dtype=getattr(torch, scores_dtype), requires_grad=True))
    assert (masked.dtype, masked.device, masked.requires_grad) == (labels.dtype, labels.device, False)
    assert masked.tolist() == MASKED
    assert labels.tolist() == LABELS
    assert masked.data_ptr() != labels.data_ptr()


def test_a_tensor_on_a_gpu(torch):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    labels = torch.tensor(LABELS, device="cuda")
    masked = mask_labels(labels, torch.tensor(SCORES))
    assert masked.device == labels.device
    assert masked.tolist() == MASKED
    assert mask_labels(LABELS, torch.tensor(SCORES, device="cuda")) == MASKED


def test_kinds_may_be_mixed(torch):
    assert mask_labels(LABELS, torch.tensor(SCORES)) == MASKED
    assert mask_labels(torch.tensor(LABELS), SCORES).tolist() == MASKED
    assert mask_labels(tuple(LABELS), np.array(SCORES)) == tuple(MASKED)


def test_an_unsigned_tensor_is_refused(torch):
    with pytest.raises(ValueError, match="uint8"):
        mask_labels(torch.tensor([3, 4, 5], dtype=torch.uint8), [0.0, 9.0, 0.1])


@pytest.mark.parametrize(
    ("labels", "nll", "shapes"),
    [
        ([1, 2, 3], [0.0, 1.0], "(3,) and (2,)"),
        ([1, 2], [0.0, 1.0, 2.0], "(2,) and (3,)"),
        ([[1, 2]], [[0.0, 1.0]], "(1, 2) and (1, 2)"),
        ([1, 2], [[0.0, 1.0]], "(2,) and (1, 2)"),
        ([1, 2], [], "(2,) and (0,)"),
    ],
)
def test_shapes_that_differ_are_refused(labels, nll, shapes):
    message = re.escape(f"labels and nll must be one row of the same length, got shapes {shapes}.")
    with pytest.raises(ValueError, match=message):
        mask_labels(labels, nll)


def test_bad_options_are_refused_even_where_nothing_would_be_masked():
    for bad, name in (({"threshold": 1}, "threshold"), ({"strategy": "top"}, "strategy"), ({"seed": 0.5}, "seed")):
        with pytest.raises(ValueError, match=f"^stm_{name} must be "):
            mask_labels([1], [0.0], **bad)
