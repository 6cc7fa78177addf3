"""Real FSDP (version 2) in two gloo processes on the CPU, with scores that one process has made. Also their script."""

import json
import math
import os
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed")

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from processes import load, save_tuned_model, saved_llama, two_processes
from trl_helpers import (
    RecordingSTM,
    assert_margin,
    label_rows,
    one_thread,  # noqa: F401
    oracle_nll,
    scores_of,
    stm_trainer,
    threshold_between,
)

NUM_ROWS = 16
FSDP = {
    "fsdp": "full_shard auto_wrap",
    "fsdp_config": {"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
}


def _make(folder, out, **options):
    model, tokenizer = load(folder)
    settings = json.loads((folder / "settings.json").read_text())
    return stm_trainer(
        model,
        settings["rows"],
        tokenizer,
        out,
        trainer_class=RecordingSTM,
        **{
            "stm_threshold": settings["threshold"],
            "max_length": None,
            "train_sampling_strategy": "sequential",
            "max_grad_norm": 0.0,
            "max_steps": 2,
            "optim": "sgd",
            "learning_rate": 1.0,
            "lr_scheduler_type": "constant",
        }
        | options,
    )


def _two_models(folder):
    return {"stm_strategy": "difference", "stm_tuned_model": str(folder / "tuned")}


def _trained(made):
    made.train()
    return {
        "class": type(made.model).__name__,
        "digest": made._stm_state.receipt["mask_digest"],
        "key": made._stm_state.receipt["scores_key"],
        "weights": {name: _whole(parameter) for name, parameter in made.model.named_parameters()},
        "items": [float(items) for items in made.items],
    }


def _whole(parameter):
    parameter = parameter.detach()
    return (parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter).clone()


def _refusal(make):
    try:
        make()
    except ValueError as error:
        return str(error)
    return "no error"


def main(folder):
    """What each rank does."""
    _let_fsdp_run_here()
    torch.set_num_threads(1)
    folder = Path(folder)
    options = FSDP | {"per_device_train_batch_size": 2}
    found = {
        "trained": _trained(_make(folder, folder / "out", **options)),
        "current": _refusal(lambda: _make(folder, folder / "out", stm_reference="current", **options)),
        "missing": _refusal(
            lambda: _make(folder, folder / "out", stm_scores_dir=str(folder / "elsewhere"), **options)
        ),
    }
    two = _two_models(folder)
    found["two models"] = _trained(_make(folder, folder / "out", **options, **two))
    found["no tuned scores"] = _refusal(
        lambda: _make(folder, folder / "out", **options, **two | {"stm_tuned_model": str(folder / "model 2")})
    )
    changed = _make(folder, folder / "out", **options)
    changed.train_dataset = changed.train_dataset.select(range(NUM_ROWS - 1))
    found["changed"] = _refusal(changed.train)
    torch.save(found, folder / f"rank-{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


def _let_fsdp_run_here():
    """PyTorch's FSDP runs with gloo, but accelerate's on GPUs only: let it take these processes for those of GPUs."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    make_state = PartialState.__init__

    def __init__(self, *args, **kwargs):
        make_state(self, *args, **kwargs)
        if PartialState._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    PartialState.__init__ = __init__
    os.environ["ACCELERATE_USE_FSDP"] = "true"


@pytest.fixture(scope="module")
def runs(tokenizer, tmp_path_factory):
    """Outcomes of both ranks, and of one process without FSDP whose scores they find."""
    folder = tmp_path_factory.mktemp("fsdp")
    model = saved_llama(folder, tokenizer)
    rows = label_rows(tokenizer, NUM_ROWS)
    threshold = threshold_between(oracle_nll(rows, model))
    assert_margin(scores_of(oracle_nll(rows, model)), math.log(threshold))
    (folder / "settings.json").write_text(json.dumps({"rows": rows, "threshold": threshold}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STM_HOME", str(folder / "stm-home"))
        made = _make(folder, folder / "alone", per_device_train_batch_size=4)
        made.stm_score()
        alone = _trained(made)
        save_tuned_model(model, tokenizer, folder / "tuned")
        save_tuned_model(save_tuned_model(model, tokenizer, folder / "model 2"), tokenizer, folder / "model 2")
        made = _make(folder, folder / "alone", per_device_train_batch_size=4, **_two_models(folder))
        alone["two models"] = _trained(made)
    ranks, errors = two_processes(__file__, folder)
    assert errors.count("Scores: found") == 2
    return ranks, alone


def test_training_under_fsdp_finds_the_scores_of_one_process(runs):
    ranks, alone = runs
    assert "FSDP" not in alone["class"]
    for rank in ranks:
        found = rank["trained"]
        assert found["class"].startswith("FSDP")
        assert (found["digest"], found["key"], found["items"]) == (alone["digest"], alone["key"], alone["items"])
        for name, weight in found["weights"].items():
            assert torch.allclose(weight, alone["weights"][name], rtol=1e-4, atol=1e-5), name


def test_scores_of_a_tuned_model_are_found_before_weights_are_shared_out(runs):
    ranks, alone = runs
    for rank in ranks:
        assert rank["two models"]["digest"] == alone["two models"]["digest"] != alone["digest"]
        assert "Under FSDP the scores must be there before training starts" in rank["no tuned scores"]


def test_without_scores_the_command_is_named(runs):
    for rank in runs[0]:
        assert rank["missing"] == runs[0][0]["missing"]
        assert rank["missing"].startswith("Under FSDP the scores must be there before training starts")
        assert "`stm score` for TRL, `axolotl stm-score CONFIG` for Axolotl" in rank["missing"]


def test_a_training_set_that_changes_is_refused(runs):
    for rank in runs[0]:
        assert rank["changed"].startswith("The training set has changed since the trainer was made")


def test_current_is_refused(runs):
    for rank in runs[0]:
        assert "FSDP with stm_reference='current'" in rank["current"]


if __name__ == "__main__":
    main(sys.argv[1])
