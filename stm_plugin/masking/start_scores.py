"""The scores that a run masks by, those of its start: stored ones, or made while the model is still as it was then."""

import gc
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

from ..options import REFERENCE_INITIAL
from ..scoring.documents import Documents
from ..scoring.engine import find_or_make_scores
from ..scoring.fingerprint import autocast_dtype, model_fingerprint, quantization, weights_dtype
from ..scoring.nll import Autocast, causal_lm
from ..scoring.plan import ScorePlan
from ..scoring.reference import check_same_tokens, loaded_reference, loaded_tuned_model, trusted_code
from ..scoring.sharding import is_sharded
from ..scoring.store import ScoresError, ScoresKey, ScoreStore
from .checkpoint import receipt_of
from .host import Host
from .masks import unmasked_documents


class StartScores:
    """Finds or makes the scores of a trainer's training set.

    Scores are in a plan's order, shape `(plan.num_scores,)`, float32, the same on all processes.

    Args:
        host: The trainer.
    """

    key_name = "scores_key"
    """What the receipt calls the key of the scores."""

    def __init__(self, host: Host):
        self._host = host
        self._unsharded: tuple[ScoresKey, Any] | None = None

    @property
    def store(self) -> ScoreStore:
        """Where scores are kept."""
        return ScoreStore(self._host.options.stm_scores_dir)

    def check_reference(self, documents: Documents) -> None:
        """Check that a model other than the one in training reads the same tokens in some documents."""
        options = self._host.options
        if options.stm_reference != REFERENCE_INITIAL:
            assert not isinstance(options.stm_reference_kwargs, str)
            check_same_tokens(
                "stm_reference",
                options.stm_reference,
                options.stm_reference_kwargs or {},
                self._host.tokenizer,
                documents.input_ids,
            )

    def set_up(self) -> None:
        """Check the store; under FSDP, which will share out the weights, find the scores already."""
        self._host.ranks.from_main(self.store.check_usable)
        if self._host.is_fsdp_enabled and self._host.options.stm_reference == REFERENCE_INITIAL:
            self._find_before_sharding()

    def find_or_make(self, plan: ScorePlan, expected: ScoresKey | None = None) -> tuple[ScoresKey, Any, str]:
        """Key and scores of a plan, and where they came from; with `expected`, only if that is the key."""
        options, store = self._host.options, self.store
        self.check_reference(plan.documents)
        if self._unsharded is not None:
            if self._unsharded[0].data != plan.fingerprint:
                raise ScoresError(
                    "The training set has changed since the trainer was made, and under FSDP no scores are made for "
                    "another one. Make a new trainer with it, after it has been scored."
                )
            self._check_expected(self._unsharded[0], expected)
            return *self._unsharded, "found"
        with self._scoring_model() as (model, autocast):
            key = self._key(model, autocast, plan)
            self._check_expected(key, expected)
            self._place(model, key, plan)
            scores, origin = find_or_make_scores(
                store,
                key,
                plan,
                model,
                tokens_per_batch=options.tokens_per_batch(self._host.device.type),
                autocast=autocast,
                ranks=self._host.ranks,
                progress=self._host.shows_progress,
            )
        return key, scores, origin

    def _check_expected(self, key: ScoresKey, expected: ScoresKey | None) -> None:
        """Raise ScoresError if scores that are gone were made by another model than there is now."""
        if expected is not None and key != expected:
            differing = [name for name, value in vars(expected).items() if value != getattr(key, name)]
            raise ScoresError(
                f"The scores of the original start are gone from {self.store.path(expected)}, and cannot be made "
                f"again from this model: its {' and '.join(differing)} differs. Put that folder back, or build the "
                "trainer with the model that the run started from."
            )

    def _place(self, model: Any, key: ScoresKey, plan: ScorePlan) -> None:
        """Put the model where it scores, if it has to: here it is there."""

    def of_checkpoint(self, checkpoint: str, plan: ScorePlan) -> tuple[ScoresKey, Any]:
        """Key and scores that the run started with whose checkpoint is resumed."""
        key = self._key_of_checkpoint(checkpoint, plan)
        scores = self._read(key, plan)
        if scores is None:
            raise ScoresError(
                f"The scores of the original start are gone from {self.store.path(key)}, and the weights that "
                f"{checkpoint} holds are not those they were made from. Put that folder back, or set stm_scores_dir "
                "to where it is."
            )
        return key, scores

    def make_before_resuming(self, checkpoint: str) -> None:
        """If a resumed run's scores are gone, make them while the model is still as its trainer was given it."""
        plan = ScorePlan.of(unmasked_documents(self._host.train_dataset))
        key = self._key_of_checkpoint(checkpoint, plan)
        if not self._host.ranks.from_main(self.store.path(key).exists):
            self.find_or_make(plan, expected=key)

    def _find_before_sharding(self) -> None:
        """Find the scores while the model is whole: under FSDP none are made."""
        plan = ScorePlan.of(unmasked_documents(self._host.train_dataset))
        with self._scoring_model() as (model, autocast):
            key = self._key(model, autocast, plan)
        scores = self._read(key, plan)
        if scores is None:
            raise ScoresError(
                f"Under FSDP the scores must be there before training starts, and {self.store.path(key)} is missing "
                f"(weights {key.dtype}, autocast {key.autocast}). Make them with the same model, data and options in "
                "one process, without FSDP: `stm score` for TRL, `axolotl stm-score CONFIG` for Axolotl; with the "
                "adapter, if it is not a fresh LoRA."
            )
        self._unsharded = key, scores

    def _read(self, key: ScoresKey, plan: ScorePlan) -> Any:
        """Stored scores; None where there are none."""
        store = self.store
        return self._host.ranks.from_main(lambda: store.read(key, plan.num_scores))

    def _key(self, model: Any, autocast: Autocast, plan: ScorePlan) -> ScoresKey:
        """Key of a model's scores, found by all processes if they share out its weights, else by the main one."""

        def make() -> ScoresKey:
            return ScoresKey(
                model=model_fingerprint(model),
                quantization=quantization(model),
                dtype=weights_dtype(model),
                autocast=autocast_dtype(autocast, self._host.device),
                data=plan.fingerprint,
            )

        ranks = self._host.ranks
        return ranks.each(make)[0] if is_sharded(model) else ranks.from_main(make)

    @contextmanager
    def _scoring_model(self) -> Iterator[tuple[Any, Autocast]]:
        """The model that scores and its autocast: the one about to train, as it will train, or the reference."""
        options = self._host.options
        if options.stm_reference == REFERENCE_INITIAL:
            yield self._host.model, self._host.autocast
        else:
            with loaded_reference(options, self._host.device) as model:
                yield model, nullcontext
                del model
            gc.collect()

    def _key_of_checkpoint(self, checkpoint: str, plan: ScorePlan) -> ScoresKey:
        key = ScoresKey(**receipt_of(checkpoint)[self.key_name])
        if key.data != plan.fingerprint:
            raise ScoresError(
                f"{checkpoint} was trained on other rows: the token ids or label positions of this training set "
                "differ from those that were scored at the original start. Resume with the same data, chat template "
                "and max_length."
            )
        return key


class TunedScores(StartScores):
    """Finds or makes the scores of the training set under `stm_tuned_model`, which is loaded for it alone."""

    key_name = "tuned_scores_key"

    def check_reference(self, documents: Documents) -> None:
        """Check that the tuned model reads the same tokens in some documents."""
        check_same_tokens(
            "stm_tuned_model",
            str(self._host.options.stm_tuned_model),
            trusted_code(causal_lm(self._host.model)),
            self._host.tokenizer,
            documents.input_ids,
        )

    def set_up(self) -> None:
        """Under FSDP, after which the model in training does not say any more how it was loaded, find the scores."""
        if self._host.is_fsdp_enabled:
            self._find_before_sharding()

    def of_checkpoint(self, checkpoint: str, plan: ScorePlan) -> tuple[ScoresKey, Any]:
        """Key and scores that the run started with whose checkpoint is resumed; made again if they are gone."""
        key = self._key_of_checkpoint(checkpoint, plan)
        scores = self._read(key, plan)
        return (key, scores) if scores is not None else self.find_or_make(plan, expected=key)[:2]

    @contextmanager
    def _scoring_model(self) -> Iterator[tuple[Any, Autocast]]:
        host, models = self._host, []
        with ExitStack() as stack:
            # An error of one process, such as a file that one machine lacks, is raised on all.
            host.ranks.each(
                lambda: models.append(stack.enter_context(loaded_tuned_model(host.options, host.model, host.device)))
            )
            yield models.pop(), host.autocast
        gc.collect()

    def _place(self, model: Any, key: ScoresKey, plan: ScorePlan) -> None:
        """Put the model on the device, unless its scores are there: it may have no room beside the one in training."""
        try:
            stored = self._read(key, plan) is not None
        except ScoresError:
            stored = False  # whoever makes them says what is wrong
        if not stored and quantization(model) == "none":
            model.to(self._host.device)
