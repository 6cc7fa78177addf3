"""`stm sft`: TRL's supervised fine-tuning script with Selective Token Masking.

Takes the flags of `trl sft`, or the same in YAML with `--config`, and the STM options beside them. For several
processes: `accelerate launch -m stm_plugin.sft --config run.yaml`.
"""

import os
import sys
from pathlib import Path
from typing import Any

_LOADERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


def main(argv: list[str] | None = None) -> None:
    """Train as the command line says.

    Args:
        argv: Arguments; None for the process's own.
    """
    train(*parse(list(sys.argv[1:] if argv is None else argv)))


def parse(arguments: list[str]) -> tuple[Any, Any, Any, Any]:
    """TRL's argument objects (script, training, model, mixture) that a command line, or its YAML, spells out."""
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

    from .trl import STMSFTConfig

    parser = TrlParser((ScriptArguments, STMSFTConfig, ModelConfig, DatasetMixtureConfig), prog="stm sft")
    return parser.parse_args_and_config(args=arguments)


def train(script_args: Any, training_args: Any, model_args: Any, mixture_args: Any) -> None:
    """Train with TRL's argument objects, as its own script does; the model is saved to `output_dir`."""
    trainer = make_trainer(script_args, training_args, model_args, mixture_args)
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)


def make_trainer(script_args: Any, training_args: Any, model_args: Any, mixture_args: Any) -> Any:
    """The trainer that `stm sft` trains with."""
    from trl import get_peft_config, get_quantization_config

    from .trl import STMSFTTrainer

    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    } | (training_args.model_init_kwargs or {})
    dataset = load_splits(script_args, mixture_args)
    evaluating = training_args.eval_strategy != "no"
    trainer = STMSFTTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=_split(dataset, script_args.dataset_train_split, "--dataset_train_split"),
        eval_dataset=_split(dataset, script_args.dataset_test_split, "--dataset_test_split") if evaluating else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    if script_args.dataset_name and not mixture_args.datasets:
        trainer._stm_data_name = Path(script_args.dataset_name).stem
    return trainer


def load_splits(script_args: Any, mixture_args: Any) -> Any:
    """The data of TRL's script arguments: a mixture, a hub id, or a local JSON, Parquet or CSV file.

    Raises:
        ValueError: If neither a mixture nor a name is given.
    """
    from datasets import load_dataset
    from trl import get_dataset

    name = script_args.dataset_name
    if mixture_args.datasets:
        return get_dataset(mixture_args)
    if not name:
        raise ValueError("No data: give --dataset_name a hub id or a local .jsonl file, or a `datasets` list in YAML.")
    loader = _LOADERS.get(Path(name).suffix.lower())
    if loader is not None and os.path.isfile(name):
        return load_dataset(loader, data_files=name, streaming=script_args.dataset_streaming)
    return load_dataset(name, name=script_args.dataset_config, streaming=script_args.dataset_streaming)


def _split(dataset: Any, split: str, flag: str) -> Any:
    if split not in dataset:
        raise ValueError(f"The data has no split {split!r}, it has {sorted(dataset)}. Name one of them with {flag}.")
    return dataset[split]


if __name__ == "__main__":
    main()
