"""What the tests of the TRL trainer share: set-ups, a trainer that records, and an oracle that shares no code."""

import copy
import gc
import hashlib
import itertools
import math

import datasets
import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM, TrainerCallback
from trl import SFTConfig, SFTTrainer

from stm_plugin.trl import STMSFTConfig, STMSFTTrainer

IGNORE = -100
MARGIN = 1e-4
"""Nats around a threshold in which no oracle score may lie."""

datasets.disable_progress_bars()
gc.freeze()  # accelerate collects garbage at every train(); the imported modules need not be walked each time


@pytest.fixture(autouse=True)
def one_thread():
    """Models of 32 hidden units run several times faster on one thread than on two busy cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def settings(output_dir, **options):
    """Fast defaults for a config, as keywords."""
    return {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "per_device_train_batch_size": 3,
        "num_train_epochs": 1,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": False,
    } | options


def stm_config(output_dir, **options):
    return STMSFTConfig(**settings(output_dir, **options))


def plain_config(output_dir, **options):
    return SFTConfig(**settings(output_dir, **options))


def as_dataset(rows):
    return rows if isinstance(rows, datasets.Dataset | datasets.IterableDataset) else datasets.Dataset.from_list(rows)


def stm_trainer(model, rows, tokenizer, output_dir, trainer=None, trainer_class=STMSFTTrainer, **options):
    """An `STMSFTTrainer` with its own copy of the tokenizer; `trainer` are keywords of the trainer itself."""
    return trainer_class(
        model,
        stm_config(output_dir, **options),
        train_dataset=as_dataset(rows),
        processing_class=copy.deepcopy(tokenizer),
        **(trainer or {}),
    )


def plain_trainer(model, rows, tokenizer, output_dir, trainer=None, trainer_class=SFTTrainer, **options):
    """The `SFTTrainer` of the same set-up; STM's own options are dropped."""
    options = {name: value for name, value in options.items() if not name.startswith("stm_")}
    return trainer_class(
        model,
        plain_config(output_dir, **options),
        train_dataset=as_dataset(rows),
        processing_class=copy.deepcopy(tokenizer),
        **(trainer or {}),
    )


class Recording:
    """Left of a trainer: keeps a copy of what each micro-batch, each gradient and each random state was."""

    def __init__(self, *args, **kwargs):
        self.batches, self.items, self.gradients, self.losses, self.random_states = [], [], [], [], []
        super().__init__(*args, **kwargs)
        self.add_callback(_KeepGradients(self))

    def training_step(self, model, inputs, num_items_in_batch=None):
        kept = {k: v.clone() if torch.is_tensor(v) else copy.copy(v) for k, v in inputs.items()}
        self.batches.append(kept)
        self.items.append(num_items_in_batch)
        self.random_states.append(hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest())
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.losses.append(float(loss))
        return loss


class _KeepGradients(TrainerCallback):
    def __init__(self, trainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.gradients.append(
            {n: p.grad.detach().clone() for n, p in self.trainer.model.named_parameters() if p.grad is not None}
        )


class RecordingSTM(Recording, STMSFTTrainer):
    """`STMSFTTrainer` that records."""


class RecordingSFT(Recording, SFTTrainer):
    """`SFTTrainer` that records."""


class CountTokens:
    """Counts forward passes and their tokens, and in which mode they were, while a model is hooked."""

    def __init__(self, model):
        self.calls, self.tokens, self.training = 0, 0, []
        # The embedding, since STM runs the head apart, through a backbone that stands aside.
        self.handle = model.get_input_embeddings().register_forward_pre_hook(self._count)

    def _count(self, module, args):
        self.calls += 1
        self.tokens += args[0].numel()
        self.training.append(module.training)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.handle.remove()


class NoLossArguments(LlamaForCausalLM):
    """A model whose loss takes no count of tokens, as Gemma 3's and Qwen 2.5's with vision do not."""

    accepts_loss_kwargs = False

    @classmethod
    def like(cls, model):
        """The same weights in a model of this class."""
        made = cls(model.config)
        made.load_state_dict(model.state_dict())
        return made


# --- The oracle ---------------------------------------------------------------------------------------------------


def cut(row):
    """(start, end) of each document of a row of a data set: its `seq_lengths`, or the whole row."""
    lengths = row.get("seq_lengths") or [len(row["input_ids"])]
    ends = list(np.cumsum(lengths))
    assert ends[-1] == len(row["input_ids"])
    return [(int(end - length), int(end)) for end, length in zip(ends, lengths, strict=True) if length]


def float64_logits(model, ids):
    """Full logits of one document, from a float64 copy of a model that is cached on it."""
    double = model.__dict__.get("_oracle")
    if double is None:
        double = model.__dict__["_oracle"] = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        return double(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0].double()


def nll_of_row(row, logits_of):
    """NLL of each position's label, NaN where there is no label token: one plain loop per document."""
    nll = [math.nan] * len(row["input_ids"])
    labels = row.get("labels") or row["input_ids"]
    for start, end in cut(row):
        logits = logits_of(row["input_ids"][start:end])
        log_probs = torch.log_softmax(logits.double(), -1)
        for t in range(start + 1, end):
            if labels[t] != IGNORE:
                nll[t] = -float(log_probs[t - 1 - start, labels[t]])
    return nll


def oracle_nll(dataset, model=None, logits_of=None):
    """NLL of all rows of a plain trainer's data set, by the model's own full logits in float64."""
    logits_of = logits_of or (lambda ids: float64_logits(model, ids))
    cache = {}

    def cached(ids):
        if tuple(ids) not in cache:
            cache[tuple(ids)] = logits_of(ids)
        return cache[tuple(ids)]

    return [nll_of_row(row, cached) for row in dataset]


def scores_of(nll):
    """All scores as one flat array."""
    flat = np.array([value for row in nll for value in row])
    return flat[~np.isnan(flat)]


def threshold_between(nll, share=0.3, margin=MARGIN):
    """A perplexity that masks about a share of the tokens, in the widest gap of scores there; asserts margin."""
    flat = np.sort(scores_of(nll))
    at = int(len(flat) * (1 - share))
    low, high = max(1, at - len(flat) // 10), min(len(flat) - 1, at + len(flat) // 10)
    gaps = flat[low : high + 1] - flat[low - 1 : high]
    best = low + int(np.argmax(gaps))
    threshold = math.exp((flat[best - 1] + flat[best]) / 2)
    assert_margin(flat, math.log(threshold), margin)
    return threshold


def assert_margin(flat, nats, margin=MARGIN):
    distance = np.abs(np.asarray(flat) - nats).min()
    assert distance > margin, f"the test's threshold lies {distance} nats from a score: choose another"


def masked_rows(dataset, nll, nats):
    """The oracle's final labels of `strategy=high`."""
    return [
        [
            IGNORE if not math.isnan(value) and value > nats else label
            for label, value in zip(_labels(row), values, strict=True)
        ]
        for row, values in zip(dataset, nll, strict=True)
    ]


def _labels(row):
    return row.get("labels") or list(row["input_ids"])


def oracle_digest(dataset, labels):
    """`mask_digest` as DESIGN.md spells it."""
    hashes = []
    for row, row_labels in zip(dataset, labels, strict=True):
        for start, end in cut(row):
            ids = np.array(row["input_ids"][start:end], dtype="<i8").tobytes()
            hashes.append(hashlib.sha256(ids + np.array(row_labels[start:end], dtype="<i8").tobytes()).digest())
    return hashlib.sha256(b"".join(sorted(hashes))).hexdigest()


def kept_gradient(model, documents):
    """Gradient of `sum of kept nll / max(1, number kept)` over documents of (ids, labels), in float64.

    Works on a float64 copy; `-100` at position 0 or a label there counts for nothing.
    """
    double = copy.deepcopy(model).double().eval()
    double.zero_grad()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for ids, labels in documents:
        positions = [t for t in range(1, len(ids)) if labels[t] != IGNORE]
        if not positions:
            continue
        log_probs = torch.log_softmax(double(input_ids=torch.tensor([ids]), use_cache=False).logits[0], -1)
        total = total - sum(log_probs[t - 1, labels[t]] for t in positions)
        count += len(positions)
    if count:
        (total / count).backward()
    return {
        name: parameter.grad.detach() if parameter.grad is not None else torch.zeros_like(parameter)
        for name, parameter in double.named_parameters()
        if parameter.requires_grad
    }, float(total.detach()) / max(1, count)


def documents_of_batches(batches):
    """(ids, labels) of every document in collated micro-batches, by attention mask or position ids."""
    documents = []
    for batch in batches:
        if "attention_mask" in batch:
            for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
                real = mask.bool()
                assert (labels[~real] == IGNORE).all(), "a label on padding"
                documents.append((ids[real].tolist(), labels[real].tolist()))
        else:
            ids, labels, positions = (batch[k].flatten().tolist() for k in ("input_ids", "labels", "position_ids"))
            starts = [i for i, p in enumerate(positions) if p == 0] + [len(ids)]
            documents += [(ids[a:b], labels[a:b]) for a, b in itertools.pairwise(starts)]
    return documents


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same_bits(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def history(trainer, *names):
    """Values of logged metrics, in order."""
    return [tuple(entry[name] for name in names) for entry in trainer.state.log_history if names[0] in entry]


def label_rows(tokenizer, count=8, seed=0):
    """Ready rows whose labels are on in patches; even rows train their position 0 too."""
    draw = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        ids = draw.integers(3, len(tokenizer), size=10 + 3 * (i % 5)).tolist()
        on = draw.random(len(ids)) < 0.6
        on[0], on[-1] = i % 2 == 0, True
        rows.append(
            {"input_ids": ids, "labels": [token if flag else IGNORE for token, flag in zip(ids, on, strict=True)]}
        )
    return rows


def all_masked_row(row, nll_of_ids, lowest):
    """The row with only those labels whose score exceeds `lowest` nats."""
    full = {"input_ids": row["input_ids"], "labels": list(row["input_ids"])}
    nll = nll_of_ids(full)
    labels = [
        label if not math.isnan(value) and value > lowest else IGNORE
        for label, value in zip(full["labels"], nll, strict=True)
    ]
    assert any(label != IGNORE for label in labels)
    return {"input_ids": row["input_ids"], "labels": labels}
