"""A million rows of 16 tokens: memory and time, each in a process of its own. This file is also their script."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("trl", reason="trl is not installed")

ROOT = Path(__file__).resolve().parents[1]
TOKENS_PER_ROW = 16
VOCAB_SIZE = 256
FEW, MANY = 10_000, 1_000_000


# What a process of its own does: `python test_scale.py ACTION FOLDER`, its figures as the last line.


def make_rows(folder, num_rows):
    """Different rows on disk, each with a prompt of four tokens."""
    import datasets
    import pyarrow as pa

    ids = np.random.default_rng(0).integers(0, VOCAB_SIZE, (num_rows, TOKENS_PER_ROW), dtype=np.int32)
    labels = ids.copy()
    labels[:, :4] = -100
    offsets = pa.array(np.arange(0, ids.size + 1, TOKENS_PER_ROW), pa.int32())
    columns = {"input_ids": ids, "labels": labels}
    table = {name: pa.ListArray.from_arrays(offsets, pa.array(values.ravel())) for name, values in columns.items()}
    datasets.Dataset(pa.table(table)).save_to_disk(folder / "rows")


def make_trainer(folder, trainer_class, config_class, **options):
    """A trainer of a very small model whose first step has not been made."""
    import datasets
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB_SIZE, initializer_range=0.3, **sizes))
    vocab = {str(token): token for token in range(VOCAB_SIZE)}
    config = config_class(
        output_dir=str(folder / "out"),
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        gradient_checkpointing=False,
        max_steps=1,
        dataset_kwargs={"skip_prepare_dataset": True},
        **options,
    )
    return trainer_class(
        model,
        config,
        train_dataset=datasets.load_from_disk(folder / "rows"),
        processing_class=PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="0")), eos_token="1", pad_token="2"
        ),
    )


def stm_trainer(folder, threshold=100.0):
    from stm_plugin.trl import STMSFTConfig, STMSFTTrainer

    scores = str(folder / "scores")
    return make_trainer(folder, STMSFTTrainer, STMSFTConfig, stm_threshold=threshold, stm_scores_dir=scores)


def host_trainer(folder):
    from trl import SFTConfig, SFTTrainer

    return make_trainer(folder, SFTTrainer, SFTConfig)


def score(folder):
    """Score all rows."""
    trainer = stm_trainer(folder)
    started = time.perf_counter()
    trainer.stm_score()
    # While the rows are mapped, so that they count neither in the peak nor in what is taken off it.
    return {"seconds": time.perf_counter() - started, "own_peak_mib": own_peak_mib()}


def start(folder, make_trainer):
    """Start training: build the trainer and come to its first step."""
    from transformers import TrainerCallback

    class AtFirstStep(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            figures["seconds"] = time.perf_counter() - started

    figures = {}
    started = time.perf_counter()
    trainer = make_trainer(folder)
    trainer.add_callback(AtFirstStep())
    trainer.train()
    return figures


def rethreshold(folder):
    """Read stored scores and mask with another threshold."""
    trainer = stm_trainer(folder)
    trainer.stm_score()
    trainer.args.stm_threshold = 200.0
    run = trainer._stm_run
    from stm_plugin.masking.masks import make_masks
    from stm_plugin.options import STMOptions
    from stm_plugin.scoring.store import ScoreStore

    started = time.perf_counter()
    scores = ScoreStore(folder / "scores").read(run.key, run.plan.num_scores)
    masks = make_masks(run.plan.documents, run.plan.spread(scores), STMOptions(stm_threshold=200.0), set())
    return {"seconds": time.perf_counter() - started, "masked": masks.num_masked, "tokens": run.plan.num_scores}


ACTIONS = {
    "score": score,
    "start STM": lambda folder: start(folder, stm_trainer),
    "start host": lambda folder: start(folder, host_trainer),
    "rethreshold": rethreshold,
}


def own_peak_mib():
    """Peak resident memory without what is mapped from files, which the page cache takes back at will."""
    if not Path("/proc/self/status").exists():
        return None
    status = Path("/proc/self/status").read_text()
    peak, files = (int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) for name in ("VmHWM", "RssFile"))
    return (peak - files) / 1024


# The tests.


def run(action, folder):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["MALLOC_MMAP_THRESHOLD_"] = str(2**16)  # else the peak tells of the allocator's luck with holes
    command = [sys.executable, __file__, action, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1000)
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    return figures


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders with rows, by their number."""
    root = tmp_path_factory.mktemp("scale")
    folders = {num_rows: root / str(num_rows) for num_rows in (FEW, MANY)}
    for num_rows, folder in folders.items():
        make_rows(folder, num_rows)
    return folders


@pytest.fixture(scope="module")
def scored(folders):
    """What scoring took, by the number of rows; the scores stay in the folders."""
    return {num_rows: run("score", folder) for num_rows, folder in folders.items()}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc, for the peak of a process's memory")
def test_scoring_a_million_rows_takes_little_more_memory_than_ten_thousand(scored):
    assert scored[MANY]["own_peak_mib"] - scored[FEW]["own_peak_mib"] < 200


@pytest.mark.slow
def test_starting_on_stored_scores(scored, folders):
    """Figures for a quiet machine: at most 1 s more than the host's own start for each 100,000 rows."""
    host, stm = (run(f"start {side}", folders[MANY]) for side in ("host", "STM"))
    assert stm["seconds"] - host["seconds"] < 10


@pytest.mark.slow
def test_a_new_threshold(scored, folders):
    figures = run("rethreshold", folders[MANY])
    assert figures["tokens"] == 12 * MANY
    assert 0 < figures["masked"] < figures["tokens"]


if __name__ == "__main__":
    figures = ACTIONS[sys.argv[1]](Path(sys.argv[2]))
    sys.stdout.write(json.dumps(figures) + "\n")
