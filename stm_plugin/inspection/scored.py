"""A data set with its scores, as `stm inspect`, `stm sweep` and `stm report` take it, and as it is found on disk."""

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ..constants import RECEIPT_NAME
from ..masking.masks import Masks, apply_threshold, candidate_scores, threshold_in_nats
from ..masking.receipt import Receipt
from ..options import STRATEGIES_BY_TWO_MODELS, STMOptions
from ..scoring.document_store import KeptDocuments, documents_folder, find_documents, read_documents
from ..scoring.documents import Documents
from ..scoring.plan import ScorePlan
from ..scoring.store import MANIFEST, ScoresError, ScoresKey, ScoreStore, default_root, read_key
from ..selection import deciding_scores


@dataclass(frozen=True)
class ScoredData:
    """A data set, the score of each of its N label tokens, and what they say.

    Attributes:
        kept: Its rows, texts and stop tokens.
        nll: NLL in nats of all label tokens, in the data set's order, shape `(N,)`, float32.
        key: Key of the scores.
        receipt: `stm.json` of the run that they belong to; None where they are not looked at as those of a run.
        title: What to call them; None for model and data.
        tuned_nll: NLL under the tuned model, of the shape of `nll`; None where there are no such scores.
    """

    kept: KeptDocuments
    nll: np.ndarray
    key: ScoresKey
    receipt: Receipt | None = None
    title: str | None = None
    tuned_nll: np.ndarray | None = None

    @property
    def documents(self) -> Documents:
        """The data set's rows."""
        return self.kept.documents

    @property
    def name(self) -> str:
        """Model and data, for a heading."""
        if self.title is not None:
            return self.title
        model = (self.receipt or {}).get("model")
        model = model.rstrip("/").rpartition("/")[2] if model else f"model {self.key.model[:8]}"
        return f"{model} on {self.kept.name}"

    @cached_property
    def options(self) -> STMOptions:
        """The options of the run; the defaults where there is none."""
        return options_of_receipt(self.receipt) if self.receipt is not None else STMOptions()

    def scores(self, options: STMOptions) -> np.ndarray:
        """The scores in nats that the options' strategy compares, shape `(N,)`, float32 (see `deciding_scores`).

        Raises:
            ValueError: For a strategy that compares with a tuned model, if there are no scores of one.
        """
        by_two = self.compares_two_models(options.stm_strategy)
        return deciding_scores(self.nll, self.tuned_nll if by_two else None, options.stm_strategy)

    def compares_two_models(self, strategy: str) -> bool:
        """Whether a strategy compares with a tuned model; ValueError if it does and there are no scores of one."""
        by_two = strategy in STRATEGIES_BY_TWO_MODELS
        if by_two and self.tuned_nll is None:
            raise ValueError(
                f"stm_strategy={strategy!r} compares with a tuned model's perplexities, which this run did not make. "
                "Give a run with that strategy, or score the data with --stm_tuned_model."
            )
        return by_two

    def masks(self, options: STMOptions | None = None) -> Masks:
        """What options mask; all tokens, where they say so.

        Args:
            options: Checked STM options; None for those of the run.
        """
        options = options or self.options
        stop_token_ids = set(self.kept.stop_token_ids)
        scores = self.scores(options)
        threshold_nats = threshold_in_nats(candidate_scores(self.documents, scores, options, stop_token_ids), options)
        return apply_threshold(self.documents, scores, threshold_nats, options, stop_token_ids)


def options_of_receipt(receipt: Receipt) -> STMOptions:
    """The options that decided a receipt's masks."""
    fraction = receipt["mask_fraction"]
    options = STMOptions(
        stm_threshold=None if fraction is not None else float(receipt["threshold"]),
        stm_mask_fraction=fraction,
        stm_strategy=receipt["strategy"],
        stm_tuned_model=receipt.get("tuned_model"),
        stm_seed=receipt["seed"],
        stm_keep_stop_tokens=receipt["keep_stop_tokens"],
        stm_reference=receipt["reference"],
    )
    options.check()
    return options


def read_scored(source: str | os.PathLike[str]) -> ScoredData:
    """Scored data from a folder.

    Args:
        source: A run's output folder or checkpoint (it has `stm.json`), or an entry of the scores folder.

    Raises:
        ScoresError: For a folder that is neither, or scores that are gone or damaged.
        DocumentsError: For rows that are gone or damaged.
    """
    folder = Path(source).expanduser()
    if (folder / RECEIPT_NAME).is_file():
        return _of_run(folder)
    if (folder / MANIFEST).is_file():
        key = read_key(folder)
        kept, plan = read_documents(find_documents(key.data))
        return ScoredData(kept, plan.spread(_read(ScoreStore(folder.resolve().parent), key, plan)), key)
    raise ScoresError(
        f"{folder} has neither a {RECEIPT_NAME} nor a {MANIFEST}. Give the output folder or a checkpoint of a run "
        f"with STM, or an entry of the scores folder (by default below {default_root()})."
    )


def _of_run(folder: Path) -> ScoredData:
    receipt = json.loads((folder / RECEIPT_NAME).read_text(encoding="utf-8"))
    if "scores_key" not in receipt:
        raise ScoresError(
            f"{folder} was trained with stm_reference 'current', which scores anew at every step and keeps nothing to "
            "look at. Give a run with stm_reference 'initial', or score the data with a model."
        )
    key = ScoresKey(**receipt["scores_key"])
    path = documents_folder() / receipt["documents_file"] if receipt.get("documents_file") else None
    kept, plan = read_documents(path if path is not None and path.is_file() else find_documents(key.data))
    tuned_nll = None
    if "tuned_scores_key" in receipt:
        tuned_key = ScoresKey(**receipt["tuned_scores_key"])
        tuned_nll = plan.spread(_read(_store_of(receipt["tuned_scores_entry"]), tuned_key, plan))
    nll = plan.spread(_read(_store_of(receipt["scores_entry"]), key, plan))
    data = ScoredData(kept, nll, key, receipt, tuned_nll=tuned_nll)
    masks = data.masks()
    if data.documents.digest(masks.masked) != receipt["mask_digest"]:
        raise ScoresError(
            f"The rows and scores that are kept do not give the masks of {folder / RECEIPT_NAME} (its mask_digest "
            "differs): the rows were replaced by others, or the file was changed. Score the run's data again."
        )
    return data


def _store_of(entry: str) -> ScoreStore:
    """The store that an entry lies in; the default one if it is not there any more."""
    return ScoreStore(Path(entry).parent if Path(entry).is_dir() else None)


def _read(store: ScoreStore, key: ScoresKey, plan: ScorePlan) -> np.ndarray:
    scores = store.read(key, plan.num_scores)
    if scores is None:
        raise ScoresError(
            f"The scores are gone from {store.path(key)}. Put that folder back, or score the data again."
        )
    return scores
