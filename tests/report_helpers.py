"""What the tests of inspect, sweep and report share: a small scored data set, and oracles that share no code."""

import math
from itertools import pairwise

import numpy as np
from store_helpers import write

from stm_plugin.inspection.scored import ScoredData
from stm_plugin.scoring.document_store import KeptDocuments
from stm_plugin.scoring.documents import Documents
from stm_plugin.scoring.plan import ScorePlan
from stm_plugin.scoring.store import ScoresKey, ScoreStore

IGNORE = -100
WORDS = [
    "<|im_end|>",
    "def",
    " add",
    "_",
    "one",
    "(",
    "a",
    "):",
    "\n",
    "  ",
    " return",
    " 12",
    "7",
    " the",
    " Cap",
    "é",
]
"""Texts of ids 0 to 15; 0 is the stop token."""


def random_rows(number=12, seed=0, turns=2, words=WORDS):
    """Rows of prompts and answers; each answer ends with the stop token."""
    draw = np.random.default_rng(seed)
    rows = []
    for _ in range(number):
        ids, labels = [], []
        for _ in range(int(draw.integers(1, turns + 1))):
            prompt = draw.integers(1, len(words), size=int(draw.integers(2, 6))).tolist()
            answer = [*draw.integers(1, len(words), size=int(draw.integers(3, 25))).tolist(), 0]
            ids += prompt + answer
            labels += [IGNORE] * len(prompt) + answer
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def documents_of(rows):
    return Documents.from_rows([row["input_ids"] for row in rows], [row["labels"] for row in rows])


def kept_of(rows, words=WORDS, name="some data", groups=(), row_groups=()):
    row_groups = np.array(row_groups, dtype=np.int64)
    return KeptDocuments(documents_of(rows), dict(enumerate(words)), frozenset({0}), name, groups, row_groups)


def random_scores(number, seed=1):
    """NLL of which half lie near 0, as those of real models do."""
    draw = np.random.default_rng(seed)
    return (draw.exponential(2.0, number) * draw.integers(0, 2, number) + draw.exponential(0.05, number)).astype(
        np.float32
    )


def scored(rows=None, nll=None, receipt=None, **keywords):
    """Scored data with random scores."""
    kept = kept_of(random_rows() if rows is None else rows, **keywords)
    plan = ScorePlan.of(kept.documents)
    if nll is None:
        nll = plan.spread(random_scores(plan.num_scores))
    key = ScoresKey("m" * 32, "none", "torch.float32", "none", plan.fingerprint)
    return ScoredData(kept, nll, key, receipt)


def stored(rows=None, seed=1, **keywords):
    """An entry of the scores folder with its rows beside it; the scored data, and the entry."""
    kept = kept_of(random_rows() if rows is None else rows, **keywords)
    plan = ScorePlan.of(kept.documents)
    scores = random_scores(plan.num_scores, seed)
    key = ScoresKey("m" * 32, "none", "torch.float32", "none", plan.fingerprint)
    kept.write(plan)
    return ScoredData(kept, plan.spread(scores), key), write(ScoreStore(), key, scores)


def nll_rows(data):
    """NLL of each row's positions, NaN where there is no label token, by a plain loop."""
    scores, rows = iter(data.nll.tolist()), []
    offsets = data.documents.row_offsets.tolist()
    starts = set(data.documents.document_offsets[:-1].tolist())
    for start, end in pairwise(offsets):
        is_label = [data.documents.labels[p] != IGNORE and p not in starts for p in range(start, end)]
        rows.append([next(scores) if label else math.nan for label in is_label])
    assert next(scores, None) is None
    return rows


def masked_rows(data, threshold):
    """Whether each position of each row is masked by `high`, by a plain loop."""
    return [[not math.isnan(score) and score > math.log(threshold) for score in row] for row in nll_rows(data)]
