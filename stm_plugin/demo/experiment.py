"""The demo's experiment: plain SFT and STM with the same data, seed, order and steps, then drift and weight change."""

import gc
import json
import math
import os
import platform
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import __version__
from ..constants import DEFAULT_THRESHOLD, IGNORE_INDEX, RECEIPT_NAME
from ..options import check_threshold
from .data import Chat, training_chats
from .model import ModelFolder, find_model
from .prompts import GENERAL_PROMPTS
from .results import ArmResults, DemoResults, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..measures.drift import Drift

# As the paper's script has it: LoRA of rank 16 on all linear layers, batch 1, 512 tokens, cosine. The learning rate is
# ten times the paper's 2e-5, for about a tenth of its steps.
LORA_RANK = 16
LORA_ALPHA = 32
LORA_DROPOUT = 0.05
LEARNING_RATE = 2e-4
WARMUP_FRACTION = 0.1
MAX_LENGTH = 512

TITLES = {"plain": "plain SFT", "stm": "STM"}
REDACTED = "[REDACTED]"

_NUM_LOGS = 4
_SAMPLE_TOKENS = range(40, 121)
"""Length of the answer that is shown, in tokens."""
_PACKAGES = ("torch", "transformers", "trl", "peft")

Say = Callable[[str], None]


class DemoOptions(NamedTuple):
    """What a run of the demo can vary.

    Attributes:
        output_dir: Folder for adapters and scores.
        model: Folder or hub id of the model; None is the demo's own.
        rows: Training chats.
        max_new_tokens: Length of the answers that drift is measured on.
        threshold: Perplexity above which STM masks; None is the paper's 2.5.
        seed: Seed of data, adapter and order.
    """

    output_dir: Path
    model: str | None
    rows: int
    max_new_tokens: int
    threshold: float | None
    seed: int


class TrainedArm(NamedTuple):
    """One finished training run.

    Attributes:
        folder: Folder of the adapter.
        input_ids: Token ids of each row.
        labels: Labels of each row as trained.
        losses: Mean training loss over each quarter of the run, nats per kept token.
        scoring_seconds: Time until the first step.
        seconds: Time of the whole run.
        steps: Optimizer steps.
    """

    folder: Path
    input_ids: list[list[int]]
    labels: list[list[int]]
    losses: list[float]
    scoring_seconds: float
    seconds: float
    steps: int


def run_experiment(options: DemoOptions, say: Say) -> DemoResults:
    """Trains both arms, measures them and returns the results; adapters stay in `options.output_dir`.

    Args:
        options: The settings.
        say: Takes one line of progress at a time.

    Returns:
        The results.

    Raises:
        ModelNotFoundError: The model is nowhere to be had.
        ValueError: An option has a value that is not allowed.
    """
    started = time.monotonic()
    if options.threshold is not None:
        check_threshold(options.threshold)
    chats = training_chats(options.rows, options.seed)
    say("Looking for the model (a first run may have to download it) ...")
    model = find_model(options.model)
    with warnings.catch_warnings():
        # Upstream's notes to itself about names it will rename are no concern of someone who runs a demo.
        warnings.simplefilter("ignore", FutureWarning)
        return _run(options, model, chats, say, started)


def _run(options: DemoOptions, model: ModelFolder, chats: list[Chat], say: Say, started: float) -> DemoResults:
    """The experiment proper, once model and data are there."""
    import datasets
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    from ..answers import greedy_answers

    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    say(f"Model: {model.name}, from: {model.origin}")
    say(f"Data: {len(chats)} functions of the standard library of Python {platform.python_version()}")

    tokenizer = AutoTokenizer.from_pretrained(model.path)
    initial = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32)
    say(f"The initial model answers {len(GENERAL_PROMPTS)} general prompts ...")
    answers = greedy_answers(initial, tokenizer, GENERAL_PROMPTS, options.max_new_tokens, len(GENERAL_PROMPTS))

    trained = {arm: _train(arm, model.path, chats, options, say) for arm in TITLES}
    if len(trained["plain"].labels) != len(chats):
        raise ValueError(
            f"with this model's tokenizer, {len(chats) - len(trained['plain'].labels)} of {len(chats)} requests fill "
            f"all {MAX_LENGTH} tokens and leave none for the answer. Choose another --model."
        )
    arms: dict[str, ArmResults] = {}
    for arm, run in trained.items():
        say(f"Measuring {TITLES[arm]} ...")
        drift, change = _measure(initial, model.path, run.folder, answers)
        arms[arm] = _arm_results(arm, run, trained["plain"].labels, drift, change)
    return DemoResults(
        arms=arms,
        drift_prompts=list(GENERAL_PROMPTS),
        drift_tokens=sum(len(row.input_ids) - row.num_prompt_tokens for row in answers),
        machine={"cores": _num_cores(), "platform": f"{platform.system()} {platform.machine()}"},
        model={"name": model.name, "origin": model.origin},
        options=_settings(options),
        sample=_sample(trained, chats, tokenizer),
        seconds=round(time.monotonic() - started, 1),
        versions={"python": platform.python_version(), "stm_plugin": __version__}
        | {package: version(package) for package in _PACKAGES},
    )


def _train(arm: str, model_path: Path, chats: list[Chat], options: DemoOptions, say: Say) -> TrainedArm:
    """Trains one arm and saves its adapter; but for the trainer's class, both arms run the same lines."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, ProgressCallback, set_seed
    from trl import SFTConfig, SFTTrainer

    from .. import STMSFTConfig, STMSFTTrainer
    from .progress import Progress

    folder = options.output_dir / arm
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 1,
        "num_train_epochs": 1,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "cosine",
        "warmup_steps": math.ceil(WARMUP_FRACTION * len(chats)),
        "max_length": MAX_LENGTH,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "seed": options.seed,
        "logging_steps": math.ceil(len(chats) / _NUM_LOGS),
        "save_strategy": "no",
        "report_to": [],
    }
    config_class, trainer_class = SFTConfig, SFTTrainer
    if arm == "stm":
        config_class, trainer_class = STMSFTConfig, STMSFTTrainer
        # Scores of an earlier demo would make the arm's time look shorter than it is.
        scores = folder / "scores"
        shutil.rmtree(scores, ignore_errors=True)
        settings |= {"stm_threshold": options.threshold, "stm_scores_dir": str(scores)}
    # TRL 1.9 seeds only after it has made the adapter, whose A matrices are random.
    set_seed(options.seed)
    trainer = trainer_class(
        model=AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32),
        args=config_class(**settings),
        train_dataset=Dataset.from_list(chats),
        processing_class=AutoTokenizer.from_pretrained(model_path),
        peft_config=LoraConfig(
            r=LORA_RANK,
            lora_alpha=LORA_ALPHA,
            lora_dropout=LORA_DROPOUT,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    progress = Progress(TITLES[arm], say)
    trainer.add_callback(progress)
    started = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - started
    trainer.save_model(str(folder))
    batches = [trainer.data_collator([row]) for row in trainer.train_dataset]
    return TrainedArm(
        folder=folder,
        input_ids=[batch["input_ids"][0].tolist() for batch in batches],
        labels=[batch["labels"][0].tolist() for batch in batches],
        losses=progress.losses,
        scoring_seconds=progress.train_begin - started,
        seconds=seconds,
        steps=trainer.state.global_step,
    )


def _measure(initial: Any, model_path: Path, adapter: Path, answers: Sequence[Any]) -> tuple["Drift", float]:
    """Drift and weight change of a saved adapter."""
    import torch
    from transformers import AutoModelForCausalLM

    from ..loading import with_adapter
    from ..measures.drift import measure_drift
    from ..measures.weight_change import adapter_change_norm

    gc.collect()  # a trainer is a cycle: its model goes only now
    base = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    tuned = with_adapter(base, str(adapter))
    return measure_drift(initial, tuned, answers), adapter_change_norm(tuned)


def _arm_results(
    arm: str, run: TrainedArm, plain_labels: list[list[int]], drift: "Drift", weight_change: float
) -> ArmResults:
    """The figures of one arm; STM's counts are those of its receipt."""
    label_tokens = sum(_num_labels(labels) for labels in plain_labels)
    masked_tokens = 0
    threshold: float | str | None = None
    if arm == "stm":
        receipt = json.loads((run.folder / RECEIPT_NAME).read_text(encoding="utf-8"))
        threshold, masked_tokens = receipt["threshold"], receipt["masked_tokens"]
        assert receipt["label_tokens"] == label_tokens, "both arms must start from the same label tokens"
    assert masked_tokens == label_tokens - sum(_num_labels(labels) for labels in run.labels)
    return ArmResults(
        adapter=run.folder.name,
        drift_nats_per_prompt=[row.sum_nats / row.num_tokens for row in drift.rows],
        drift_nats_per_token=drift.mean,
        label_tokens=label_tokens,
        losses=run.losses,
        masked_fraction=masked_tokens / label_tokens,
        masked_tokens=masked_tokens,
        scoring_seconds=round(run.scoring_seconds, 1),
        seconds=round(run.seconds, 1),
        steps=run.steps,
        threshold=threshold,
        title=TITLES[arm],
        weight_change_l2=weight_change,
    )


def _settings(options: DemoOptions) -> dict[str, str | int | float]:
    """The settings of a run, as `results.json` has them."""
    threshold = DEFAULT_THRESHOLD if options.threshold is None else options.threshold
    return {
        "dtype": "float32",
        "epochs": 1,
        "learning_rate": LEARNING_RATE,
        "lora_alpha": LORA_ALPHA,
        "lora_dropout": LORA_DROPOUT,
        "lora_rank": LORA_RANK,
        "max_length": MAX_LENGTH,
        "max_new_tokens": options.max_new_tokens,
        "micro_batch": 1,
        "rows": options.rows,
        "seed": options.seed,
        "stm_threshold": "inf" if math.isinf(threshold) else threshold,
        "warmup_fraction": WARMUP_FRACTION,
    }


def _sample(trained: dict[str, TrainedArm], chats: Sequence[Chat], tokenizer: "PreTrainedTokenizerBase") -> Sample:
    """The answer of handy length whose share of masked tokens is nearest to that of the whole set."""
    plain, stm = trained["plain"].labels, trained["stm"].labels
    counts = [(_num_labels(p), _num_labels(p) - _num_labels(s)) for p, s in zip(plain, stm, strict=True)]
    share = sum(masked for _, masked in counts) / sum(total for total, _ in counts)
    handy = [row for row, (total, _) in enumerate(counts) if total in _SAMPLE_TOKENS] or range(len(counts))
    row = min(handy, key=lambda row: abs(counts[row][1] / counts[row][0] - share))
    return Sample(
        answer=chats[row]["completion"][0]["content"],
        label_tokens=counts[row][0],
        masked_tokens=counts[row][1],
        redacted=redact(trained["stm"].input_ids[row], plain[row], stm[row], tokenizer),
        request=chats[row]["prompt"][0]["content"],
    )


def redact(
    input_ids: list[int], labels: list[int], masked_labels: list[int], tokenizer: "PreTrainedTokenizerBase"
) -> str:
    """The answer of a row as text, with each run of masked tokens as one `[REDACTED]`.

    Args:
        input_ids: Token ids of the row.
        labels: Its labels before masking.
        masked_labels: Its labels after masking.
        tokenizer: The tokenizer.

    Returns:
        The text of the label tokens.
    """
    positions = [i for i, label in enumerate(labels) if label != IGNORE_INDEX]
    pieces = []
    for is_masked, run in groupby(positions, key=lambda i: masked_labels[i] == IGNORE_INDEX):
        pieces.append(REDACTED if is_masked else tokenizer.decode([input_ids[i] for i in run]))
    return "".join(pieces)


def _num_labels(labels: list[int]) -> int:
    return sum(label != IGNORE_INDEX for label in labels)


def _num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
