"""`stm sft`: TRL's supervised fine-tuning script with Selective Token Masking.

Takes the flags of `trl sft`, or the same in YAML with `--config`, and the STM options beside them. For several
processes: `accelerate launch -m stm_plugin.sft --config run.yaml`.
"""

import os
import sys
from pathlib import Path
from typing import Any

from .loading import base_of, is_adapter, tokenizer_source, with_adapter

_LOADERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


def main(argv: list[str] | None = None) -> None:
    """Train as the command line says.

    Args:
        argv: Arguments; None for the process's own.
    """
    train(*parse(list(sys.argv[1:] if argv is None else argv)))


def parse(arguments: list[str]) -> tuple[Any, Any, Any, Any]:
    """TRL's argument objects (script, training, model, mixture) that a command line, or its YAML, spells out."""
    return make_parser("stm sft").parse_args_and_config(args=arguments)


def make_parser(prog: str, *more_arguments: type) -> Any:
    """TRL's parser of its script's flags, the STM options and further dataclasses of flags; `--config` reads YAML."""
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

    from .trl import STMSFTConfig

    dataclasses = (ScriptArguments, STMSFTConfig, ModelConfig, DatasetMixtureConfig, *more_arguments)
    return TrlParser(dataclasses, prog=prog)


def train(script_args: Any, training_args: Any, model_args: Any, mixture_args: Any) -> None:
    """Train with TRL's argument objects, as its own script does; the model is saved to `output_dir`."""
    trainer = make_trainer(script_args, training_args, model_args, mixture_args)
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)


def make_trainer(script_args: Any, training_args: Any, model_args: Any, mixture_args: Any) -> Any:
    """The `STMSFTTrainer` of TRL's argument objects.

    Raises:
        ValueError: For no model, no data, or a split that the data does not have.
    """
    from trl import get_peft_config, get_quantization_config

    from .trl import STMSFTTrainer

    if not model_args.model_name_or_path:
        raise ValueError("No model: give --model_name_or_path a folder or a hub id, of a model or of an adapter.")
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    } | (training_args.model_init_kwargs or {})
    dataset = load_splits(script_args, mixture_args)
    train_dataset = _split(dataset, script_args.dataset_train_split, "--dataset_train_split")
    eval_dataset = None
    if training_args.eval_strategy != "no":
        eval_dataset = _split(dataset, script_args.dataset_test_split, "--dataset_test_split")
    quantization = get_quantization_config(model_args)
    model = load_with_adapter(model_args.model_name_or_path, training_args, quantization)
    if model is None:
        model = {"model": model_args.model_name_or_path, "quantization_config": quantization}
    trainer = STMSFTTrainer(
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=get_peft_config(model_args),
        **model,
    )
    if script_args.dataset_name and not mixture_args.datasets:
        trainer._stm_data_name = Path(script_args.dataset_name).stem
    return trainer


def load_with_adapter(name: str, training_args: Any, quantization_config: Any) -> dict[str, Any] | None:
    """A saved adapter on its base model, to be trained further: what TRL itself cannot load by a name.

    Args:
        name: Folder or hub id.
        training_args: The `SFTConfig`; its `model_init_kwargs` are used up, of which the revision is the adapter's.
        quantization_config: How the base model is quantized, or None.

    Returns:
        `model` and `processing_class` for `SFTTrainer`; None where the name is not that of an adapter. The tokenizer
        is the one saved with the adapter, if there is one.
    """
    from transformers import AutoTokenizer
    from trl.trainer.utils import create_model_from_path

    keywords = dict(training_args.model_init_kwargs)
    revision = keywords.pop("revision")
    if not is_adapter(name, revision):
        return None
    base = base_of(name, revision)
    if training_args.world_size > 1:
        keywords["device_map"] = None  # as TRL has it
    if quantization_config is not None:
        keywords["quantization_config"] = quantization_config
    model = create_model_from_path(base.name, revision=base.revision, **keywords)
    training_args.model_init_kwargs = None
    own = tokenizer_source(name, revision, base)
    return {
        "model": with_adapter(model, name, revision=revision, is_trainable=True),
        "processing_class": AutoTokenizer.from_pretrained(name, revision=revision) if own != base else None,
    }


def load_splits(script_args: Any, mixture_args: Any) -> Any:
    """The data of TRL's script arguments.

    A mixture, a hub id, a local JSON, Parquet or CSV file, or a folder that `Dataset.save_to_disk` or
    `DatasetDict.save_to_disk` wrote.

    Raises:
        ValueError: If neither a mixture nor a name is given, or that of a file which is not there.
    """
    from datasets import Dataset, load_dataset, load_from_disk
    from trl import get_dataset

    name = script_args.dataset_name
    if mixture_args.datasets:
        return get_dataset(mixture_args)
    if not name:
        raise ValueError("No data: give --dataset_name a hub id or a local .jsonl file, or a `datasets` list in YAML.")
    if any((Path(name) / file).is_file() for file in ("state.json", "dataset_dict.json")):
        saved = load_from_disk(name)
        return {script_args.dataset_train_split: saved} if isinstance(saved, Dataset) else saved
    loader = _LOADERS.get(Path(name).suffix.lower())
    if loader is not None and not os.path.exists(name):
        raise ValueError(f"--dataset_name {name}: no such file.")
    if loader is not None and os.path.isfile(name):
        return load_dataset(loader, data_files=name, streaming=script_args.dataset_streaming)
    return load_dataset(name, name=script_args.dataset_config, streaming=script_args.dataset_streaming)


def _split(dataset: Any, split: str, flag: str) -> Any:
    if split not in dataset:
        raise ValueError(f"The data has no split {split!r}, it has {sorted(dataset)}. Name one of them with {flag}.")
    return dataset[split]


if __name__ == "__main__":
    main()
