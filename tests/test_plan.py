"""What is scored, in which order and in which batches: a function of the documents alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stm_plugin.scoring.documents import Documents
from stm_plugin.scoring.plan import ScorePlan

# Few ids and short documents, so that equal documents and equal lengths are common.
position = st.tuples(st.integers(0, 2), st.booleans())
document = st.lists(position, max_size=6).map(
    lambda positions: ([token for token, _ in positions], [token if on else -100 for token, on in positions])
)
data_set = st.lists(document, max_size=12)


def documents_of(data, cuts=None):
    """Documents as rows of their own, or packed: `cuts` says how many documents each row takes."""
    if cuts is None:
        return Documents.from_rows([ids for ids, _ in data], [labels for _, labels in data])
    rows, start = [], 0
    while start < len(data):
        size = cuts[len(rows) % len(cuts)]
        rows.append(data[start : start + size])
        start += size
    return Documents.from_rows(
        [[token for ids, _ in row for token in ids] for row in rows],
        [[label for _, labels in row for label in labels] for row in rows],
        [[len(ids) for ids, _ in row] for row in rows],
    )


def contents(plan):
    """Ids, and labels where they are scored, of the planned documents in order."""
    offsets = plan.documents.document_offsets
    scored = np.where(plan.documents.label_mask, plan.documents.labels, -100)
    return [
        (tuple(plan.documents.input_ids[offsets[i] : offsets[i + 1]]), tuple(scored[offsets[i] : offsets[i + 1]]))
        for i in plan.members
    ]


def naive_contents(data):
    """The different documents with a label token."""
    return {(tuple(ids), (-100, *labels[1:])) for ids, labels in data if any(label != -100 for label in labels[1:])}


def context(labels):
    """Tokens before the last label token."""
    return max(t for t, label in enumerate(labels) if t > 0 and label != -100)


@given(data=data_set)
def test_each_different_document_is_planned_once_longest_first(data):
    plan = ScorePlan.of(documents_of(data))
    found = contents(plan)
    assert len(found) == len(set(found)) == len(plan)
    assert set(found) == naive_contents(data)
    assert plan.lengths.tolist() == [context(labels) for _, labels in found]
    assert plan.lengths.tolist() == sorted(plan.lengths, reverse=True)
    sizes = [sum(label != -100 for label in labels) for _, labels in found]
    assert plan.offsets.tolist() == np.cumsum([0, *sizes]).tolist()
    assert plan.num_scores == sum(sizes)


@given(data=data_set, order=st.randoms(use_true_random=False), cuts=st.lists(st.integers(1, 4), min_size=1))
def test_order_and_packing_of_rows_change_nothing(data, order, cuts):
    plain = ScorePlan.of(documents_of(data))
    moved = list(data)
    order.shuffle(moved)
    for other in (ScorePlan.of(documents_of(moved)), ScorePlan.of(documents_of(moved, cuts))):
        assert contents(other) == contents(plain)
        assert other.fingerprint == plain.fingerprint
        assert other.lengths.tolist() == plain.lengths.tolist()
        assert other.batches(8) == plain.batches(8)


@given(data=data_set, cuts=st.lists(st.integers(1, 4), min_size=1))
def test_spread_brings_each_score_to_its_token(data, cuts):
    documents = documents_of(data, cuts)
    plan = ScorePlan.of(documents)
    scores = np.arange(plan.num_scores, dtype=np.float32)
    score_of, start = {}, 0
    for ids, labels in contents(plan):
        at = [t for t, label in enumerate(labels) if label != -100]
        score_of[ids, labels] = scores[start : start + len(at)].tolist()
        start += len(at)
    expected = []
    for ids, labels in data:
        if any(label != -100 for label in labels[1:]):
            expected += score_of[tuple(ids), (-100, *labels[1:])]
    assert plan.spread(scores).tolist() == expected
    assert len(expected) == documents.num_label_tokens


@given(data=data_set, budget=st.integers(1, 40))
def test_batches_are_the_plan_cut_within_the_budget(data, budget):
    plan = ScorePlan.of(documents_of(data))
    batches = plan.batches(budget)
    assert [index for batch in batches for index in batch] == list(range(len(plan)))
    for batch in batches:
        width = max(plan.lengths[batch.start : batch.stop])
        assert len(batch) == 1 or len(batch) * width <= budget
        # no document more would have fitted
        if batch.stop < len(plan):
            assert (len(batch) + 1) * width > budget


def test_planned_points_each_document_to_its_scores():
    data = [([1, 2], [1, 2]), ([5], [5]), ([1, 2, 3], [-100, -100, 3]), ([1, 2], [-100, 2]), ([], [])]
    plan = ScorePlan.of(documents_of(data))
    assert contents(plan) == [((1, 2, 3), (-100, -100, 3)), ((1, 2), (-100, 2))]
    assert plan.planned.tolist() == [1, -1, 0, 1]  # the empty row is no document


@pytest.mark.parametrize("data", [[], [([], [])], [([5], [5])], [([1, 2, 3], [-100] * 3), ([4], [-100])]], ids=str)
def test_nothing_to_score(data):
    plan = ScorePlan.of(documents_of(data))
    assert (len(plan), plan.num_scores, plan.batches(8)) == (0, 0, [])
    assert plan.spread(np.zeros(0, dtype=np.float32)).shape == (0,)
    assert isinstance(plan.fingerprint, str)


def test_fingerprint_tells_data_apart():
    base = [([1, 2, 3], [-100, 2, 3]), ([4, 5], [4, 5])]
    others = [
        [([1, 2, 9], [-100, 2, 3]), base[1]],
        [([1, 2, 3], [-100, -100, 3]), base[1]],
        [([1, 2, 3], [-100, 2, 9]), base[1]],
        [base[0]],
        [*base, ([7, 7], [7, 7])],
        [([1, 2, 3, 4, 5], [-100, 2, 3, -100, 5])],
    ]
    fingerprints = [ScorePlan.of(documents_of(data)).fingerprint for data in (base, *others)]
    assert len(set(fingerprints)) == len(fingerprints)
    repeated = [base[1], base[0], base[1], ([6], [6])]  # what is scored is the same
    assert ScorePlan.of(documents_of(repeated)).fingerprint == fingerprints[0]


def test_duplicates_are_scored_once():
    data = [([1, 2, 3], [1, 2, 3])] * 50 + [([3, 2], [3, 2])] * 50
    plan = ScorePlan.of(documents_of(data, cuts=[7]))
    assert (len(plan), plan.num_scores) == (2, 3)
    assert plan.spread(np.array([0.5, 1.5, 2.5])).tolist() == [0.5, 1.5] * 50 + [2.5] * 50


def test_order_is_pinned():
    """Stored scores lie in this order: another order under the same format version would read them wrongly."""
    data = [([i, i + 1, 2], [i, i + 1, 2]) for i in range(6)] + [
        ([9, 8], [9, 8]),
        ([1, 2, 3, 4], [-100, -100, -100, 4]),
    ]
    plan = ScorePlan.of(documents_of(data))
    assert [ids for ids, _ in contents(plan)] == [
        (1, 2, 3, 4),
        (5, 6, 2),
        (1, 2, 2),
        (4, 5, 2),
        (0, 1, 2),
        (3, 4, 2),
        (2, 3, 2),
        (9, 8),
    ]
    assert plan.fingerprint == "0558febf7ae091d1921ff08c07b2d445"
