"""Time and memory of STM beside plain SFT, and throughput of scoring beside its floor; prints a table, writes JSON.

Needs the `demo` extra. `nox -s benchmark` runs it in an environment of its own. Figures are medians of pairs whose
two sides take turns, so that a machine whose speed drifts does both the same. Machine, versions and commit go into the
JSON.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import Distribution, version
from pathlib import Path

STEPS = 12
SKIPPED_STEPS = 2
MEMORY_STEPS = 4
ROWS = 20
MAX_LENGTH = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=3, help="runs of each side (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("benchmark.json"), help="where the JSON goes")
    parser.add_argument(
        "--host", choices=["trl", "axolotl"], default="trl", help="whose trainer is timed (default: %(default)s)"
    )
    parser.add_argument("--side", choices=["SFT", "STM"], help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--scores", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        train_side(args.host, args.side, args.steps, args.scores)
        return
    results = {"machine": machine(), "start": compare_start(), "training": compare_training(args.host, args.pairs)}
    if args.host == "trl":
        results["scoring"] = compare_scoring(args.pairs)
    args.output.write_text(json.dumps(results, indent=2) + "\n")
    print_table(results)


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


def compare_training(host: str, pairs: int) -> dict:
    """Step time and peak memory of STM over those of SFT.

    Time: both sides train at once, each in a process of its own, and take turns step by step on the same rows. Memory:
    runs of their own whose allocator gives every freed tensor back, or else the peak tells of its luck with holes.
    """
    seconds: dict[str, list[float]] = {"SFT": [], "STM": []}
    peaks: dict[str, list[float]] = {"SFT": [], "STM": []}
    with tempfile.TemporaryDirectory() as scores:
        for _ in range(pairs):
            for side, steps in take_turns(host, scores).items():
                seconds[side] += steps
        shutil.rmtree(scores)
        for side in peaks:
            for _ in range(pairs):  # the first of STM scores too
                process = start_side(host, side, scores, MEMORY_STEPS, MALLOC_MMAP_THRESHOLD_=str(64 * 1024))
                peaks[side].append(json.loads(process.communicate("\n" * MEMORY_STEPS)[0].splitlines()[-1]))
    ratios = [stm / sft for sft, stm in zip(seconds["SFT"], seconds["STM"], strict=True)]
    return {
        "step_seconds": seconds,
        "step_seconds_ratio": statistics.median(ratios),
        "peak_mib": peaks,
        "peak_mib_ratio": max(peaks["STM"]) / statistics.median(peaks["SFT"]),
    }


def take_turns(host: str, scores: str) -> dict[str, list[float]]:
    """Seconds of each step of both sides, from the word to begin until its end."""
    sides = {side: start_side(host, side, scores, STEPS) for side in ("SFT", "STM")}
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


def start_side(host: str, side: str, scores: str, steps: int, **environment: str) -> subprocess.Popen:
    command = [sys.executable, __file__, "--host", host, "--side", side, "--steps", str(steps), "--scores", scores]
    return subprocess.Popen(
        command, env=os.environ | environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def train_side(host: str, side: str, steps: int, scores: str) -> None:
    """Train SmolLM2 with LoRA, each step at a line of the input; a line when a step ends, the peak in MiB at last."""
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

        def on_step_end(self, args, state, *others, **kwargs) -> None:
            answer(state.global_step)
            if state.global_step < steps:
                sys.stdin.readline()

    torch.set_num_threads(os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as output_dir:
        make = {"trl": trl_trainer, "axolotl": axolotl_trainer}[host]
        trainer = make(side == "STM", steps, scores, output_dir)
        torch.set_num_threads(os.cpu_count() or 1)  # a host may have changed it
        trainer.add_callback(TakeTurns())
        trainer.train()
    answer(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def trl_trainer(stm: bool, steps: int, scores: str, output_dir: str):
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    from stm_plugin import STMSFTConfig, STMSFTTrainer

    model, data = model_and_data()
    trainer_class, config_class, more = (SFTTrainer, SFTConfig, {})
    if stm:
        trainer_class, config_class, more = STMSFTTrainer, STMSFTConfig, {"stm_scores_dir": scores}
    config = config_class(
        output_dir=output_dir,
        max_steps=steps,
        per_device_train_batch_size=2,
        max_length=MAX_LENGTH,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **more,
    )
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
    return trainer_class(str(model), config, train_dataset=data, peft_config=lora)


def axolotl_trainer(stm: bool, steps: int, scores: str, output_dir: str):
    from axolotl_helpers import ON_A_CPU, build  # before Axolotl: it turns telemetry off

    model, data = model_and_data()
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
        "max_steps": steps,
        "num_epochs": 2,
        "learning_rate": 2e-4,
        "save_strategy": "no",
        "adapter": "lora",
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "lora_target_linear": True,
    }
    return build(config | ({"plugins": "stm", "stm_scores_dir": scores} if stm else {}))


def compare_scoring(pairs: int) -> dict:
    """Tokens a second of scoring, and of its floor: backbone forward and one head product on the same batches."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from stm_plugin.documents import Documents
    from stm_plugin.options import STMOptions
    from stm_plugin.plan import ScorePlan
    from stm_plugin.scoring import score

    torch.set_num_threads(os.cpu_count() or 1)
    folder, data = model_and_data()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [tokenized(tokenizer, row) for row in data]
    plan = ScorePlan.of(Documents.from_rows(*(list(column) for column in zip(*rows, strict=True))))
    budget = STMOptions.stm_tokens_per_batch
    num_tokens = int(plan.lengths.sum())
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        seconds: dict[str, list[float]] = {"floor": [], "scoring": []}
        for pair in range(pairs + 1):
            for side in ("floor", "scoring") if pair % 2 == 0 else ("scoring", "floor"):
                started = time.perf_counter()
                if side == "floor":
                    run_floor(model, plan, budget)
                else:
                    score(model, plan, tokens_per_batch=budget, progress=False)
                if pair:  # the first pair warms up
                    seconds[side].append(time.perf_counter() - started)
        shares = [floor / ours for floor, ours in zip(seconds["floor"], seconds["scoring"], strict=True)]
        results[str(dtype).removeprefix("torch.")] = {
            "tokens": num_tokens,
            "label_tokens": plan.num_scores,
            "tokens_per_second": {side: num_tokens / statistics.median(times) for side, times in seconds.items()},
            "share_of_floor": statistics.median(shares),
            "shares": shares,
        }
    return results


def run_floor(model, plan, tokens_per_batch: int) -> None:
    """The least that scoring has to compute."""
    import numpy as np
    import torch

    documents = plan.documents
    with torch.no_grad():
        for batch in plan.batches(tokens_per_batch):
            lengths = plan.lengths[batch.start : batch.stop]
            input_ids = np.zeros((len(batch), int(lengths.max())), dtype=np.int64)
            predicting = []
            for row, (member, length) in enumerate(zip(plan.members[batch.start : batch.stop], lengths, strict=True)):
                start = documents.document_offsets[member]
                input_ids[row, :length] = documents.input_ids[start : start + length]
                positions = np.flatnonzero(documents.label_mask[start : start + length + 1])
                predicting.append(row * input_ids.shape[1] + positions - 1)
            hidden = model.base_model(input_ids=torch.from_numpy(input_ids), use_cache=False)[0].flatten(0, 1)
            hidden[torch.from_numpy(np.concatenate(predicting))] @ model.get_output_embeddings().weight.T


def model_and_data():
    """SmolLM2-135M-Instruct and chats about the standard library's functions."""
    from datasets import Dataset

    from stm_plugin.demo.data import training_chats
    from stm_plugin.demo.model import find_model

    return find_model().path, Dataset.from_list(training_chats(ROWS, seed=0))


def tokenized(tokenizer, row) -> tuple[list[int], list[int]]:
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
    ids = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=True)["input_ids"][:MAX_LENGTH]
    return ids, [-100] * len(prompt) + ids[len(prompt) :]


def machine() -> dict:
    packages = ("torch", "transformers", "trl", "axolotl", "peft", "stm-plugin")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    processor = platform.processor() or platform.machine()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cores": os.cpu_count(),
        "processor": processor,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages if list(Distribution.discover(name=name))},
        "commit": commit.stdout.strip() or None,
    }


def print_table(results: dict) -> None:
    start = results["start"]
    print(f"start of python -c pass: {start['without']:.1f} ms, with the hook {start['difference']:+.2f} ms")
    training = results["training"]
    print(f"STM / SFT, {len(training['step_seconds']['STM'])} pairs of steps")
    for name, unit in (("step_seconds", "s a step"), ("peak_mib", "MiB peak")):
        sides = [statistics.median(training[name][side]) for side in ("SFT", "STM")]
        print(f"  {sides[0]:9.3f} and {sides[1]:9.3f} {unit:9}  ratio {training[f'{name}_ratio']:.3f}")
    for dtype, row in results.get("scoring", {}).items():
        rates = row["tokens_per_second"]
        print(f"scoring, {dtype}: {rates['scoring']:.0f} tokens/s, floor {rates['floor']:.0f}, share", end=" ")
        print(f"{row['share_of_floor']:.3f}")


if __name__ == "__main__":
    main()
