"""Training one run of an experiment: TRL's and peft's objects made of its settings."""

import json
import math
import time
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from peft import LoraConfig
from transformers import AutoTokenizer, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

from ..constants import RECEIPT_NAME
from ..demo.model import MODEL_ID
from ..kl import KLSFTConfig, KLSFTTrainer
from ..measures.inputs import as_chats, read_rows, with_template_columns
from ..options import REFERENCE_CURRENT
from ..scoring.documents import Documents
from ..trl import STMSFTConfig, STMSFTTrainer
from .checks import check_keys
from .config import RunName
from .generating import generated_path
from .models import model_folder
from .preparing import ScoringClock, scores_entries
from .results import finite_or_none, model_path
from .settings import Settings

_CLASSES = {
    "plain": (SFTConfig, SFTTrainer),
    "stm": (STMSFTConfig, STMSFTTrainer),
    "kl": (KLSFTConfig, KLSFTTrainer),
}
_DEFAULTS = {"report_to": [], "save_strategy": "no", "disable_tqdm": True}

_RECEIPT_FACTS = (
    "threshold",
    "threshold_nats",
    "mask_fraction",
    "strategy",
    "reference",
    "label_tokens",
    "masked_tokens",
    "masked_fraction",
    "stop_tokens",
    "stop_tokens_masked",
    "rows",
    "rows_without_kept_tokens",
    "dtype",
    "autocast",
    "normalization",
    "mask_digest",
)


class Parts(NamedTuple):
    """What a trainer is made of.

    Attributes:
        trainer_class: TRL's trainer, or one of ours.
        args: Its config.
        peft_config: Config of the fresh adapter; None for full fine-tuning.
    """

    trainer_class: Any
    args: Any
    peft_config: LoraConfig | None


def make_parts(settings: Settings, output_dir: Path, output: Path, **overrides: Any) -> Parts:
    """The trainer's class, config and adapter of a run.

    Args:
        settings: The run's settings.
        output_dir: Where the trained model goes.
        output: Folder of the experiment's results, where all STM runs keep their scores and find tuned models.
        **overrides: Fields of the config that win.

    Raises:
        ValueError: For a field that TRL or peft lack, or a value that they refuse.
    """
    config_class, trainer_class = _CLASSES[settings["kind"]]
    where = f"in arms.{settings['arm']}"
    training, options = settings["training"], dict(settings["options"])
    check_keys(training, _names(SFTConfig), f"{where}: training")
    if settings["kind"] == "stm":
        if options.get("stm_threshold") == "inf":
            options["stm_threshold"] = math.inf
        if options.get("stm_reference") == MODEL_ID:
            options["stm_reference"] = model_folder(MODEL_ID)
        if options.get("stm_reference") != REFERENCE_CURRENT:
            options.setdefault("stm_scores_dir", str(output / "scores"))
        tuned = settings["tuned_run"]
        if tuned is not None:
            run = RunName(tuned["arm"], tuned["seed"])
            option = "stm_reference" if options.get("stm_tuned_model") is None else "stm_tuned_model"
            assert options[option] == str(run)
            options[option] = str(model_path(output, run))
        if options.get("stm_strategy") == "random":
            options.setdefault("stm_seed", settings["seed"])
    fixed = {
        "output_dir": str(output_dir),
        "seed": settings["seed"],
        "model_init_kwargs": {"dtype": settings["training_dtype"]} | (training.get("model_init_kwargs") or {}),
    }
    try:
        args = config_class(**{**_DEFAULTS, **training, **options, **fixed, **overrides})
        peft_config = None
        if settings["lora"] is not None:
            check_keys(settings["lora"], _names(LoraConfig), f"{where}: lora")
            peft_config = LoraConfig(**{"task_type": "CAUSAL_LM", **settings["lora"]})
    except (TypeError, ValueError) as error:
        message = str(error)
        raise ValueError(message if message.startswith(where) else f"{where}: {message}") from error
    return Parts(trainer_class, args, peft_config)


def _names(kind: Any) -> list[str]:
    return [option.name for option in fields(kind) if option.init]


def check_arms(all_settings: Iterable[Settings], **overrides: Any) -> None:
    """Raise ValueError for the first run whose settings TRL, peft or STM refuse."""
    for settings in all_settings:
        make_parts(settings, Path("unused"), Path("unused"), **overrides)


def training_rows(settings: Settings, data: Path, output: Path) -> list[dict[str, Any]]:
    """The run's rows as their file has them."""
    return read_rows(training_file(settings, data, output))[: settings["rows"]]


def training_file(settings: Settings, data: Path, output: Path) -> Path:
    """The file of a run's rows: in the data folder, or among what the experiment generates."""
    name: str = settings["data"]
    return data / name if settings["generated"] is None else generated_path(output, name)


def train(settings: Settings, data: Path, folder: Path, output: Path) -> None:
    """Train a run; the model and what there is to say of its training (`train.json`) go into a folder.

    Args:
        settings: The run's settings.
        data: Folder of the data.
        folder: Where the model goes, into `model`.
        output: Folder of the experiment's results.
    """
    from datasets import Dataset

    parts = make_parts(settings, folder / "model", output)
    rows = training_rows(settings, data, output)
    if not parts.args.assistant_only_loss:
        chats = as_chats(rows, settings["data"])
    else:
        chats = with_template_columns([{"messages": row["messages"]} for row in rows], rows, settings["data"])
    path = model_folder(settings["model"])
    set_seed(settings["seed"])  # TRL 1.9 seeds only after it has made the adapter, whose A matrices are random
    trainer = parts.trainer_class(
        path,
        args=parts.args,
        train_dataset=Dataset.from_list(chats),
        processing_class=AutoTokenizer.from_pretrained(path),
        peft_config=parts.peft_config,
    )
    label_tokens = Documents.from_dataset(trainer.train_dataset).num_label_tokens
    is_scored = settings["kind"] == "stm" and parts.args.stm_reference != REFERENCE_CURRENT
    is_main = trainer.is_world_process_zero()
    scoring = ScoringClock(Path(parts.args.stm_scores_dir), output) if is_scored and is_main else None
    clock = _StartOfSteps(scoring)
    trainer.add_callback(clock)
    started = time.monotonic()
    trainer.train()
    ended = time.monotonic()
    trainer.save_model(str(folder / "model"))
    if not is_main:
        return
    facts = {
        "steps": trainer.state.global_step,
        "label_tokens": label_tokens,
        "masks": _masks(settings, folder / "model") if settings["kind"] == "stm" else None,
        "losses": [
            [entry["step"], finite_or_none(entry["loss"])] for entry in trainer.state.log_history if "loss" in entry
        ],
        "scoring": ("made" if clock.made_scores else "found") if is_scored else None,
        "seconds": {
            "scoring": round(clock.time - started, 1) if is_scored else 0.0,
            "training": round(ended - clock.time, 1),
        },
        "scores_entries": scores_entries(folder / "model") if is_scored else [],
        "max_length": parts.args.max_length,
    }
    (folder / "train.json").write_text(json.dumps(facts), encoding="utf-8")


class _StartOfSteps(TrainerCallback):
    """Notes when scoring is done and the first step comes."""

    time = 0.0
    made_scores = False

    def __init__(self, scoring: ScoringClock | None) -> None:
        self.scoring = scoring

    def on_train_begin(self, *args: Any, **keywords: Any) -> None:
        self.time = time.monotonic()
        if self.scoring is not None:
            self.made_scores = self.scoring.stop()


def _masks(settings: Settings, folder: Path) -> dict[str, Any]:
    receipt = json.loads((folder / RECEIPT_NAME).read_text(encoding="utf-8"))
    facts = {name: receipt[name] for name in _RECEIPT_FACTS if name in receipt}
    # by their names in the experiment, not by where they are on this machine
    names = {"reference": "stm_reference", "tuned_model": "stm_tuned_model"}
    return facts | {
        name: settings["options"][option] for name, option in names.items() if option in settings["options"]
    }
