"""Rows kept on disk beside their scores: found again, checked, never trusted; and the runs they belong to."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from report_helpers import IGNORE, WORDS, kept_of, random_rows, stored

from stm_plugin.cli import main
from stm_plugin.inspection.scored import options_of_receipt, read_scored
from stm_plugin.scoring.document_store import (
    DocumentsError,
    KeptDocuments,
    documents_folder,
    find_documents,
    read_documents,
)
from stm_plugin.scoring.documents import Documents
from stm_plugin.scoring.plan import ScorePlan
from stm_plugin.scoring.store import ScoresError


def same(one, other):
    for name in ("input_ids", "labels", "document_offsets", "row_offsets"):
        np.testing.assert_array_equal(getattr(one.documents, name), getattr(other.documents, name))
    np.testing.assert_array_equal(one.row_groups, other.row_groups)
    for name in ("text_of", "stop_token_ids", "name", "groups"):
        assert getattr(one, name) == getattr(other, name)


def test_what_is_kept_is_read():
    rows = random_rows(7)
    rows[2]["labels"][0] = rows[2]["input_ids"][0]  # a label at position 0
    rows[3]["labels"][-2] = 9  # a label that is not the token
    words = [*WORDS[:-2], "\ud800 \x00 </script>", "é"]
    kept = kept_of(rows, words=words, name="naïve \u202e", groups=("a", "b"), row_groups=[0, 1, 0, 1, 0, 1, 1])
    plan = ScorePlan.of(kept.documents)
    path = kept.write(plan)
    assert path.parent == Path(os.environ["STM_HOME"]) / "documents"
    again, its_plan = read_documents(path)
    same(again, kept)
    assert its_plan.fingerprint == plan.fingerprint
    assert find_documents(plan.fingerprint) == path


def test_packed_rows_are_read():
    ids = [[1, 2, 3, 4, 5], [6, 7]]
    documents = Documents.from_rows(ids, ids, [[2, 3], [2]])
    kept = KeptDocuments(documents, dict(enumerate(WORDS)), frozenset(), "packed")
    same(read_documents(kept.write(ScorePlan.of(documents)))[0], kept)


def test_kept_once_and_without_a_draft():
    data, _ = stored()
    plan = ScorePlan.of(data.documents)
    (path,) = documents_folder().iterdir()
    before = path.stat().st_mtime_ns
    assert data.kept.write(plan) == path
    assert path.stat().st_mtime_ns == before
    assert [path] == list(documents_folder().iterdir())


def test_data_sets_with_the_same_documents_are_told_apart():
    rows = random_rows(5)
    first, second = kept_of(rows), kept_of([*rows[::-1], rows[0]])
    plan, other = ScorePlan.of(first.documents), ScorePlan.of(second.documents)
    assert plan.fingerprint == other.fingerprint
    one, two = first.write(plan), second.write(other)
    assert one != two
    os.utime(one, ns=(1, 1))
    assert find_documents(plan.fingerprint) == two
    same(read_documents(one)[0], first)
    same(read_documents(two)[0], second)


@pytest.mark.parametrize("fault", ["cut", "other bytes", "no archive", "renamed", "other rows", "pickle"])
def test_damage_is_found(fault):
    _, entry = stored()
    (path,) = documents_folder().iterdir()
    content = bytearray(path.read_bytes())
    if fault == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif fault == "other bytes":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif fault == "no archive":
        path.write_bytes(b"hello")
    elif fault == "renamed":
        path.rename(path.with_name(path.name.replace(path.stem[-4:], "0000")))
    elif fault == "other rows":
        other = kept_of(random_rows(seed=9))
        moved = other.write(ScorePlan.of(other.documents))
        moved.replace(path.with_name(path.name.partition("-")[0] + "-" + moved.name.partition("-")[2]))
        path.unlink()
    else:
        np.savez(path, input_ids=np.array([{}], dtype=object))
    with pytest.raises(DocumentsError, match="Delete the file"):
        read_scored(entry)


def test_rows_that_are_gone():
    _, entry = stored()
    shutil.rmtree(documents_folder())
    with pytest.raises(DocumentsError, match="run the training or scoring command again"):
        read_scored(entry)


def test_an_entry_is_read(tmp_path, monkeypatch):
    data, entry = stored()
    again = read_scored(entry)
    same(again.kept, data.kept)
    np.testing.assert_array_equal(again.nll, data.nll)
    assert again.key == data.key
    assert again.receipt is None
    assert again.name == "model mmmmmmmm on some data"
    monkeypatch.chdir(entry)
    np.testing.assert_array_equal(read_scored(".").nll, data.nll)


def test_scores_follow_the_order_of_rows():
    rows = random_rows(8)
    data, entry = stored(rows)
    at = {tuple(row["input_ids"]): index for index, row in enumerate(rows)}
    shuffled = kept_of(rows[::-1])
    path = shuffled.write(ScorePlan.of(shuffled.documents))
    os.utime(path, ns=(2**62, 2**62))
    counts = np.cumsum([0, *(sum(label != IGNORE for label in row["labels"]) for row in rows)])
    expected = [data.nll[counts[i] : counts[i + 1]] for i in (at[tuple(row["input_ids"])] for row in rows[::-1])]
    np.testing.assert_array_equal(read_scored(entry).nll, np.concatenate(expected))


def test_no_such_folder(tmp_path, capsys):
    with pytest.raises(ScoresError, match=r"neither a stm\.json nor a manifest\.json"):
        read_scored(tmp_path)
    assert main(["sweep", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("stm: ")


@pytest.mark.parametrize("command", ["inspect", "sweep", "report"])
def test_unknown_flags_and_missing_sources_are_refused(command, capsys):
    for arguments in ([], ["somewhere", "--learning_rate", "1"]):
        with pytest.raises(SystemExit):
            main([command, *arguments])
    assert "unrecognized arguments: --learning_rate 1" in capsys.readouterr().err


# Runs.


@pytest.fixture
def run(tokenizer, make_model, chats, tmp_path):
    """Make a trainer of the chats, whose output folder is `tmp_path / "out"`."""
    pytest.importorskip("trl", reason="trl is not installed")
    from trl_helpers import stm_trainer

    def make(**options):
        rows = [chat | {"source": ("web", "books")[index % 2]} for index, chat in enumerate(chats)]
        return stm_trainer(make_model(), rows, tokenizer, tmp_path / "out", **options)

    return make


OPTIONS = {
    "threshold": {"stm_threshold": 1500.0},
    "fraction": {"stm_mask_fraction": 0.22},
    "low": {"stm_threshold": 1500.0, "stm_strategy": "low"},
    "random": {"stm_threshold": 1500.0, "stm_strategy": "random", "stm_seed": 3},
    "stop tokens": {"stm_threshold": 1500.0, "stm_keep_stop_tokens": True},
    "nothing": {"stm_threshold": float("inf")},
    "packed": {"stm_threshold": 1500.0, "packing": True, "max_length": 64, "padding_free": False},
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_a_run_is_read(kind, run, tmp_path):
    options = OPTIONS[kind]
    trainer = run(**options)
    rows = list(trainer.train_dataset)
    trainer.train()
    data = read_scored(tmp_path / "out")
    receipt = json.loads((tmp_path / "out" / "stm.json").read_text())
    assert data.receipt == receipt
    assert data.documents.input_ids.tolist() == [token for row in rows for token in row["input_ids"]]
    masks = data.masks()
    assert masks.num_masked == receipt["masked_tokens"]
    assert masks.threshold_nats == float(receipt["threshold_nats"])
    assert data.documents.digest(masks.masked) == receipt["mask_digest"]
    masked = [row["labels"] for row in trainer.train_dataset]
    assert masks.labels.tolist() == [label for row in masked for label in row]
    text = "".join(data.kept.text_of[token] for token in rows[0]["input_ids"])
    assert text == trainer.processing_class.decode(rows[0]["input_ids"])
    if kind != "packed":
        assert data.kept.groups == ("books", "web")
        assert data.kept.row_groups.tolist() == [1, 0] * 6


def test_a_checkpoint_is_read(run, tmp_path):
    run(stm_threshold=1500.0, save_strategy="steps", save_steps=2).train()
    checkpoint = next((tmp_path / "out").glob("checkpoint-*"))
    np.testing.assert_array_equal(read_scored(checkpoint).nll, read_scored(tmp_path / "out").nll)


def test_a_run_whose_receipt_was_changed_is_refused(run, tmp_path):
    run(stm_threshold=1500.0).train()
    path = tmp_path / "out" / "stm.json"
    receipt = json.loads(path.read_text())
    path.write_text(json.dumps(receipt | {"threshold": 10.0}))
    with pytest.raises(ScoresError, match="mask_digest differs"):
        read_scored(tmp_path / "out")


def test_a_run_of_live_masks_has_nothing_to_look_at(run, tmp_path):
    run(stm_reference="current", max_steps=1).train()
    with pytest.raises(ScoresError, match="scores anew at every step"):
        read_scored(tmp_path / "out")


def test_a_run_goes_on_where_rows_cannot_be_kept(run, tmp_path, caplog):
    documents_folder().parent.mkdir(parents=True, exist_ok=True)
    documents_folder().write_text("no folder")
    trainer = run(stm_threshold=1500.0)
    trainer.train()
    assert trainer.state.global_step > 0
    assert "could not be kept" in caplog.text
    assert json.loads((tmp_path / "out" / "stm.json").read_text())["documents_file"] is None


def test_options_of_a_receipt_are_the_runs(run):
    trainer = run(stm_mask_fraction=0.3, stm_strategy="random", stm_seed=7, stm_keep_stop_tokens=True)
    options = options_of_receipt(trainer.stm_score().receipt)
    expected = {
        "stm_mask_fraction": 0.3,
        "stm_threshold": None,
        "stm_strategy": "random",
        "stm_seed": 7,
        "stm_keep_stop_tokens": True,
    }
    assert {name: getattr(options, name) for name in expected} == expected


def test_scores_made_now(tokenizer, make_model, chats, tmp_path, capsys, monkeypatch):
    pytest.importorskip("trl", reason="trl is not installed")
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    flags = "--model_name_or_path model --dataset_name chats.jsonl --output_dir out --use_cpu true --bf16 false"
    assert main(["sweep", "--json", "--stm_keep_stop_tokens", *flags.split(), "--report_to", "none"]) == 0
    made = json.loads(capsys.readouterr().out)
    (entry,) = (Path(os.environ["STM_HOME"]) / "scores").glob("[!.]*")
    assert main(["sweep", "--json", "--stm_keep_stop_tokens", str(entry)]) == 0
    assert json.loads(capsys.readouterr().out) == made
    data = read_scored(entry)
    (tmp_path / "one.jsonl").write_text(json.dumps(chats[4]) + "\n", encoding="utf-8")
    one = flags.replace("chats.jsonl", "one.jsonl").split()
    assert main(["inspect", *one]) == 0  # random weights find every token unlikely
    assert re.search(r"perplexity above 2\.5 .*: (\d+) of \1 label tokens masked", capsys.readouterr().out)
    assert main(["sweep", *one]) == 0
    assert data.kept.name == "chats"
    assert replace(data, receipt={"model": "a/b"}).name == "b on chats"
