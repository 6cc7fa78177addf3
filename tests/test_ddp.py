"""Real DDP, two gloo processes on the CPU, against one process. This file is also the script that they run."""

import json
import math
import os
import sys
import traceback
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed")


os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from processes import load, rows_with_an_empty_pair, save_tuned_model, saved_llama, two_processes
from trl_helpers import (
    IGNORE,
    CountTokens,
    RecordingSFT,
    RecordingSTM,
    documents_of_batches,
    kept_gradient,
    masked_rows,
    one_thread,  # noqa: F401
    plain_trainer,
    same_bits,
    stm_trainer,
    weights,
)

NUM_ROWS = 24


def _options(threshold, **options):
    return {
        "stm_threshold": threshold,
        "stm_tokens_per_batch": 48,
        "max_length": None,
        "train_sampling_strategy": "sequential",
        "max_grad_norm": 0.0,
        "num_train_epochs": 1,
        "lr_scheduler_type": "constant",
    } | options


def _lora():
    from peft import LoraConfig

    return {"peft_config": LoraConfig(r=4, lora_alpha=16, lora_dropout=0.1, target_modules=["q_proj", "v_proj"])}


def _summary(trainer, count):
    return {
        "scored_tokens": count.tokens,
        "digest": trainer._stm_run.receipt["mask_digest"],
        "receipt": trainer._stm_run.receipt,
        "labels": [list(row) for row in trainer.train_dataset["labels"]],
        "losses": trainer.losses,
        "kept": [int((batch["labels"][..., 1:] != IGNORE).sum()) for batch in trainer.batches],
        "items": [float(items) for items in trainer.items],
        "documents": documents_of_batches(trainer.batches),
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
        "gradients": trainer.gradients[0],
        "weights": weights(trainer.model),
    }


def _scored_run(folder, out, trainer=None, resume=None, rows=None, **options):
    """One STM run; tokens that pass the model in eval mode are those that were scored."""
    model, tokenizer = load(folder)
    settings = json.loads((folder / "settings.json").read_text())
    made = stm_trainer(
        model,
        rows or settings["rows"],
        tokenizer,
        out,
        trainer,
        trainer_class=RecordingSTM,
        **_options(settings["threshold"], **options),
    )
    with CountTokens(made.model) as count:
        original = made._stm_mask

        def masking(checkpoint):
            outcome = original(checkpoint)
            count.handle.remove()  # what follows is training
            return outcome

        made._stm_mask = masking
        made.train(resume_from_checkpoint=resume)
    return _summary(made, count)


def _live_run(folder, out, **options):
    model, tokenizer = load(folder)
    settings = json.loads((folder / "settings.json").read_text())
    options = _options(settings["threshold"], max_steps=3) | options
    made = stm_trainer(model, settings["rows"], tokenizer, out, trainer_class=RecordingSTM, **options)
    made.train()
    return {
        "gradients": made.gradients,
        "items": [float(items) for items in made.items],
        "kept": [int((batch["labels"][..., 1:] != IGNORE).sum()) for batch in made.batches],
        "log": [entry for entry in made.state.log_history if "loss" in entry],
        "totals": vars(made._stm_masking.totals),
    }


def _plain_run(folder, out, make, recording, **options):
    model, tokenizer = load(folder)
    rows = json.loads((folder / "settings.json").read_text())["rows"]
    torch.manual_seed(0)
    made = make(model, rows, tokenizer, out, _lora(), trainer_class=recording, **_options(math.inf, **options))
    made.train()
    return {"losses": made.losses, "weights": weights(made.model), "random_states": made.random_states}


def _refusal(folder, out, **options):
    try:
        _scored_run(folder, out, **options)
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def _scenarios(folder, out):
    """Name and function of each scenario, in the order in which both ranks go through them."""
    rank = os.environ["RANK"]
    damaged = out / "damaged"
    yield "full", lambda: _scored_run(folder, out / "full", per_device_train_batch_size=2)
    yield (
        "accumulated",
        lambda: _scored_run(folder, out / "accumulated", per_device_train_batch_size=1, gradient_accumulation_steps=2),
    )
    yield (
        "bfd",
        lambda: _scored_run(folder, out / "bfd", per_device_train_batch_size=1, packing=True, max_length=66),
    )
    yield (
        "lora",
        lambda: _scored_run(
            folder, out / "lora", _lora(), per_device_train_batch_size=2, stm_scores_dir=str(out / "own")
        ),
    )
    # Plain SGD and weights alone, since transformers 5.16 cannot load optimizer states in CPU processes.
    steps = {"per_device_train_batch_size": 2, "max_steps": 4, "optim": "sgd", "save_only_model": True}
    steps |= {"save_strategy": "steps", "save_steps": 2}
    yield "saved", lambda: _scored_run(folder, out / "saved", **steps)
    # With the scores gone, both ranks make them again, before the checkpoint's weights are loaded.
    yield (
        "resumed",
        lambda: _scored_run(
            folder,
            out / "resumed",
            resume=str(out / "saved" / "checkpoint-2"),
            stm_scores_dir=str(out / "other scores"),
            **steps,
        ),
    )
    yield (
        "two models",
        lambda: _scored_run(folder, out / "two", per_device_train_batch_size=2, **_two_models(folder)),
    )
    live = {"stm_reference": "current"}
    yield "live", lambda: _live_run(folder, out / "live", per_device_train_batch_size=2, **live)
    steps_of_two = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    yield "live, accumulated", lambda: _live_run(folder, out / "live accumulated", **steps_of_two, **live)
    fraction = {"stm_threshold": None, "stm_mask_fraction": 0.3}
    yield (
        "live fraction",
        lambda: _live_run(folder, out / "fraction", per_device_train_batch_size=2, **fraction, **live),
    )
    yield "plain", lambda: _plain_run(folder, out / "plain", plain_trainer, RecordingSFT)
    yield "inf", lambda: _plain_run(folder, out / "inf", stm_trainer, RecordingSTM)
    # Each refusal happens on rank 0 alone (`file` is a folder for rank 1), and must end both.
    unwritable = out / f"file of rank {rank}" / "scores"
    if rank == "0":
        unwritable.parent.write_text("not a folder")
    yield "unwritable", lambda: _refusal(folder, out / "refused", stm_scores_dir=str(unwritable))
    yield "damaged scores", lambda: _damage(folder, out, damaged, rank)
    yield "nothing left", lambda: _refusal(folder, out / "refused", stm_threshold=1.0001)
    rows = json.loads((folder / "settings.json").read_text())["rows"]
    for name, options in _disagreements(rank, rows).items():
        yield name, lambda options=options: _refusal(folder, out / "refused", **options)
    yield "after refusals", lambda: _scored_run(folder, out / "full", per_device_train_batch_size=2, max_steps=1)


def _two_models(folder):
    return {"stm_strategy": "difference", "stm_tuned_model": str(folder / "tuned")}


def _disagreements(rank, rows):
    """Options of this rank, of which the other has others."""
    if rank == "0":
        return {
            "thresholds differ": {"stm_threshold": 2.5},
            "references differ": {"stm_reference": "current"},
            "a label differs": {},
            "orders differ": {},
            "numbers of rows differ": {},
            "one rank alone errs": {},
        }
    changed = {**rows[5], "labels": [*rows[5]["labels"][:-1], IGNORE]}
    return {
        "thresholds differ": {"stm_threshold": 2.6},
        "references differ": {},
        "a label differs": {"rows": [*rows[:5], changed, *rows[6:]]},
        "orders differ": {"rows": rows[::-1]},
        "numbers of rows differ": {"rows": rows[:-2]},
        "one rank alone errs": {"stm_reference": "no/such/model"},
    }


def _damage(folder, out, damaged, rank):
    _scored_run(folder, out / "refused", stm_scores_dir=str(damaged), max_steps=1)
    if rank == "0":
        next(damaged.glob("*/manifest.json")).write_text("{}")
    return _scored_run(folder, out / "full", per_device_train_batch_size=2, max_steps=1, stm_scores_dir=str(damaged))


def main(folder):
    """What each rank does: every scenario in turn, its outcome in a file of its own."""
    torch.set_num_threads(1)
    folder, rank = Path(folder), os.environ["RANK"]
    found = {}
    for name, scenario in _scenarios(folder, folder / "out"):
        try:
            found[name] = scenario()
        except Exception:
            sys.stderr.write(f"rank {rank}, {name}:\n{traceback.format_exc()}")
            raise
        torch.save(found, folder / f"rank-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def both(tokenizer, tmp_path_factory):
    """Outcomes of both ranks of one launch, and the folder they ran in."""
    folder = tmp_path_factory.mktemp("ddp")
    model = saved_llama(folder, tokenizer)
    rows, nll, nats = rows_with_an_empty_pair(tokenizer, model, NUM_ROWS)
    expected = masked_rows(rows, nll, nats)
    save_tuned_model(model, tokenizer, folder / "tuned")
    (folder / "settings.json").write_text(
        json.dumps({"rows": rows, "threshold": math.exp(nats), "expected": expected, "out": "out"})
    )
    (folder / "out").mkdir()
    ranks, errors = two_processes(__file__, folder)
    return ranks, folder, errors


def _alone(folder, tmp_path, monkeypatch, **options):
    monkeypatch.setenv("STM_HOME", str(tmp_path / "one"))
    return _scored_run(folder, tmp_path / "alone", **options)


def _same_gradient(found, expected, tolerance=1e-5):
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    assert scale > 1e-4
    for name, gradient in found.items():
        assert float((gradient - expected[name]).abs().max()) <= tolerance * scale, name


@pytest.mark.parametrize(
    ("name", "alone"),
    [
        ("full", {"per_device_train_batch_size": 4}),
        ("accumulated", {"per_device_train_batch_size": 4}),
        ("bfd", {"per_device_train_batch_size": 2, "packing": True, "max_length": 66}),
    ],
)
def test_two_processes_are_one(name, alone, both, tmp_path, monkeypatch):
    ranks, folder, _ = both
    one = _alone(folder, tmp_path, monkeypatch, **alone)
    assert len(one["labels"]) % 2 == 0, "accelerate would repeat a row to make ranks even"
    rank0, rank1 = ranks[0][name], ranks[1][name]
    assert rank0["digest"] == rank1["digest"] == one["digest"]
    assert rank0["labels"] == rank1["labels"] == one["labels"]
    assert rank0["receipt"]["masked_tokens"] == one["receipt"]["masked_tokens"] > 0
    # The same gradient on both ranks, that of one process, and that of plain autograd in float64.
    assert same_bits(rank0["gradients"], rank1["gradients"])
    _same_gradient(rank0["gradients"], one["gradients"])
    documents = one["documents"][: len(one["documents"]) if name == "bfd" else 4]
    if name != "bfd":
        double, _ = kept_gradient(load(folder)[0], documents)
        _same_gradient({k: v.double() for k, v in rank0["gradients"].items()}, double)
    # Counts are global: the same number on both ranks, the sum of what both keep.
    assert rank0["items"] == rank1["items"]
    assert rank0["log"][0]["loss"] == pytest.approx(one["log"][0]["loss"], rel=1e-5)
    for metric in ("stm/kept_tokens", "stm/masked_fraction", "stm/threshold"):
        assert [entry[metric] for entry in rank0["log"]] == [entry[metric] for entry in one["log"]]
    total = one["receipt"]["label_tokens"] - one["receipt"]["masked_tokens"]
    assert sum(rank0["kept"]) + sum(rank1["kept"]) == total == sum(entry["stm/kept_tokens"] for entry in rank0["log"])
    for name_, tensor in one["weights"].items():
        assert torch.allclose(rank0["weights"][name_], tensor, atol=2e-2), name_
        assert torch.equal(rank0["weights"][name_], rank1["weights"][name_])


def test_two_processes_compare_two_models_as_one(both, tmp_path, monkeypatch):
    ranks, folder, _ = both
    one = _alone(folder, tmp_path, monkeypatch, per_device_train_batch_size=4, **_two_models(folder))
    assert 0 < one["receipt"]["masked_tokens"] < one["receipt"]["label_tokens"]
    for rank in ranks:
        found = rank["two models"]
        assert found["labels"] == one["labels"]
        assert found["receipt"]["tuned_scores_key"] == one["receipt"]["tuned_scores_key"]
        _same_gradient(found["gradients"], one["gradients"])


@pytest.mark.parametrize("name", ["live", "live, accumulated", "live fraction"])
def test_two_processes_are_one_under_live_weights(name, both, tmp_path, monkeypatch):
    ranks, folder, _ = both
    options = {"stm_threshold": None, "stm_mask_fraction": 0.3} if name == "live fraction" else {}
    one = _live_run(folder, tmp_path, per_device_train_batch_size=4, stm_reference="current", **options)
    rank0, rank1 = ranks[0][name], ranks[1][name]
    assert 0 < one["totals"]["masked_tokens"] < one["totals"]["label_tokens"]
    assert same_bits(rank0["gradients"][0], rank1["gradients"][0])
    _same_gradient(rank0["gradients"][0], one["gradients"][0])
    assert rank0["items"] == rank1["items"]
    assert rank0["totals"] == rank1["totals"]
    assert rank0["log"][0]["loss"] == pytest.approx(one["log"][0]["loss"], rel=1e-5)
    assert rank0["log"][0]["stm/kept_tokens"] == one["log"][0]["stm/kept_tokens"] == one["kept"][0]
    if name == "live":
        assert rank1["kept"][0] == 0 < rank0["kept"][0]


def test_the_first_step_of_a_rank_was_masked_whole(both):
    """So that the gradients above are those of a step in which one rank keeps nothing."""
    ranks, folder, _ = both
    assert ranks[1]["full"]["kept"][0] == 0 < ranks[0]["full"]["kept"][0]
    assert ranks[1]["full"]["losses"][0] == 0.0
    assert ranks[0]["full"]["labels"] == json.loads((folder / "settings.json").read_text())["expected"]


def test_each_token_is_scored_once(both, tmp_path, monkeypatch):
    ranks, folder, _ = both
    one = _alone(folder, tmp_path, monkeypatch, per_device_train_batch_size=4)
    shares = [rank["full"]["scored_tokens"] for rank in ranks]
    assert sum(shares) == one["scored_tokens"]
    assert min(shares) > 0.25 * sum(shares)
    for name in ("accumulated", "bfd"):
        assert [rank[name]["scored_tokens"] for rank in ranks] == [0, 0], f"{name} did not find the scores"
    assert sum(rank["lora"]["scored_tokens"] for rank in ranks) == one["scored_tokens"]


def test_adapters_share_one_digest(both):
    ranks, _, _ = both
    assert ranks[0]["lora"]["digest"] == ranks[1]["lora"]["digest"] == ranks[0]["full"]["digest"]
    assert ranks[0]["lora"]["receipt"]["scores_key"] == ranks[0]["full"]["receipt"]["scores_key"]


def test_without_masks_two_processes_are_sfts(both):
    for rank in both[0]:
        assert rank["plain"]["losses"] == rank["inf"]["losses"]
        assert rank["plain"]["random_states"] == rank["inf"]["random_states"]
        assert same_bits(rank["plain"]["weights"], rank["inf"]["weights"])


def test_resuming_with_scores_gone(both):
    for rank in both[0]:
        assert rank["resumed"]["digest"] == rank["saved"]["digest"]
        assert rank["resumed"]["losses"] == rank["saved"]["losses"][2:]
        assert same_bits(rank["resumed"]["weights"], rank["saved"]["weights"])
    shares = [rank["resumed"]["scored_tokens"] for rank in both[0]]
    assert sum(shares) == sum(rank["full"]["scored_tokens"] for rank in both[0])


def test_receipts_are_written_once(both):
    ranks, folder, _ = both
    for place in ("full", "saved", "saved/checkpoint-2", "saved/checkpoint-4"):
        written = json.loads((folder / "out" / place / "stm.json").read_text())
        assert written["mask_digest"] == ranks[1]["full"]["digest"]
    state = json.loads((folder / "out" / "saved" / "checkpoint-4" / "trainer_state.json").read_text())
    assert (
        state["stateful_callbacks"]["STMState"]["attributes"]["receipt"]["mask_digest"] == ranks[0]["full"]["digest"]
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("unwritable", "ScoresError: Scores cannot be written to"),
        ("nothing left", "ValueError: Every one of the"),
    ],
)
def test_an_error_of_the_main_process_ends_both(name, message, both):
    found = [rank[name] for rank in both[0]]
    assert found[0].startswith(message)
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("thresholds differ", "disagree on stm_threshold (rank 0: 2.5, rank 1: 2.6). Start all of them with the same"),
        ("references differ", "disagree on stm_reference (rank 0: 'current', rank 1: 'initial') and training"),
        ("a label differs", "disagree on training rows (rank 0: "),
        ("orders differ", "disagree on training rows (rank 0: "),
        ("numbers of rows differ", "disagree on training rows (rank 0: "),
        ("one rank alone errs", "stm_reference='no/such/model' is neither 'initial' nor a model that can be loaded"),
    ],
)
def test_ranks_that_disagree_all_stop(name, message, both):
    """That `both` ends at all shows that none waits for another."""
    found = [rank[name] for rank in both[0]]
    assert message in found[0]
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["damaged scores", "after refusals"])
def test_a_run_after_refusals_or_damage_is_as_ever(name, both):
    for rank in both[0]:
        assert rank[name]["digest"] == rank["full"]["digest"]
        assert rank[name]["losses"] == rank["full"]["losses"][:1]


def test_damage_is_named_by_one_process(both):
    assert both[2].count("are damaged and are made again") == 1


def test_lines_are_logged_by_one_process_only(both):
    _, _, errors = both
    runs = (
        "full",
        "accumulated",
        "bfd",
        "lora",
        "saved",
        "resumed",
        "inf",
        "damaged scores",
        "damaged scores",
        "after refusals",
    )
    runs += ("two models", "live", "live, accumulated", "live fraction")
    assert errors.count("STM is on") == len(runs)


def test_each_rank_gets_its_own_rows(both):
    ranks, folder, _ = both
    rows = json.loads((folder / "settings.json").read_text())["rows"]
    seen = [tuple(ids) for rank in ranks for ids, _ in rank["full"]["documents"]]
    assert sorted(seen) == sorted(tuple(row["input_ids"]) for row in rows)


if __name__ == "__main__":
    main(sys.argv[1])
