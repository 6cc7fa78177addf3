"""Real DeepSpeed, ZeRO-2 and ZeRO-3 in two processes on the CPU, against one process without it. Also their script."""

import json
import math
import os
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("deepspeed", reason="deepspeed is not installed")

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["DS_ACCELERATOR"] = "cpu"

import torch
from processes import load, rows_with_an_empty_pair, saved_llama, two_processes
from trl_helpers import (
    CountTokens,
    RecordingSTM,
    one_thread,  # noqa: F401
    stm_trainer,
)

from stm_plugin.scoring import nll as scoring
from stm_plugin.scoring.nll import LossFacts, loss_facts
from stm_plugin.scoring.sharding import is_sharded, whole

TOKENS_PER_BATCH = 60
NUM_ROWS = 16
LEARNING_RATE = 1.0


def _zero(stage):
    return {
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
    }


def _run(folder, out, stage=None, trainer=None, **options):
    """One step of plain SGD, so that the weights tell the gradient."""
    settings = json.loads((folder / "settings.json").read_text())
    model, tokenizer = load(folder)
    if options.get("stm_reference") == REFERENCE:
        options["stm_reference"] = str(folder / "model")
    if stage is not None:
        model = str(folder / "model")  # loaded by the trainer: under ZeRO-3 never whole
        options |= {"deepspeed": _zero(stage), "model_init_kwargs": {"dtype": "float32", "device_map": None}}
    made = stm_trainer(
        model,
        settings["rows"],
        tokenizer,
        out,
        trainer,
        trainer_class=RecordingSTM,
        **{
            "stm_threshold": settings["threshold"],
            "stm_tokens_per_batch": TOKENS_PER_BATCH,
            "max_length": None,
            "train_sampling_strategy": "sequential",
            "max_grad_norm": 0.0,
            "max_steps": 1,
            "optim": "sgd",
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant",
        }
        | options,
    )
    with CountTokens(made.model) as count:
        original = made._stm_mask

        def masking(checkpoint):
            outcome = original(checkpoint)
            count.handle.remove()  # what follows is training
            return outcome

        made._stm_mask = masking
        before = _weights(made.model)
        facts = loss_facts(made.model)
        made.train()
    run = made._stm_run
    return {
        "facts": facts,
        "sharded": is_sharded(made.model),
        "receipt": made._stm_state.receipt,
        "digest": run.receipt["mask_digest"] if run else None,
        "scores": run.nll if run else None,
        "scored_tokens": count.tokens,
        "batches": len(run.plan.batches(TOKENS_PER_BATCH)) if run else None,
        "items": [float(items) for items in made.items],
        "update": {name: before[name] - after for name, after in _weights(made.model).items()},
    }


def _weights(model):
    with whole(*model.parameters()):
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def _lora():
    from peft import LoraConfig

    return {"peft_config": LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"])}


def _current(**options):
    return {"stm_reference": "current"} | options


REFERENCE = "the model's own folder"  # a model that is loaded while ZeRO-3 is on
WHOLE = {"per_device_train_batch_size": 8}
CUT = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
ALONE = {"per_device_train_batch_size": 16}
SCENARIOS = {
    "initial": (WHOLE, ALONE, None),
    "initial accumulated": (CUT, ALONE, None),
    "current": (_current(**WHOLE), _current(**ALONE), None),
    "current accumulated": (_current(**CUT), _current(**ALONE), None),
    "one rank empty": ({"per_device_train_batch_size": 2}, {"per_device_train_batch_size": 4}, None),
    "current, one rank empty": (
        _current(per_device_train_batch_size=2),
        _current(per_device_train_batch_size=4),
        None,
    ),
    "lora": (WHOLE, ALONE, _lora),
    "current, lora": (_current(**WHOLE), _current(**ALONE), _lora),
    "another reference": (WHOLE | {"stm_reference": REFERENCE}, ALONE | {"stm_reference": REFERENCE}, None),
}


def main(folder, stage):
    """What each rank does: every scenario in turn, its outcome in a file of its own."""
    import deepspeed

    torch.set_num_threads(1)
    scoring.LABELS_PER_SLICE_ON_CPU = 1
    scoring.LOGITS_PER_SLICE = 5 * 320  # five labels at a time: ranks have unequal numbers of slices
    deepspeed.ops.__compatible_ops__ = {}  # or it compiles an extension first
    deepspeed.init_distributed("gloo")
    folder, rank = Path(folder), os.environ["RANK"]
    found = {}
    for name, (options, _, trainer) in SCENARIOS.items():
        os.environ["STM_HOME"] = str(folder / f"stm-home-{stage}-{name}")  # so that each scores
        found[name] = _run(folder, folder / f"out-{stage}", int(stage), trainer and trainer(), **options)
        torch.save(found, folder / f"rank-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """A model, rows of which those that rank 1 gets first keep nothing, and a threshold."""
    folder = tmp_path_factory.mktemp("deepspeed")
    model = saved_llama(folder, tokenizer)
    rows, _, nats = rows_with_an_empty_pair(tokenizer, model, NUM_ROWS)
    (folder / "settings.json").write_text(json.dumps({"rows": rows, "threshold": math.exp(nats)}))
    return folder


@pytest.fixture(scope="module", params=[2, 3], ids=["ZeRO-2", "ZeRO-3"])
def both(folder, request):
    """Outcomes of both ranks of one launch, and the stage."""
    ranks, _ = two_processes(__file__, folder, str(request.param))
    return ranks, request.param


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_train_as_one_without_it(name, both, folder, tmp_path, monkeypatch):
    ranks, stage = both
    _, options, trainer = SCENARIOS[name]
    monkeypatch.setenv("STM_HOME", str(tmp_path / "alone"))
    alone = _run(folder, tmp_path / "out", None, trainer and trainer(), **options)
    scale = max(float(update.abs().max()) for update in alone["update"].values())
    assert scale > 1e-3
    for rank in ranks:
        found = rank[name]
        assert found["sharded"] == (stage == 3)
        assert found["facts"] == LossFacts(takes_count=True, shifts_labels=True)
        assert found["digest"] == alone["digest"]
        assert found["receipt"]["masked_tokens"] == alone["receipt"]["masked_tokens"] > 0
        assert found["items"] == [alone["items"][0]] * len(found["items"])
        assert found["update"].keys() == alone["update"].keys()
        for parameter, update in found["update"].items():
            assert float((update - alone["update"][parameter]).abs().max()) <= 1e-4 * scale, parameter


@pytest.mark.parametrize("name", ["initial", "lora"])
def test_scores_and_their_key_are_those_of_one_process(name, both, folder, tmp_path, monkeypatch):
    """So that what one process has scored serves a run of any kind."""
    ranks, _ = both
    _, options, trainer = SCENARIOS[name]
    monkeypatch.setenv("STM_HOME", str(tmp_path / "alone"))
    alone = _run(folder, tmp_path / "out", None, trainer and trainer(), **options)
    for rank in ranks:
        assert rank[name]["receipt"]["scores_key"] == alone["receipt"]["scores_key"]
        assert float(abs(rank[name]["scores"] - alone["scores"]).max()) <= 1e-5


def test_the_work_is_shared_out(both, folder, tmp_path, monkeypatch):
    """Every batch runs once; under ZeRO-3 a rank without one in a round of forwards runs a single token."""
    ranks, stage = both
    monkeypatch.setenv("STM_HOME", str(tmp_path / "alone"))
    alone = _run(folder, tmp_path / "out", None, **ALONE)["scored_tokens"]
    tokens = [rank["initial"]["scored_tokens"] for rank in ranks]
    assert ranks[0]["initial"]["batches"] % 2 == 1
    assert sum(tokens) == alone + (stage == 3)
    assert max(tokens) < 0.7 * alone


if __name__ == "__main__":
    main(*sys.argv[1:])
