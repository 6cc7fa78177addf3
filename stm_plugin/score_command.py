"""`stm score`: score a training set with a model as training would, and train nothing; or look at stored scores.

Takes the flags of `stm sft`, or the same YAML, so that the scores lie where that run finds them. For several
processes, on one machine or more: `accelerate launch -m stm_plugin.score_command --config run.yaml`. Of stored scores,
`stm score --info FOLDER` says what they are and `stm score --verify FOLDER` whether they are whole.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .constants import REPORT_NAME
from .inspection.sweep import THRESHOLDS, sweep_of
from .loading import is_adapter
from .report.page import write_report
from .scoring.store import EntryReport, ScoresError, entries

_JSON_HELP = "Write the result to this file too, as JSON."


@dataclass
class ScoreArguments:
    """Flags of `stm score` beside those of `stm sft`."""

    device_map: str | None = field(
        default=None,
        metadata={"help": "Where the model's parts go, as `from_pretrained` takes it: `auto` uses all GPUs."},
    )
    json: str | None = field(default=None, metadata={"help": _JSON_HELP})


def main(argv: list[str] | None = None) -> int:
    """Score, or look at scores, as the command line says.

    Args:
        argv: Arguments; None for the process's own.

    Returns:
        The exit status: 1 if `--verify` finds damage.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if any(argument.split("=")[0] in ("--verify", "--info") for argument in arguments):
        return look(arguments)
    from .sft import make_parser

    parser = make_parser("stm score", ScoreArguments)
    parser.epilog = "stm score --info FOLDER and stm score --verify FOLDER look at stored scores, and score nothing."
    score(*parser.parse_args_and_config(args=arguments))
    return 0


def score(
    script_args: Any, training_args: Any, model_args: Any, mixture_args: Any, score_args: ScoreArguments
) -> None:
    """Make scores and print what thresholds would mask.

    Nothing is written but the scores, the rows they belong to, the report if `stm_report` asks for it, and the JSON
    file that `score_args` may ask for: the receipt that training would write, and the tables.
    """
    if score_args.device_map is not None:
        training_args.model_init_kwargs = (training_args.model_init_kwargs or {}) | {
            "device_map": score_args.device_map
        }
    report = Path(training_args.output_dir) / REPORT_NAME if training_args.stm_report else None
    trainer, run = make_scores(script_args, training_args, model_args, mixture_args)
    if trainer.is_world_process_zero():
        asked = [] if training_args.threshold is None else [training_args.threshold]
        sweep = sweep_of(trainer.stm_scored_data(run), thresholds=sorted({*THRESHOLDS, *asked}))
        print(*sweep.lines(), f"Scores: {run.receipt['scores_entry']}", sep="\n")
        if report is not None:
            report.parent.mkdir(parents=True, exist_ok=True)
            print(f"Report: {write_report([trainer.stm_scored_data(run)], report)}")
        _write_json({"receipt": run.receipt, "sweep": sweep.as_json()}, score_args.json)
    trainer.accelerator.end_training()


def make_scores(script_args: Any, training_args: Any, model_args: Any, mixture_args: Any) -> tuple[Any, Any]:
    """Score as `stm sft` with the same arguments would before its first step.

    Returns:
        The trainer, and its `MaskedRun`.
    """
    from .sft import make_trainer

    with tempfile.TemporaryDirectory(prefix="stm-score-") as output_dir:  # a trainer makes its folder at once
        _only_score(training_args, output_dir)
        _attach_what_training_a_quantized_model_needs(model_args, training_args.trust_remote_code)
        trainer = make_trainer(script_args, training_args, model_args, mixture_args)
        if not trainer.is_deepspeed_enabled:  # whose optimizers want something to train
            _ask_for_no_gradients(trainer)
        return trainer, trainer.stm_score()


def _ask_for_no_gradients(trainer: Any) -> None:
    """Let nothing ask for gradients, for which DDP would make buffers; on CPUs, the smallest weight alone.

    Where there is nothing to train, accelerate leaves DDP out on GPUs, not on CPUs.
    """
    from accelerate import DistributedType

    trainer.model.requires_grad_(False)
    if trainer.accelerator.distributed_type == DistributedType.MULTI_CPU:
        weights = [weight for weight in trainer.model.parameters() if weight.is_floating_point()]
        min(weights, key=lambda weight: weight.numel()).requires_grad_(True)


def _only_score(training_args: Any, output_dir: str) -> None:
    """Take from training arguments what scoring has no use for: trackers, the hub, evaluation, optimizer state."""
    training_args.output_dir = output_dir
    training_args.report_to = []
    training_args.stm_report = False  # it would go with the folder
    training_args.push_to_hub = False
    training_args.eval_strategy = type(training_args.eval_strategy)("no")
    training_args.load_best_model_at_end = False
    training_args.optim = type(training_args.optim)("sgd")


def _attach_what_training_a_quantized_model_needs(model_args: Any, trust_remote_code: bool) -> None:
    """Ask for a fresh LoRA, which changes no score, where the host takes no quantized model without an adapter."""
    from transformers import AutoConfig

    name, revision = model_args.model_name_or_path, model_args.model_revision
    if model_args.use_peft or not name or is_adapter(name, revision):
        return
    config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    is_quantized = getattr(config, "quantization_config", None) is not None
    if is_quantized or model_args.load_in_4bit or model_args.load_in_8bit:
        model_args.use_peft, model_args.lora_r, model_args.lora_target_modules = True, 1, "all-linear"


def look(argv: list[str]) -> int:
    """`stm score --info FOLDER` and `stm score --verify FOLDER`, of one entry or of all below a root.

    Returns:
        The exit status: 1 if an entry is damaged, or there is none.
    """
    parser = argparse.ArgumentParser(prog="stm score", description="Look at stored scores.")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--info", metavar="FOLDER", type=Path, help="say what an entry, or each below a root, holds")
    action.add_argument("--verify", metavar="FOLDER", type=Path, help="read it all and say whether it is whole")
    parser.add_argument("--json", metavar="FILE", help=_JSON_HELP)
    args = parser.parse_args(argv)
    folder = args.info or args.verify
    verified = args.verify is not None
    try:
        reports = entries(folder, verify=verified)
    except ScoresError as error:
        print(error, file=sys.stderr)
        return 1
    results = {str(report.path): facts_of(report, verified) for report in reports}
    for entry, facts in results.items():
        print(entry, *(f"  {name}: {value}" for name, value in facts.items()), sep="\n")
    _write_json(results, args.json)
    return int(any(report.faults for report in reports))


def facts_of(report: EntryReport, verified: bool) -> dict[str, Any]:
    """What there is to say about an entry, in words and numbers; that it is whole only if it has been read."""
    facts: dict[str, Any] = {} if report.key is None else asdict(report.key)
    if report.key is not None:
        facts |= {
            "scores": report.num_scores,
            "tokens per batch": report.tokens_per_batch,
            "bytes": report.num_bytes,
            "bytes per score": round(report.num_bytes / max(1, report.num_scores), 2),
        }
    if report.faults:
        facts["damaged"] = "; ".join(report.faults)
    elif verified:
        facts["whole"] = True
    return facts


def _write_json(result: dict[str, Any], file: str | None) -> None:
    if file is not None:
        Path(file).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
