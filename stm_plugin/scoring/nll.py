"""Per-token negative log-likelihood of a causal language model: `nll_t = -log p(w_t | w_<t)`, in nats, float32.

Shapes: B documents, T tokens, N label tokens, H hidden size, V vocabulary.
"""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise, zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast

from .._compat import repacks_weights_in_eval_mode
from ..constants import IGNORE_INDEX
from ..loading import load_causal_lm
from ..options import STMOptions
from .documents import Documents
from .plan import ScorePlan
from .prefix import Backbone, most_to_share, shared_prefix
from .sharding import whole

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

Autocast = Callable[[], AbstractContextManager[Any]]
Agree = Callable[[list[int]], list[int]]

LOGITS_PER_SLICE = 2**24
"""Most logits that exist at a time, but for a CPU: 64 MiB in float32, whatever the vocabulary and the batch."""

LABELS_PER_SLICE_ON_CPU = 192
"""Labels that a CPU takes through the head at least in float32, in up to three times the logits: each time it reads
the whole weight, and a product with fewer rows takes up to a quarter longer. Of two bytes, twice as many of both."""

LOGITS_PER_SOFTMAX = 2**20
"""Most logits that a CPU takes through the softmax at a time: what its caches and allocator hold on to."""


def score_dataset(
    model: PreTrainedModel | str,
    dataset: "Dataset",
    *,
    tokens_per_batch: int | None = None,
    progress: bool = True,
) -> list[np.ndarray]:
    """Score a tokenized data set with a model as it stands (adapters included), in eval mode.

    Args:
        model: Causal language model, or the path or id of one or of an adapter, loaded in its checkpoint's dtype.
        dataset: Rows of `input_ids`, and where they have them `labels` (-100 where the loss is off; without the column
            every token is a label) and `seq_lengths` (packed documents, scored one by one).
        tokens_per_batch: Most tokens of one forward pass, padding included; None for what suits the device.
        progress: Whether to show a progress bar.

    Returns:
        One float32 array a row, as long as its `input_ids`: `nll[t]` in nats is the score of `labels[t]`, NaN where
        there is no label token. `mask_labels` takes both.

    Raises:
        ValueError: For a data set that cannot be scored, saying why.
    """
    documents = Documents.from_dataset(dataset)
    plan = ScorePlan.of(documents)
    if isinstance(model, str):
        model = load_causal_lm(model, {"dtype": "auto"})
    scores = score(model, plan, tokens_per_batch=tokens_per_batch, progress=progress)
    nll = np.full(len(documents.input_ids), np.nan, dtype=np.float32)
    nll[documents.label_mask] = plan.spread(scores)
    return [nll[start:end] for start, end in pairwise(documents.row_offsets.tolist())]


def score(
    model: PreTrainedModel,
    plan: ScorePlan,
    *,
    tokens_per_batch: int | None = None,
    autocast: Autocast = nullcontext,
    agree: Agree | None = None,
    progress: bool = True,
) -> np.ndarray:
    """Score a plan's documents, each with its full left context and nothing else.

    Args:
        model: Causal language model, with or without adapters.
        plan: Documents to score.
        tokens_per_batch: As for `score_dataset`.
        autocast: Makes the context of the forward pass, that of training.
        agree: As for `Scorer`.
        progress: Whether to show a progress bar.

    Returns:
        NLL in nats in the plan's order, shape `(plan.num_scores,)`, float32.
    """
    scorer = Scorer(model, plan, autocast, agree)
    options = STMOptions(stm_tokens_per_batch=tokens_per_batch)
    batches = plan.batches(options.tokens_per_batch(causal_lm(model).device.type))
    with progress_bar(plan.num_tokens(batches), shown=progress) as bar:
        parts = scorer.score(batches, bar.update)
    return np.concatenate([np.zeros(0, np.float32), *parts])


def progress_bar(num_tokens: int, *, shown: bool) -> Any:
    """A bar of tokens scored, tokens a second and time left."""
    return tqdm(total=num_tokens, unit="tok", unit_scale=True, desc="STM: scoring", disable=not shown, smoothing=0.05)


class Scorer:
    """Scores batches of a plan's documents with one model.

    The naive equivalent for one document of ids `input_ids` is

        log_probs = model(input_ids[None]).logits[0].float().log_softmax(-1)
        nll[t] = -log_probs[t - 1, labels[t]]

    Logits exist only for the positions that predict a label token, at most `LOGITS_PER_SLICE` values at a time, on a
    CPU three times as many (of two bytes: six times). The model's training flags and all random number generators are
    left as they were.

    Args:
        model: Causal language model, with or without adapters; not wrapped for distribution.
        plan: Documents to score.
        autocast: Makes the context of the forward pass, that of training.
        agree: Where processes share out the model's weights, and so must run its forward in step: given the number of
            slices of logits of each of this process's batches, the largest of all processes for each. None otherwise.

    Attributes:
        tokens_per_batch: The budget that a device out of memory has forced, None while none has.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        plan: ScorePlan,
        autocast: Autocast = nullcontext,
        agree: Agree | None = None,
    ):
        check_scorable(model)
        longest = int(np.diff(plan.documents.document_offsets).max(initial=0))
        _check_length(causal_lm(model).config.get_text_config(), longest)
        self.model, self.plan, self.autocast, self.agree = model, plan, autocast, agree
        self._backbone = Backbone(causal_lm(model))
        self.tokens_per_batch: int | None = None

    def score(self, batches: list[range], advance: Callable[[int], Any] = lambda _: None) -> list[np.ndarray]:
        """Score batches.

        Args:
            batches: Runs of planned documents, each for one forward pass.
            advance: Called after each with the tokens that it had.

        Returns:
            NLL in nats of each batch's label tokens, in the plan's order, float32.
        """
        scores = []
        with torch.no_grad(), eval_mode(self.model):
            if self.agree is None:
                for batch in batches:
                    scores.append(self._score_within_memory(batch))
                    advance(self.plan.num_tokens([batch]))
                return scores
            num_slices = self.agree([self._num_slices(batch) for batch in batches])
            for batch, slices in zip_longest(batches, num_slices):
                scores.append(self._score_batch(batch or range(0), slices))
                advance(self.plan.num_tokens([batch]) if batch else 0)
        return scores[: len(batches)]

    def _score_within_memory(self, batch: range) -> np.ndarray:
        """Scores of a batch, in halves of halves where the device has no memory for it at once."""
        parts = [batch] if self.tokens_per_batch is None else self.plan.split(batch, self.tokens_per_batch)
        scores = []
        for part in parts:
            try:
                scores.append(self._score_batch(part))
                continue
            except torch.OutOfMemoryError:
                if len(part) == 1:
                    raise
                self.tokens_per_batch = self.plan.num_padded_tokens(part) // 2
            # out of the handler, whose traceback holds on to the batch's memory
            torch.cuda.empty_cache()
            logger.warning(
                "Out of memory: scoring goes on with at most %d tokens a forward pass.", self.tokens_per_batch
            )
            scores.append(self._score_within_memory(part))
        return np.concatenate(scores)

    def _score_batch(self, batch: range, num_slices: int | None = None) -> np.ndarray:
        """Scores of a run of planned documents, in order; of none, one token passes the backbone, for no score."""
        plan, documents = self.plan, self.plan.documents
        lengths = plan.lengths[batch.start : batch.stop]
        width = int(lengths.max(initial=1))
        # Right padding only, so that no mask is needed: a causal model's tokens never attend to what follows them.
        input_ids = np.zeros((max(1, len(batch)), width), dtype=np.int64)
        rows, predicting, labels = ([np.zeros(0, np.int64)] for _ in range(3))
        for row, (member, length) in enumerate(zip(plan.members[batch.start : batch.stop], lengths, strict=True)):
            start = documents.document_offsets[member]
            input_ids[row, :length] = documents.input_ids[start : start + length]
            positions = np.flatnonzero(documents.label_mask[start : start + length + 1])
            rows.append(np.full(len(positions), row))
            predicting.append(positions - 1)  # the token at t is predicted at t - 1
            labels.append(documents.labels_at(start + positions))
        lm = causal_lm(self.model)
        needed = np.concatenate(predicting)
        prefix = 0
        if num_slices is None:
            prefix = shared_prefix(input_ids, min(int(needed.min()), most_to_share(lm)), plan.common_prefix)
        with self.autocast():  # at its end the copies that it made of weights are freed
            hidden_states = self._backbone.last_hidden_states(input_ids, prefix)
        skipped = width - hidden_states.shape[1]
        index = np.concatenate(rows) * hidden_states.shape[1] + needed - skipped
        hidden_states = hidden_states.flatten(0, 1).index_select(0, torch.from_numpy(index).to(hidden_states.device))
        label_ids = torch.from_numpy(np.concatenate(labels).astype(np.int64))
        # A head whose weight is shared out among processes is not to be touched.
        with self.autocast(), _head_cast_once(lm) if num_slices is None else nullcontext():
            nll = token_nll(lm, hidden_states, label_ids.to(hidden_states.device), num_slices or 0)
        return nll.cpu().numpy()  # the only wait for the device

    def _num_slices(self, batch: range) -> int:
        num_labels = int(self.plan.offsets[batch.stop] - self.plan.offsets[batch.start])
        return -(-num_labels // _labels_per_slice(causal_lm(self.model)))


def token_nll(
    model: PreTrainedModel, hidden_states: torch.Tensor, labels: torch.Tensor, num_slices: int = 0
) -> torch.Tensor:
    """NLL of labels, given the hidden states that predict them: the model's own head, then a float32 log-softmax.

    Args:
        model: Causal language model (the one with the head, without a PEFT wrapper).
        hidden_states: What the backbone yields at the predicting positions, shape `(N, H)`.
        labels: Token ids, shape `(N,)`.
        num_slices: Times to run the head at least, on nothing where no labels are left.

    Returns:
        NLL in nats, shape `(N,)`, float32, on the device of the hidden states.
    """
    size = _labels_per_slice(model)
    label_nll = _LabelNLL()
    nll = [hidden_states.new_zeros(0, dtype=torch.float32)]
    for start in range(0, len(labels), size):
        logits = _head_logits(model, hidden_states[start : start + size])
        some_labels = labels[start : start + size].to(logits.device)
        rows = size if logits.device.type != "cpu" else max(1, LOGITS_PER_SOFTMAX // logits.shape[-1])
        for part, part_labels in zip(logits.split(rows), some_labels.split(rows), strict=True):
            nll.append(label_nll(part, part_labels).to(hidden_states.device))
    for _ in range(-(-len(labels) // size), num_slices):
        _head_logits(model, hidden_states.new_zeros(1, hidden_states.shape[-1]))
    return torch.cat(nll)


class _LabelNLL:
    """`-log_softmax` of logits `(n, V)` in float32, at the labels `(n,)`.

    On a CPU the float32 values stay in the memory of the first call, which has the largest n: fresh memory so large
    comes from the kernel page by page, at up to ten times the cost of the arithmetic.
    """

    def __init__(self) -> None:
        self._logits = self._log_probs = torch.empty(0)

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if logits.device.type != "cpu":
            return F.cross_entropy(logits.float(), labels, reduction="none")
        if len(self._log_probs) < len(logits):
            self._log_probs = torch.empty(logits.shape, dtype=torch.float32)
        if logits.dtype != torch.float32:
            if len(self._logits) < len(logits):
                self._logits = torch.empty(logits.shape, dtype=torch.float32)
            logits = self._logits[: len(logits)].copy_(logits)
        log_probs = torch.log_softmax(logits, dim=-1, out=self._log_probs[: len(logits)])
        return -log_probs.gather(1, labels[:, None])[:, 0]


def _labels_per_slice(lm: PreTrainedModel) -> int:
    vocab_size = lm.config.get_text_config().vocab_size
    size = LOGITS_PER_SLICE // vocab_size
    if lm.device.type == "cpu":
        labels_in_float32 = min(LABELS_PER_SLICE_ON_CPU, 3 * LOGITS_PER_SLICE // vocab_size)
        size = max(size, labels_in_float32 * torch.float32.itemsize // lm.dtype.itemsize)
    return max(1, size)


def check_scorable(model: Any) -> None:
    """Raise ValueError for a model whose function the scoring forward would not be, saying what to change."""
    lm = causal_lm(model)
    if not isinstance(lm, PreTrainedModel):
        raise ValueError(f"STM cannot score {type(lm).__name__}: it needs a causal language model of transformers.")
    if lm.base_model is lm:
        raise ValueError(
            f"STM cannot score {type(lm).__name__}: it has no backbone apart from its language-model head "
            "(transformers' `base_model`)."
        )
    looks_back_only = any(getattr(module, "is_causal", False) for module in lm.base_model.modules())
    if getattr(lm.config, "is_decoder", None) is False and not looks_back_only:
        raise ValueError(
            f"STM cannot score {type(lm).__name__} with is_decoder=False in its config: tokens see those after them. "
            "For a causal language model, load it with is_decoder=True."
        )
    configs = getattr(model, "peft_config", {})
    for name, config in configs.items():
        if config.is_prompt_learning:
            raise ValueError(
                f"STM cannot score through the virtual tokens of adapter {name!r} ({config.peft_type}): they shift "
                "every position. Use LoRA or another adapter without virtual tokens."
            )
        if getattr(config, "alora_invocation_tokens", None) is not None:
            raise ValueError(
                f"STM cannot score adapter {name!r}, an activated LoRA (alora_invocation_tokens): where it starts to "
                "act differs from row to row. Use a plain LoRA."
            )


def _check_length(config: Any, longest: int) -> None:
    """Raise ValueError for documents whose length changes the rotary embeddings of those that come after them."""
    if "'dynamic'" not in str(getattr(config, "rope_parameters", None)):
        return
    limit = config.max_position_embeddings
    if longest > limit:
        raise ValueError(
            f"STM cannot score documents of {longest} tokens with dynamic rotary embeddings (rope_type 'dynamic'): "
            f"beyond {limit} tokens, what one document is given depends on those before it. Cut documents there "
            "(max_length, sequence_len), or use another rope_type."
        )


def causal_lm(model: Any) -> PreTrainedModel:
    """The model with the language-model head, out of a PEFT wrapper whose layers stay active within it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class LossFacts(NamedTuple):
    """What a model's own loss does.

    Attributes:
        takes_count: It divides by the `num_items_in_batch` it is given.
        shifts_labels: It leaves out the label at position 0, which nothing predicts.
    """

    takes_count: bool
    shifts_labels: bool


def function_takes_count(function: Callable[..., Any], vocab_size: int) -> bool:
    """Whether a trainer's `compute_loss_func` divides by the number of tokens that it is given, tried on four."""
    output = MoeCausalLMOutputWithPast(logits=torch.zeros(1, 4, vocab_size))  # type: ignore[arg-type]
    labels = torch.zeros((1, 4), dtype=torch.long)

    def loss(count: int) -> float:
        return float(function(output, labels.clone(), num_items_in_batch=torch.tensor(count)))

    try:
        with torch.no_grad():
            return math.isclose(loss(1), 2 * loss(2), rel_tol=1e-2)
    except Exception:  # it asks for more than logits
        return False


def loss_facts(model: Any, compute_loss: Callable[[dict[str, Any], torch.Tensor], Any] | None = None) -> LossFacts:
    """Facts about the loss of a model in training, found by running it on four tokens; no backbone runs.

    Args:
        model: Causal language model, with or without adapters.
        compute_loss: What a trainer makes of a batch and its number of tokens; None for the model's own loss.

    Raises:
        ValueError: If there is a loss where no token has a label, so that labels are not what is trained.
    """
    lm = causal_lm(model)
    weight = lm.get_input_embeddings().weight
    token_ids = torch.zeros((1, 4), dtype=torch.long, device=weight.device)
    first_only = token_ids.index_fill(1, torch.arange(1, 4, device=weight.device), IGNORE_INDEX)
    hidden_states = torch.zeros((1, 4, lm.config.get_text_config().hidden_size), dtype=lm.dtype, device=weight.device)
    output = _BackboneOutput(last_hidden_state=hidden_states)
    # A mixture of experts would ask the backbone, which stands aside, for its router.
    keywords = {"output_router_logits": False} if hasattr(lm.config, "output_router_logits") else {}

    def loss(labels: torch.Tensor, count: int) -> float:
        num_items = torch.tensor(count, device=weight.device)
        batch = {"input_ids": token_ids.clone(), "labels": labels.clone()} | keywords
        if compute_loss is None:
            return float(lm(**batch, num_items_in_batch=num_items).loss)
        return float(compute_loss(batch | {"attention_mask": torch.ones_like(token_ids)}, num_items))

    def is_none(value: float) -> bool:
        return math.isnan(value) or value == 0  # a mean over no token is NaN

    of_backbone = set(lm.base_model.parameters())
    head = [weight for weight in lm.parameters() if weight not in of_backbone]
    if lm.get_output_embeddings() is not None:
        head += lm.get_output_embeddings().parameters()  # tied ones are the backbone's too
    head = list(dict.fromkeys(head))  # in the same order on all processes
    with torch.no_grad(), eval_mode(lm), whole(*head), _replaced_forward(lm.base_model, lambda *a, **k: output):
        if compute_loss is not None and not is_none(loss(torch.full_like(token_ids, IGNORE_INDEX), 1)):
            raise ValueError("there is a loss where no token has a label")
        takes_count = math.isclose(loss(token_ids, 1), 2 * loss(token_ids, 2), rel_tol=1e-2)
        return LossFacts(takes_count, is_none(loss(first_only, 1)))


@contextmanager
def eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode (no dropout, no NEFTune, no gradient checkpointing); every module's own flag comes back after."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    for module, _ in flags:
        if repacks_weights_in_eval_mode(module):
            module.training = True
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def _head_cast_once(lm: PreTrainedModel) -> Iterator[None]:
    """Let autocast keep its copy of the head's weight from slice to slice, as it keeps those of trainable weights."""
    weight = getattr(lm.get_output_embeddings(), "weight", None)
    if not isinstance(weight, torch.nn.Parameter) or not weight.is_floating_point() or weight.requires_grad:
        yield
        return
    weight.requires_grad_(True)
    try:
        yield
    finally:
        weight.requires_grad_(False)


class _BackboneOutput(MoeModelOutputWithPast):
    """Hidden states in the place of a backbone's output; whatever else a model looks for there is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


def _head_logits(lm: PreTrainedModel, hidden_states: torch.Tensor) -> torch.Tensor:
    """Logits `(n, V)` of hidden states `(n, H)`, as the model's own forward makes them.

    The forward runs with its backbone standing aside, so that each architecture's scaling, soft-capping, bias and head
    adapter apply in its own order and dtype.
    """
    output = _BackboneOutput(last_hidden_state=hidden_states[None])
    num_calls = 0

    def backbone(*args: Any, **kwargs: Any) -> _BackboneOutput:
        nonlocal num_calls
        num_calls += 1
        return output

    token_ids = torch.zeros((1, len(hidden_states)), dtype=torch.long, device=hidden_states.device)
    with _replaced_forward(lm.base_model, backbone):
        logits: torch.Tensor = lm(input_ids=token_ids, use_cache=False, return_dict=True).logits
    if num_calls != 1 or logits.shape[:2] != token_ids.shape:
        raise ValueError(
            f"STM cannot score {type(lm).__name__}: its forward does not run its backbone once and its head on every "
            "position (a compiled model, or an architecture of another kind)."
        )
    return logits[0]


@contextmanager
def _replaced_forward(module: torch.nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Give a module another forward, over any that an instance attribute (accelerate, TRL, Liger) already gives it.

    Its hooks and its compiled form, which belong to its own forward, stand aside too.
    """
    attributes = vars(module)
    replaced = {"forward": forward, "_forward_hooks": {}, "_forward_pre_hooks": {}, "_compiled_call_impl": None}
    before = {name: attributes[name] for name in replaced if name in attributes}
    attributes.update(replaced)
    try:
        yield
    finally:
        for name in replaced:
            del attributes[name]
        attributes.update(before)
