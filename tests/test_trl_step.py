"""One optimizer step of TRL over the same rows is the same gradient, however it is cut, packed and shared by ranks.

This file is also the script that two DDP processes run.
"""

import json
import os
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed")

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from processes import two_processes
from step_helpers import EMPTY, RATE, TAU, check_step, kept_of, make_step, write_steps
from trl_helpers import (
    RecordingSTM,
    history,
    one_thread,  # noqa: F401
    stm_trainer,
    weights,
)

REFERENCES = ["initial", "current"]
ALONE = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 16}
CUTS = {
    "16 x 1": {"per_device_train_batch_size": 16},
    "8 x 2": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2},
    "1 x 16": ALONE,
    "padding-free": {
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "padding_free": True,
        "max_length": None,
    },
    # Of the rows' lengths (10, 13, 16, 19, 22) only the four of 10 share packs.
    "bfd": {"packing": True, "max_length": 22, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 14},
    "wrapped": ALONE | {"packing": True, "packing_strategy": "wrapped", "max_length": 16},
}
CUTS_OF_TWO = {
    "8 on each": {"per_device_train_batch_size": 8},
    "4 x 2 on each": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "1 x 8 on each": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
}


def _train(model, tokenizer, rows, folder, reference, **cut):
    trainer = stm_trainer(
        model,
        rows,
        tokenizer,
        folder,
        trainer_class=RecordingSTM,
        stm_threshold=TAU,
        stm_reference=reference,
        train_sampling_strategy="sequential",
        max_steps=1,
        optim="sgd",
        learning_rate=RATE,
        max_grad_norm=0.0,
        logging_nan_inf_filter=False,
        **{"max_length": None} | cut,
    )
    before = weights(trainer.model)
    trainer.train()
    (gradients,) = trainer.gradients
    ((loss,),) = history(trainer, "loss")
    return {
        "batches": trainer.batches,
        "gradients": gradients,
        "losses": trainer.losses,
        "loss": loss,
        "before": before,
        "after": weights(trainer.model),
    }


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("empty", ["none", "some", "all"])
@pytest.mark.parametrize("cut", CUTS)
def test_the_gradient_does_not_depend_on_the_cut(cut, empty, reference, tokenizer, make_model, tmp_path):
    step = make_step(make_model(), tokenizer, empty, chunk=CUTS[cut]["max_length"] if cut == "wrapped" else None)
    found = _train(make_model(), tokenizer, step.rows, tmp_path, reference, **CUTS[cut])
    check_step([found], step, make_model(), empty)
    if empty == "some" and cut != "16 x 1":
        assert 0 in map(kept_of, found["batches"])


@pytest.fixture(scope="module")
def both(tokenizer, make_model, tmp_path_factory):
    """The model, the steps, and what both ranks have found."""
    folder, model = tmp_path_factory.mktemp("two"), make_model()
    steps = {empty: make_step(model, tokenizer, empty) for empty in EMPTY}
    write_steps(folder, model, tokenizer, steps)
    return steps, two_processes(__file__, folder)[0]


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("empty", EMPTY)
@pytest.mark.parametrize("cut", CUTS_OF_TWO)
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
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    folder, found = Path(folder), {}
    for empty, rows in json.loads((folder / "steps.json").read_text()).items():
        for cut, options in CUTS_OF_TWO.items():
            for reference in REFERENCES:
                found[cut, empty, reference] = _train(
                    AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32),
                    AutoTokenizer.from_pretrained(folder / "model"),
                    rows,
                    folder / "out",
                    reference,
                    **options,
                )
    torch.save(found, folder / f"rank-{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
