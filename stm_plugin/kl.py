"""Fine-tuning with a KL penalty to the initial model, through TRL: the regularization that STM is compared with.

A control for experiments, with no STM in it: `KLSFTConfig` and `KLSFTTrainer` are TRL's with two options more.
"""

import copy
import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from trl import SFTConfig, SFTTrainer

from ._compat import check_trl_version
from .constants import IGNORE_INDEX
from .scoring.fingerprint import effective_tensors, model_fingerprint
from .scoring.nll import causal_lm, eval_mode

check_trl_version()

ESTIMATORS = ("k1", "k3")


@dataclass
class KLSFTConfig(SFTConfig):
    """TRL's `SFTConfig` with the options of the penalty.

    Raises:
        ValueError: For a coefficient or an estimator that is not allowed.
    """

    kl_coef: float = field(
        default=0.0,
        metadata={"help": "Weight of the penalty beside the cross-entropy, both in nats per label token; 0 is none."},
    )
    kl_estimator: str = field(
        default="k3",
        metadata={
            "help": "With r = p_initial / p of a label token, `k1` is -log r and `k3` is (r - 1) - log r.",
            "choices": list(ESTIMATORS),
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_coefficient(self.kl_coef)
        check_estimator(self.kl_estimator)


class KLSFTTrainer(SFTTrainer):
    """TRL's `SFTTrainer` with a KL penalty to the initial model, estimated on the label tokens.

    With p the model that trains, q the model that training started from, and the sums over all label tokens of an
    optimizer step (every micro-batch, every process), of which there are N:

        loss = (sum -log p(w_t) + kl_coef * sum k(log q(w_t) - log p(w_t))) / N
        k1(log r) = -log r,    k3(log r) = exp(log r) - 1 - log r

    Both estimate `KL(p || q)` on tokens that p has drawn. Label tokens are not, and then k1 is no penalty: log q is a
    constant in it, so that its gradient is that of the cross-entropy, scaled by `1 - kl_coef`. k3 pulls to q from
    both sides.

    What it overrides: `compute_loss` in training (one forward pass with full logits, and one of the initial model
    without gradients or dropout) and `log`, which gains `kl/penalty`, the mean of k since the last log. Evaluation is
    TRL's, without the penalty. The initial model is the trained one with its adapter off where that is the same
    function, as for a fresh LoRA; otherwise a frozen copy.

    Args:
        model: As for `SFTTrainer`.
        args: A `KLSFTConfig`.
        *others: As for `SFTTrainer`, in the same order.
        **keywords: As for `SFTTrainer`.

    Raises:
        ValueError: For options or a set-up under which the loss would not be the above, saying what to change.
    """

    _tag_names = [*SFTTrainer._tag_names, "kl-penalty"]
    _name = "KL"

    @functools.wraps(SFTTrainer.__init__)  # type: ignore[misc]
    def __init__(self, model: Any, args: Any = None, *others: Any, **keywords: Any) -> None:
        if not isinstance(args, KLSFTConfig):
            raise ValueError(f"KLSFTTrainer takes its options from a KLSFTConfig, got args={type(args).__name__}.")
        super().__init__(model, args, *others, **keywords)
        self._kl_check_supported()
        self._kl_copy = None if args.kl_coef == 0 or off_is_initial(self.model) else frozen_copy(self.model)
        self._kl_totals: torch.Tensor | None = None

    def _kl_check_supported(self) -> None:
        parallelism = self.accelerator.parallelism_config
        problems = {
            f"loss_type={self.args.loss_type!r}": self.args.loss_type == "dft",
            "compute_loss_func": self.compute_loss_func is not None,
            "label_smoothing_factor": self.args.label_smoothing_factor > 0,
            "the router loss of a mixture of experts (router_aux_loss_coef)": self.aux_loss_enabled,
            "image data": self._is_vision_dataset,
            "FSDP": self.is_fsdp_enabled,
            "DeepSpeed": self.is_deepspeed_enabled,
            "context, sequence or tensor parallelism": parallelism is not None
            and (parallelism.cp_enabled or parallelism.sp_enabled or parallelism.tp_enabled),
            "nn.DataParallel (launch with torchrun or accelerate instead)": self.args.n_gpu > 1,
            "virtual-token adapters (prompt or prefix tuning)": any(
                config.is_prompt_learning for config in getattr(self.model, "peft_config", {}).values()
            ),
        }
        found = [name for name, there in problems.items() if there]
        if found:
            raise ValueError(f"The KL penalty does not go with {' and '.join(found)}. Use one process, or DDP.")

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The penalized loss while training, TRL's own while evaluating."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"]
        batch = {name: value for name, value in inputs.items() if name != "labels"} | {"use_cache": False}
        # Before the policy's own pass: peft switches adapters off by way of `requires_grad`.
        initial = self._kl_initial_log_probs(batch, labels) if self.args.kl_coef != 0 else None
        outputs = model(**batch)
        log_probs = label_log_probs(outputs.logits, labels)
        total = -log_probs.sum()
        if initial is not None:
            penalty = estimate(initial - log_probs, self.args.kl_estimator).sum()
            total = total + self.args.kl_coef * penalty
            counted = torch.stack([penalty.detach(), penalty.new_tensor(len(log_probs))])
            self._kl_totals = counted if self._kl_totals is None else self._kl_totals + counted
        count = len(log_probs) if num_items_in_batch is None else num_items_in_batch
        loss = total / torch.as_tensor(count, device=total.device).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # the count is of all of them, and DDP averages
        return (loss, outputs) if return_outputs else loss

    def _kl_initial_log_probs(self, batch: dict[str, Any], labels: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), self.accelerator.autocast(), self._kl_initial_model() as initial, eval_mode(initial):
            return label_log_probs(initial(**batch).logits, labels)

    @contextmanager
    def _kl_initial_model(self) -> Iterator[Any]:
        if self._kl_copy is not None:
            yield self._kl_copy.to(self.args.device)
            return
        with self.model.disable_adapter():
            yield self.model

    def log(self, logs: dict[str, float], *args: Any, **keywords: Any) -> None:
        """TRL's, with the mean penalty since the last log, over the label tokens of all processes."""
        if "loss" in logs and self._kl_totals is not None:
            penalty, count = self.accelerator.reduce(self._kl_totals, "sum").tolist()
            logs["kl/penalty"] = penalty / max(1.0, count)
            self._kl_totals = None
        super().log(logs, *args, **keywords)


def estimate(log_ratio: torch.Tensor, estimator: str) -> torch.Tensor:
    """A KL estimator of each token, in nats.

    Args:
        log_ratio: log r, the initial model's log-probability of the token less that of the model that trains.
        estimator: One of `ESTIMATORS`.
    """
    return -log_ratio if estimator == "k1" else torch.expm1(log_ratio) - log_ratio


def label_log_probs(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the label tokens in nats, shape `(N,)`, float32; the token at t is predicted at t - 1.

    Args:
        logits: Shape `(B, T, V)`.
        labels: -100 where there is no label, shape `(B, T)`.
    """
    labels = labels[:, 1:].to(logits.device)
    is_label = labels != IGNORE_INDEX
    log_probs = logits[:, :-1][is_label].float().log_softmax(-1)
    return log_probs.gather(-1, labels[is_label].unsqueeze(-1)).squeeze(-1)


def off_is_initial(model: Any) -> bool:
    """Whether a model that is about to train is, and will stay, its initial self once its adapter is off.

    So for a fresh LoRA. Not for full fine-tuning, an adapter that is trained further, one that moved base weights
    into itself (PiSSA), one that trains biases of the base, and a DoRA, which equals its base up to rounding only.
    """
    if not hasattr(model, "disable_adapter"):
        return False
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    initial = model_fingerprint(model)
    with model.disable_adapter():
        is_frozen = not any(id(tensor) in trained for _, tensor in effective_tensors(model))
        return is_frozen and model_fingerprint(model) == initial


def frozen_copy(model: Any) -> Any:
    """A copy of a model as it stands, without gradients, that computes with its own weights.

    Raises:
        ValueError: For a model that is split over several devices.
    """
    if len(set((getattr(causal_lm(model), "hf_device_map", None) or {}).values())) > 1:
        raise ValueError(
            "The KL penalty needs a copy of the initial model here, and cannot make one of a model split over devices "
            "(device_map). Train a fresh LoRA, whose initial model is the base, or put the model on one device."
        )
    frozen = copy.deepcopy(model).requires_grad_(False)
    # TRL replaces the method by one that is bound to the model it was made for, and would run that one's weights.
    vars(causal_lm(frozen)).pop("forward", None)
    return frozen


def check_coefficient(coefficient: Any) -> None:
    """Raise ValueError unless `coefficient` is a finite number of at least 0."""
    if isinstance(coefficient, bool) or not isinstance(coefficient, int | float) or not 0 <= coefficient < math.inf:
        raise ValueError(f"kl_coef must be a finite number of at least 0 (0 is no penalty), got {coefficient!r}.")


def check_estimator(estimator: Any) -> None:
    """Raise ValueError for anything but a name in `ESTIMATORS`."""
    if estimator not in ESTIMATORS:
        raise ValueError(f"kl_estimator must be one of {', '.join(map(repr, ESTIMATORS))}, got {estimator!r}.")
