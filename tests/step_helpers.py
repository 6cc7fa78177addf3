"""One optimizer step over the same sixteen rows, however a host cuts it: the rows, and what the step must be.

The rows, their masks and the gradient come from a float64 copy of the model and plain autograd, and from nothing of
the package.
"""

import itertools
import json
import math
from dataclasses import dataclass

import pytest
from trl_helpers import (
    IGNORE,
    all_masked_row,
    assert_margin,
    documents_of_batches,
    float64_logits,
    kept_gradient,
    label_rows,
    masked_rows,
    nll_of_row,
    oracle_nll,
    same_bits,
    scores_of,
)

NUM_ROWS = 16
TAU = 2000.0
RATE = 0.1

EMPTY = {
    "none": (),
    "some": (*range(8), 9, 14),
    "every other four": (*range(4, 8), *range(12, 16)),
    "all": tuple(range(NUM_ROWS)),
}
"""Which rows keep no token. With rows in order, `some` empties the first half of a step and `all` all of it; under
two ranks of four rows, `every other four` is all that rank 1 gets."""

TOLERANCE = 1e-5


@dataclass
class Step:
    """Rows for a host, the last of which is not in the step, and the step's documents with their labels to be."""

    rows: list
    documents: list


def make_step(model, tokenizer, empty, last=10, chunk=None, pieces=11):
    """Make rows of 10 to 22 tokens and one of `last`; with `chunk`, the same joined and given in other pieces."""
    rows = label_rows(tokenizer, NUM_ROWS + 4)
    rows[NUM_ROWS:] = [{name: values[:last] for name, values in rows[-1].items()}]
    if chunk:
        rows = _cut(label_rows(tokenizer, NUM_ROWS + 4), chunk)[: NUM_ROWS + 1]
    nats = math.log(TAU)
    for index in EMPTY[empty]:
        rows[index] = all_masked_row(
            rows[index], lambda row: nll_of_row(row, lambda ids: float64_logits(model, ids)), nats
        )
    nll = oracle_nll(rows, model)
    assert_margin(scores_of(nll), nats)
    masked = masked_rows(rows, nll, nats)
    assert [set(labels[1:]) == {IGNORE} for labels in masked] == [i in EMPTY[empty] for i in range(NUM_ROWS + 1)]
    documents = [(row["input_ids"], labels) for row, labels in zip(rows, masked, strict=True)][:NUM_ROWS]
    return Step(_cut(rows, pieces) if chunk else rows, documents)


def _cut(rows, size):
    joined = {name: list(itertools.chain.from_iterable(row[name] for row in rows)) for name in rows[0]}
    starts = range(0, len(joined["labels"]), size)
    return [{name: values[start : start + size] for name, values in joined.items()} for start in starts]


def kept_of(batch):
    """Kept tokens of a micro-batch."""
    return sum(sum(label != IGNORE for label in labels[1:]) for _, labels in _documents([batch]))


def check_step(ranks, step, model, empty):
    """Each rank's outcome must be that of plain autograd over the step's documents.

    Args:
        ranks: For each rank: `batches` that reached the model, `gradients` of the step, `losses` of its micro-batches,
            `loss` as logged, weights `before` and `after` one step of SGD.
        step: What `make_step` made.
        model: The model before the step.
        empty: Name of the rows that keep nothing.
    """
    trained = [document for rank in ranks for document in _documents(rank["batches"])]
    assert sorted((ids, labels[1:]) for ids, labels in trained) == sorted(
        (ids, labels[1:]) for ids, labels in step.documents
    )
    expected, loss = kept_gradient(model, step.documents)
    for rank in ranks:
        found = rank["gradients"]
        assert found.keys() == expected.keys()
        assert same_bits(found, ranks[0]["gradients"])
        if empty == "all":
            assert not any(value.any() for value in found.values())
            assert same_bits(rank["before"], rank["after"])
            assert [rank["loss"], *rank["losses"]] == [0.0] * (1 + len(rank["losses"]))
            continue
        assert relative_difference(found, expected) <= TOLERANCE
        assert rank["loss"] == pytest.approx(loss, rel=1e-5)
        moved = {name: (rank["before"][name] - rank["after"][name]).double() / RATE for name in expected}
        assert relative_difference(moved, expected) <= 1e-4  # weights are rounded to float32


def relative_difference(found, expected):
    """Norm of the difference of two gradients over the norm of the second."""
    squares = sum(float(((found[name].double() - value) ** 2).sum()) for name, value in expected.items())
    return math.sqrt(squares / sum(float((value**2).sum()) for value in expected.values()))


def _documents(batches):
    """Those of the batches, without the padding of packs, whose token is 0."""
    return [(ids, labels) for ids, labels in documents_of_batches(batches) if any(ids)]


def write_steps(folder, model, tokenizer, steps):
    """Save a model and named steps for `two_processes`."""
    model.__dict__.pop("_oracle", None)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "steps.json").write_text(json.dumps({name: step.rows for name, step in steps.items()}))
