"""Time and memory of STM beside plain SFT, and of scoring beside its floor; prints a table, writes JSON.

On SmolLM2 and Gemma 3 270M, in float32 and bfloat16, on the GPU if there is one. Needs the `demo` extra;
`nox -s benchmark` runs it in an environment of its own. Figures are medians of rounds in which the sides take turns,
so that a machine whose speed drifts does all of them the same. Machine, versions and commit go into the JSON.
"""

import argparse
import json
import os
import platform
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from importlib.metadata import Distribution, version
from pathlib import Path
from typing import NamedTuple

import benchmark_scoring
from benchmark_scoring import MAX_LENGTH, model_and_data

STEPS = 12
SKIPPED_STEPS = 2
MEMORY_STEPS = 4
MODELS = ("smollm2", "gemma3")
DTYPES = ("float32", "bfloat16")
PARTS = ("start", "training", "scoring", "processes")
RATIOS = ("step_seconds_ratio", "peak_mib_ratio")
SIDES = {"trl": ("SFT", "STM", "current"), "axolotl": ("SFT", "STM")}
"""`STM` is `stm_reference: initial`, `current` is `stm_reference: current`."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=3, help="runs of each side (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("benchmark.json"), help="where the JSON goes")
    parser.add_argument(
        "--host", choices=["trl", "axolotl"], default="trl", help="whose trainer is timed (default: %(default)s)"
    )
    for name, allowed in (("models", MODELS), ("dtypes", DTYPES), ("parts", PARTS)):
        parser.add_argument(f"--{name}", nargs="+", choices=allowed, default=allowed, help="default: all")
    parser.add_argument("--training-models", nargs="+", choices=MODELS, default=["smollm2"], help="default: smollm2")
    parser.add_argument("--rows", type=int, default=20, help="rows of data (default: %(default)s)")
    parser.add_argument(
        "--chats", default="", help="rows of a file of chats (JSON lines); default: functions of the standard library"
    )
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--scores", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        train_side(args)
        return
    results: dict = {"machine": machine()}
    if "start" in args.parts:
        results["start"] = compare_start()
    if "scoring" in args.parts and args.host == "trl":
        results["scoring"] = {
            f"{model}, {dtype}": compare_scoring(model, dtype, args.rows, args.pairs, args.chats)
            for model in args.models
            for dtype in args.dtypes
        }
    if "processes" in args.parts and args.host == "trl":
        results["processes"] = compare_processes(args.pairs, args.rows, args.chats)
    if "training" in args.parts:
        results["training"] = {
            f"{model}, {dtype}": compare_training(Run(args.host, model, dtype, args.rows, args.chats), args.pairs)
            for model in (args.training_models if args.host == "trl" else ["smollm2"])
            for dtype in (args.dtypes if args.host == "trl" else ["float32"])
        }
    args.output.write_text(json.dumps(results, indent=2) + "\n")
    print("\n".join(table(results)))


class Run(NamedTuple):
    """What is trained."""

    host: str
    model: str
    dtype: str
    num_rows: int
    chats_file: str


def compare_start(pairs: int = 40) -> dict:
    """Milliseconds that a bare interpreter takes to start, without and with the start-up hook."""
    milliseconds: dict[str, list[float]] = {"without": [], "with": []}
    for pair in range(pairs + 1):
        for side in milliseconds:
            environment = os.environ | {"STM_AXOLOTL_HOOK": "0" if side == "without" else "1"}
            started = time.perf_counter()
            subprocess.run([sys.executable, "-c", "pass"], env=environment, check=True)
            if pair:  # the first pair warms up
                milliseconds[side].append(1000 * (time.perf_counter() - started))
    medians = {side: statistics.median(values) for side, values in milliseconds.items()}
    return medians | {"difference": medians["with"] - medians["without"]}


def compare_training(run: Run, pairs: int) -> dict:
    """Step time and peak memory of each side over those of SFT.

    Time: all sides train at once, each in a process of its own, and take turns step by step on the same rows. Memory:
    runs of their own whose allocator gives every freed tensor back, or else the peak tells of its luck with holes.
    """
    sides = SIDES[run.host]
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    peaks: dict[str, list[float]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as scores:
        for _ in range(pairs):
            for side, steps in take_turns(run, scores).items():
                seconds[side] += steps
        shutil.rmtree(scores)
        for side in sides:
            for _ in range(pairs):  # the first of STM scores too
                process = start_side(run, side, scores, MEMORY_STEPS, MALLOC_MMAP_THRESHOLD_=str(64 * 1024))
                peaks[side].append(json.loads(process.communicate("\n" * MEMORY_STEPS)[0].splitlines()[-1]))

    def over_sft(side: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[side], seconds["SFT"], strict=True))

    return {
        "step_seconds": seconds,
        "peak_mib": peaks,
        "step_seconds_ratio": {side: over_sft(side) for side in sides[1:]},
        "peak_mib_ratio": {side: max(peaks[side]) / statistics.median(peaks["SFT"]) for side in sides[1:]},
    }


def take_turns(run: Run, scores: str) -> dict[str, list[float]]:
    """Seconds of each step of every side, from the word to begin until its end."""
    sides = {side: start_side(run, side, scores, STEPS) for side in SIDES[run.host]}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for side in sides.values():
        side.stdout.readline()  # ready
    for step in range(STEPS):
        for side in sides if step % 2 else reversed(sides):
            started = time.perf_counter()
            sides[side].stdin.write("\n")
            sides[side].stdin.flush()
            if not sides[side].stdout.readline():
                sys.exit(f"The side {side} stopped early; its messages are above.")
            if step >= SKIPPED_STEPS:
                seconds[side].append(time.perf_counter() - started)
    for side in sides.values():
        side.communicate()
    return seconds


def start_side(run: Run, side: str, scores: str, steps: int, **environment: str) -> subprocess.Popen:
    command = [sys.executable, __file__, "--host", run.host, "--model", run.model, "--dtype", run.dtype]
    command += ["--rows", str(run.num_rows), "--chats", run.chats_file]
    return subprocess.Popen(
        [*command, "--side", side, "--steps", str(steps), "--scores", scores],
        env=os.environ | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def train_side(args: argparse.Namespace) -> None:
    """Train with LoRA, each step at a line of the input; a line when a step ends, the peak in MiB at last."""
    answers = os.dup(1)
    os.dup2(2, 1)  # what the libraries print is no answer
    import torch
    from transformers import TrainerCallback

    def answer(text: object) -> None:
        os.write(answers, f"{text}\n".encode())

    class TakeTurns(TrainerCallback):
        def on_train_begin(self, *args, **kwargs) -> None:
            answer("ready")
            sys.stdin.readline()

        def on_step_end(self, training_args, state, *others, **kwargs) -> None:
            answer(state.global_step)
            if state.global_step < args.steps:
                sys.stdin.readline()

    torch.set_num_threads(os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as output_dir:
        make = {"trl": trl_trainer, "axolotl": axolotl_trainer}[args.host]
        trainer = make(args, output_dir)
        torch.set_num_threads(os.cpu_count() or 1)  # a host may have changed it
        trainer.add_callback(TakeTurns())
        trainer.train()
    if torch.cuda.is_available():
        answer(torch.cuda.max_memory_allocated() / 2**20)
    else:
        answer(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def trl_trainer(args: argparse.Namespace, output_dir: str):
    import torch
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    from stm_plugin import STMSFTConfig, STMSFTTrainer

    model, data = model_and_data(args.model, args.rows, args.chats)
    trainer_class, config_class, more = SFTTrainer, SFTConfig, {}
    if args.side != "SFT":
        trainer_class, config_class = STMSFTTrainer, STMSFTConfig
        more = {"stm_scores_dir": args.scores} if args.side == "STM" else {"stm_reference": "current"}
    config = config_class(
        output_dir=output_dir,
        max_steps=args.steps,
        per_device_train_batch_size=2,
        max_length=MAX_LENGTH,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        model_init_kwargs={"dtype": args.dtype},
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **more,
    )
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
    return trainer_class(str(model), config, train_dataset=data, peft_config=lora)


def axolotl_trainer(args: argparse.Namespace, output_dir: str):
    from axolotl_helpers import ON_A_CPU, build  # before Axolotl: it turns telemetry off

    model, data = model_and_data("smollm2", args.rows, args.chats)
    chats = Path(output_dir) / "chats.jsonl"
    chats.write_text("\n".join(json.dumps({"messages": row["prompt"] + row["completion"]}) for row in data))
    config = ON_A_CPU | {
        "base_model": str(model),
        "chat_template": "tokenizer_default",
        "datasets": [{"path": str(chats), "ds_type": "json", "type": "chat_template", "field_messages": "messages"}],
        "dataset_prepared_path": f"{output_dir}/prepared",
        "output_dir": output_dir,
        "sequence_len": MAX_LENGTH,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_steps": args.steps,
        "num_epochs": 2,
        "learning_rate": 2e-4,
        "save_strategy": "no",
        "adapter": "lora",
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "lora_target_linear": True,
    }
    return build(config | ({"plugins": "stm", "stm_scores_dir": args.scores} if args.side == "STM" else {}))


def compare_scoring(model: str, dtype: str, num_rows: int, pairs: int, chats_file: str) -> dict:
    """Rates of scoring, its floor and the paper's loop, and how much memory scoring takes over the bare backbone."""
    results = benchmark_scoring.measure(model, dtype, num_rows, pairs, chats_file)
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(64 * 1024)}
    for side in ("backbone", "scoring"):
        command = [sys.executable, benchmark_scoring.__file__, model, dtype, str(num_rows), side, chats_file]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        results[f"peak_mib_{side}"] = json.loads(done.stdout.splitlines()[-1])
    return results


def compare_processes(pairs: int, num_rows: int, chats_file: str, tokens_per_batch: int = 512) -> dict:
    """Seconds in which one process and two score SmolLM2's rows, one thread each; two must store the same scores."""
    model, data = model_and_data("smollm2", num_rows, chats_file)
    seconds: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as work:
        chats, stored = Path(work) / "chats.jsonl", {}
        data.to_json(chats)
        for _ in range(pairs):
            for count, of_count in seconds.items():
                scores = Path(work) / f"scores-{count}"
                shutil.rmtree(scores, ignore_errors=True)
                command = f"-m torch.distributed.run --standalone --nproc_per_node {count} -m stm_plugin.score_command"
                command += f" --model_name_or_path {model} --dataset_name {chats} --dtype float32 --bf16 false"
                command += f" --max_length {MAX_LENGTH} --stm_tokens_per_batch {tokens_per_batch}"
                done = subprocess.run(
                    [sys.executable, *command.split(), "--stm_scores_dir", str(scores)],
                    env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "STM_HOME": work},
                    capture_output=True,
                    text=True,
                )
                made = re.search(r"Scores: made in ([\d.]+) s", done.stderr)
                if made is None:
                    sys.exit(f"Scoring with {count} processes failed:\n{done.stderr[-3000:]}")
                of_count.append(float(made[1]))
                (entry,) = scores.glob("[!.]*")
                stored[count] = {file.name: file.read_bytes() for file in entry.iterdir()}
    if stored[1] != stored[2]:
        sys.exit("One process and two have stored different scores.")
    ratio = statistics.median(one / two for one, two in zip(seconds[1], seconds[2], strict=True))
    return {"seconds": seconds, "times_as_fast": ratio}


def device() -> str:
    """The GPU's name, or the CPU's."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    about = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", about.read_text()) if about.exists() else []
    return names[0] if names else platform.machine()


def machine() -> dict:
    packages = ("torch", "transformers", "trl", "axolotl", "peft", "stm-plugin")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    processor = platform.processor() or platform.machine()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cores": os.cpu_count(),
        "processor": processor,
        "device": device(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages if list(Distribution.discover(name=name))},
        "commit": commit.stdout.strip() or None,
    }


def table(results: dict) -> Iterable[str]:
    """The results as two tables in Markdown."""
    facts = results["machine"]
    yield f"{facts['date']}, {facts['device']}, {facts['cores']} cores, commit {facts['commit']}, {facts['versions']}"
    if "start" in results:
        start = results["start"]
        yield f"start of python -c pass: {start['without']:.1f} ms, with the hook {start['difference']:+.2f} ms"
    if "scoring" in results:
        yield ""
        yield (
            "| scoring | tokens/s | floor | share of the floor | softmax | the paper's loop | times it | NLL within "
            "| masked otherwise | MiB over the backbone |"
        )
        yield "| --- " * 10 + "|"
    for name, row in results.get("scoring", {}).items():
        rates = row["tokens_per_second"]
        yield (
            f"| {name} | {rates['scoring']:,.0f} | {rates['floor']:,.0f} | {row['share_of_floor']:.3f} "
            f"| {row['softmax_share_of_scoring']:.1%} | {rates['paper']:,.0f} | {row['times_the_papers_loop']:.2f} "
            f"| {row['largest_nll_difference']:.1e} | {row['masked_otherwise']:.2%} "
            f"| {row['peak_mib_scoring'] - row['peak_mib_backbone']:+,.0f} |"
        )
        if "limit_tokens_per_second" in row:
            limit = row["limit_tokens_per_second"]
            yield f"{name}: {rates['scoring'] / limit:.1%} of the arithmetic limit, {limit:,.0f} tokens/s"
    if "processes" in results:
        medians = {count: statistics.median(seconds) for count, seconds in results["processes"]["seconds"].items()}
        yield ""
        yield (
            f"scoring in one process: {medians[1]:.1f} s, in two: {medians[2]:.1f} s (one thread each): "
            f"{results['processes']['times_as_fast']:.2f} times as fast, the same store"
        )
    if "training" in results:
        yield ""
        yield "| training | seconds a step | over SFT | peak MiB | over SFT |"
        yield "| --- " * 5 + "|"
    for name, row in results.get("training", {}).items():
        for side, steps in row["step_seconds"].items():
            ratios = [f"{row[ratio][side]:.3f}" if side != "SFT" else "" for ratio in RATIOS]
            yield (
                f"| {name}, {side} | {statistics.median(steps):.3f} | {ratios[0]} "
                f"| {statistics.median(row['peak_mib'][side]):,.0f} | {ratios[1]} |"
            )


if __name__ == "__main__":
    main()
