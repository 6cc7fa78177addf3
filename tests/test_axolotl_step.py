"""One optimizer step of Axolotl over the same rows is the same gradient, however it is cut, packed or shared by ranks.

This file is also the script that two DDP processes run.
"""

import json
import os
import sys
from pathlib import Path

import pytest

pytest.importorskip("axolotl", reason="axolotl is not installed")

import torch
from axolotl_helpers import ON_A_CPU, one_process, train
from processes import two_processes
from step_helpers import EMPTY, RATE, TAU, check_step, kept_of, make_step, write_steps
from transformers import TrainerCallback

__all__ = ["one_process"]

REFERENCES = ["initial", "current"]
CUTS = {
    "16 x 1": {"micro_batch_size": 16},
    "8 x 2": {"micro_batch_size": 8, "gradient_accumulation_steps": 2},
    "1 x 16": {"micro_batch_size": 1, "gradient_accumulation_steps": 16},
    "padded to sequence_len": {"micro_batch_size": 8, "gradient_accumulation_steps": 2, "pad_to_sequence_len": True},
    # Of the rows' lengths (10, 13, 16, 19, 22, again and again) the first two share a pack, the others go alone.
    "packed": {
        "sample_packing": True,
        "sample_packing_sequentially": True,
        "sequence_len": 24,
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 13,
    },
}
CUTS_OF_TWO = {
    "8 on each": {"micro_batch_size": 8},
    "4 x 2 on each": {"micro_batch_size": 4, "gradient_accumulation_steps": 2},
}
OF_TWO = [("8 on each", "some"), *(("4 x 2 on each", empty) for empty in EMPTY)]


class KeepStep(TrainerCallback):
    """The gradient of the step, and the weights before it."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.before = {name: value.detach().clone() for name, value in model.state_dict().items()}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = {
            name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None
        }


def _train(folder, rows, name, reference, **cut):
    """Train on the rows as they are tokenized: Axolotl trains no label at a row's position 0 but in packs."""
    data = folder / f"{name}.jsonl"
    rows = [{**row, "labels": [-100, *row["labels"][1:]], "attention_mask": [1] * len(row["labels"])} for row in rows]
    data.write_text("\n".join(map(json.dumps, rows)))
    config = ON_A_CPU | {
        "base_model": str(folder / "model"),
        "datasets": [{"path": str(data), "ds_type": "json"}],
        "dataset_prepared_path": str(folder / f"{name} prepared"),
        "output_dir": str(folder / "out"),
        "plugins": "stm",
        "stm_threshold": TAU,
        "stm_reference": reference,
        "curriculum_sampling": True,
        "shuffle_merged_datasets": False,
        "sequence_len": 64,
        "gradient_accumulation_steps": 1,
        "max_steps": 1,
        "num_epochs": 1,
        "optimizer": "sgd",
        "learning_rate": RATE,
        "lr_scheduler": "constant",
        "warmup_steps": 0,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "dataset_num_proc": 1,
        "max_memory": {"cpu": "8GiB"},  # or Axolotl places the model of rank 1 on a GPU
    }
    keep = KeepStep()
    trainer = train(config | cut, callback=keep)
    return {
        "batches": trainer.batches,
        "losses": trainer.losses,
        "loss": trainer.state.log_history[0]["loss"],
        "gradients": keep.gradients,
        "before": keep.before,
        "after": {name: value.detach().clone() for name, value in trainer.model.state_dict().items()},
    }


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("empty", ["none", "some", "all"])
@pytest.mark.parametrize("cut", CUTS)
def test_the_gradient_does_not_depend_on_the_cut(cut, empty, reference, tokenizer, make_model, tmp_path):
    step = make_step(make_model(), tokenizer, empty, last=18)
    write_steps(tmp_path, make_model(), tokenizer, {})
    found = _train(tmp_path, step.rows, "step", reference, **CUTS[cut])
    check_step([found], step, make_model(), empty)
    if empty == "some" and cut != "16 x 1":
        assert 0 in map(kept_of, found["batches"])


@pytest.fixture(scope="module")
def both(tokenizer, make_model, tmp_path_factory):
    """The steps, and what both ranks have found."""
    folder, model = tmp_path_factory.mktemp("two"), make_model()
    steps = {empty: make_step(model, tokenizer, empty) for empty in EMPTY}
    write_steps(folder, model, tokenizer, steps)
    # Without the variable, processes without GPUs train side by side, each as if it were alone.
    return steps, two_processes(__file__, folder, ACCELERATE_USE_CPU="true")[0]


@pytest.mark.slow
@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize(("cut", "empty"), OF_TWO)
def test_the_gradient_of_two_ranks_is_that_of_one(cut, empty, reference, both, make_model):
    steps, outcomes = both
    ranks = [outcome[cut, empty, reference] for outcome in outcomes]
    check_step(ranks, steps[empty], make_model(), empty)
    kept = [[kept_of(batch) for batch in rank["batches"]] for rank in ranks]
    if (cut, empty) in [("8 on each", "some"), ("4 x 2 on each", "every other four")]:
        assert sorted(sum(of_rank) == 0 for of_rank in kept) == [False, True]
    elif empty == "some":
        assert all(0 in of_rank and sum(of_rank) for of_rank in kept)


def main(folder):
    """What each rank does: every cut of every step in turn, the outcomes in a file of its own."""
    from axolotl_plugins import ask_for_no_peers

    torch.set_num_threads(1)
    ask_for_no_peers()
    folder, found = Path(folder), {}
    rows = json.loads((folder / "steps.json").read_text())
    for cut, empty in OF_TWO:
        for reference in REFERENCES:
            found[cut, empty, reference] = _train(folder, rows[empty], empty, reference, **CUTS_OF_TWO[cut])
    torch.save(found, folder / f"rank-{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
