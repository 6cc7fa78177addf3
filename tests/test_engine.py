"""Scores made into the store: whatever happens on the way, in the end they are those of an undisturbed run.

This file is also the script of the processes that are killed and of those that meet.
"""

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed")

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from trl_helpers import one_thread  # noqa: F401

from stm_plugin.ranks import Ranks
from stm_plugin.scoring import engine
from stm_plugin.scoring.documents import Documents
from stm_plugin.scoring.engine import BATCHES_PER_SHARD, find_or_make_scores, pieces
from stm_plugin.scoring.nll import nullcontext, score
from stm_plugin.scoring.plan import ScorePlan
from stm_plugin.scoring.store import MANIFEST, Interval, ScoresError, ScoresKey, ScoreStore, entries

KEY = ScoresKey("model", "none", "torch.float32", "none", "data")
TOKENS_PER_BATCH = 64
SMALL_SHARD = 4
VOCABULARY = 50


def make_plan(num_rows=200, seed=0):
    rng = np.random.default_rng(seed)
    input_ids = [rng.integers(0, VOCABULARY, rng.integers(2, 24)).tolist() for _ in range(num_rows)]
    labels = [[-100] * (len(row) // 3) + row[len(row) // 3 :] for row in input_ids]
    return ScorePlan.of(Documents.from_rows(input_ids, labels))


def make_model(layers=1):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config)


def make_scores(store, plan, model, tokens_per_batch=TOKENS_PER_BATCH):
    return find_or_make_scores(
        store,
        KEY,
        plan,
        model,
        tokens_per_batch=tokens_per_batch,
        autocast=nullcontext,
        ranks=Ranks(),
        progress=False,
    )


def contents(store):
    return {file.name: file.read_bytes() for file in store.path(KEY).iterdir()}


def recorded_budgets(store):
    """The token budget that was asked for, and that of each shard, as the manifest has them."""
    manifest = json.loads((store.path(KEY) / MANIFEST).read_text())
    return manifest["tokens_per_batch"], [shard[3] for shard in manifest["shards"]]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(engine, "BATCHES_PER_SHARD", SMALL_SHARD)


@pytest.fixture(scope="module")
def plan():
    return make_plan()


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture
def store(tmp_path):
    return ScoreStore(tmp_path / "scores")


@pytest.fixture
def forwards(model):
    """Batches that pass the model while the test runs."""
    seen = []
    handle = model.get_input_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    yield seen
    handle.remove()


def test_scores_are_made_once_and_then_found(store, plan, model, forwards):
    made, origin = make_scores(store, plan, model)
    assert origin.startswith("made in ")
    num_batches = len(plan.batches(TOKENS_PER_BATCH))
    assert len(forwards) == num_batches > 3 * SMALL_SHARD
    found, origin = make_scores(store, plan, model)
    assert origin == "found"
    assert len(forwards) == num_batches
    assert np.array_equal(made, found)
    assert np.array_equal(made, score(model, plan, tokens_per_batch=TOKENS_PER_BATCH, progress=False))
    assert len(contents(store)) == 1 + -(-num_batches // SMALL_SHARD)


def test_nothing_to_score(store, model, forwards):
    scores, _ = make_scores(store, ScorePlan.of(Documents.from_rows([[1, 2]], [[-100, -100]])), model)
    assert scores.shape == (0,)
    assert forwards == []
    assert list(contents(store)) == [MANIFEST]


def test_the_store_takes_little_more_than_the_scores(store, model):
    plan = make_plan(3000)
    make_scores(store, plan, model, tokens_per_batch=4096)
    (entry,) = entries(store.root)
    assert entry.num_scores == plan.num_scores
    assert entry.num_bytes <= 4.3 * plan.num_scores


# What is missing.


@given(cuts=st.lists(st.integers(0, 1000), max_size=12, unique=True), budget=st.integers(20, 300))
def test_pieces_fill_the_gaps_and_nothing_else(cuts, budget):
    plan = make_plan(60, seed=1)
    places = sorted(min(cut, plan.num_scores) for cut in cuts)
    missing = [Interval(*pair) for pair in zip(places[::2], places[1::2], strict=False) if pair[0] < pair[1]]
    shards = _grouped(plan.batches(budget))
    filled = np.zeros(plan.num_scores, int)
    for piece in pieces(plan, budget, missing):
        filled[piece.interval.start : piece.interval.stop] += 1
        assert any(set(piece.batches) <= set(shard) for shard in shards)
        assert plan.offsets[piece.batches[0].start] <= piece.interval.start
        assert plan.offsets[piece.batches[-1].stop] >= piece.interval.stop
        assert plan.offsets[piece.batches[0].stop] > piece.interval.start  # none for nothing
        assert plan.offsets[piece.batches[-1].start] < piece.interval.stop
    wanted = np.zeros(plan.num_scores, int)
    for gap in missing:
        wanted[gap.start : gap.stop] += 1
    assert np.array_equal(filled, wanted)


def _grouped(batches):
    return [batches[start : start + engine.BATCHES_PER_SHARD] for start in range(0, len(batches), SMALL_SHARD)]


def test_another_token_budget_goes_on_where_the_first_stopped(store, plan, model, forwards):
    """Only what it needs is scored, in batches of its own size."""
    _stopped_after(store, plan, model, num_batches=3 * SMALL_SHARD + 1)
    whole = score(model, plan, tokens_per_batch=TOKENS_PER_BATCH, progress=False)
    before = len(forwards)
    scores, _ = make_scores(store, plan, model, tokens_per_batch=TOKENS_PER_BATCH // 2)
    assert np.allclose(scores, whole, atol=1e-5)
    kept = plan.offsets[plan.batches(TOKENS_PER_BATCH)[3 * SMALL_SHARD - 1].stop]
    assert np.array_equal(scores[:kept], whole[:kept])
    assert max(rows * length for rows, length in forwards[before:]) <= TOKENS_PER_BATCH // 2
    assert len(forwards) - before < len(plan.batches(TOKENS_PER_BATCH // 2))
    assert np.array_equal(store.read(KEY, plan.num_scores), scores)
    asked, budgets = recorded_budgets(store)
    assert asked == TOKENS_PER_BATCH // 2
    assert budgets[:3] == [TOKENS_PER_BATCH] * 3  # as the first run made them
    assert set(budgets[3:]) == {TOKENS_PER_BATCH // 2}


class _StopError(Exception):
    pass


def _stopped_after(store, plan, model, num_batches, error=_StopError):
    calls = iter(range(10**6))

    def stop(*_):
        if next(calls) == num_batches:
            raise error

    handle = model.get_input_embeddings().register_forward_pre_hook(stop)
    with pytest.raises(error):
        make_scores(store, plan, model)
    handle.remove()


@pytest.mark.parametrize("error", [_StopError, KeyboardInterrupt])
def test_a_run_that_stops_loses_one_shard_at_most(error, store, plan, model, forwards):
    _stopped_after(store, plan, model, num_batches=2 * SMALL_SHARD + 3, error=error)
    assert store.read(KEY, plan.num_scores) is None
    assert not store.path(KEY).exists()
    before = len(forwards)
    scores, _ = make_scores(store, plan, model)  # the lock is free
    assert len(forwards) - before == len(plan.batches(TOKENS_PER_BATCH)) - 2 * SMALL_SHARD
    assert np.array_equal(scores, score(model, plan, tokens_per_batch=TOKENS_PER_BATCH, progress=False))


# Damage.


def test_random_damage_is_found_and_only_it_is_made_again(store, plan, model, forwards, caplog):
    """100 flips of a bit or truncations, in any file of the entry."""
    scores, _ = make_scores(store, plan, model)
    good, rng = contents(store), random.Random(0)
    for trial in range(100):
        name = rng.choice(sorted(good))
        damaged = bytearray(good[name])
        if rng.random() < 0.3:
            del damaged[rng.randrange(len(damaged)) :]
        else:
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        if bytes(damaged).rstrip() == good[name].rstrip():
            continue  # the line feed at the end of the manifest
        (store.path(KEY) / name).write_bytes(damaged)
        (report,) = entries(store.root)
        assert report.faults, (trial, name)
        with pytest.raises(ScoresError, match="cannot be used"):
            store.read(KEY, plan.num_scores)
        before = len(forwards)
        caplog.clear()
        again, _ = make_scores(store, plan, model)
        assert "are damaged and are made again" in caplog.text
        assert len(forwards) - before <= (SMALL_SHARD if name != MANIFEST else 0)
        assert np.array_equal(again, scores)
        assert contents(store) == good
        assert entries(store.root)[0].faults == []


def test_an_entry_that_contradicts_its_key_is_made_again(store, plan, model, forwards):
    """A folder of other scores, renamed to this key's."""
    other = ScoreStore(store.root.parent / "other")
    make_scores(other, plan, make_model(layers=2))
    shutil.copytree(other.path(KEY), store.path(KEY))
    manifest = json.loads((store.path(KEY) / MANIFEST).read_text())
    manifest["key"]["model"] = "another"
    (store.path(KEY) / MANIFEST).write_text(json.dumps(manifest))
    renamed = ScoresKey(**vars(KEY) | {"data": "other"})
    os.rename(store.path(KEY), store.path(renamed))
    before = len(forwards)
    scores, _ = find_or_make_scores(
        store,
        renamed,
        plan,
        model,
        tokens_per_batch=TOKENS_PER_BATCH,
        autocast=nullcontext,
        ranks=Ranks(),
        progress=False,
    )
    assert len(forwards) - before == len(plan.batches(TOKENS_PER_BATCH))
    assert np.array_equal(scores, score(model, plan, tokens_per_batch=TOKENS_PER_BATCH, progress=False))


# Memory.


def _out_of_memory_above(model, num_tokens):
    def check(_, args):
        if args[0].numel() > num_tokens:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    return model.get_input_embeddings().register_forward_pre_hook(check)


def test_out_of_memory_halves_the_batches_and_is_recorded(store, plan, model, forwards, caplog):
    """The device's error, raised by hand: no CPU has it."""
    expected = score(model, plan, tokens_per_batch=TOKENS_PER_BATCH, progress=False)
    del forwards[:]
    handle = _out_of_memory_above(model, 40)
    try:
        scores, _ = make_scores(store, plan, model)
    finally:
        handle.remove()
    assert np.allclose(scores, expected, atol=1e-5)
    assert caplog.text.count("Out of memory: scoring goes on with at most") in (1, 2)
    failed = [shape for shape in forwards if shape.numel() > 40]
    assert len(failed) <= 2  # it does not run into it again
    asked, budgets = recorded_budgets(store)
    assert asked == TOKENS_PER_BATCH
    assert set(budgets) <= set(range(1, TOKENS_PER_BATCH))
    assert np.array_equal(store.read(KEY, plan.num_scores), scores)


def test_a_row_that_does_not_fit_is_an_error(store, plan, model):
    handle = _out_of_memory_above(model, 10)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            make_scores(store, plan, model)
    finally:
        handle.remove()


def test_scores_that_are_no_numbers_are_not_kept(store, plan):
    broken = make_model()
    broken.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="scores are NaN"):
        make_scores(store, plan, broken)
    assert list(store.root.glob("*/shard-*.npy")) == []
    make_scores(store, plan, make_model())


def test_a_wait_for_another_is_made_of_short_ones(store, plan, model, monkeypatch, caplog):
    """Or the other processes of the run would give up waiting for the one that waits."""
    monkeypatch.setattr(engine, "_SECONDS_OF_WAITING", 0.2)
    store.check_writable()
    begun, release = threading.Event(), threading.Event()

    def hold():
        with store.writing(KEY, plan.num_scores, TOKENS_PER_BATCH):
            begun.set()
            release.wait(60)

    class SecondLine(logging.Handler):
        def emit(self, record):
            if caplog.text.count("this one waits for it") > 1:
                release.set()

    holder = threading.Thread(target=hold)
    holder.start()
    begun.wait()
    second = SecondLine()
    logging.getLogger("stm_plugin").addHandler(second)
    try:
        with caplog.at_level("INFO"):
            make_scores(store, plan, model)
    finally:
        logging.getLogger("stm_plugin").removeHandler(second)
    holder.join()
    assert release.is_set(), "it was told more than once, in the time that the other one took"


# Disks.


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs the right to mount a tmpfs: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_fills_up(small_disk, tmp_path, model):
    plan = make_plan(3000)
    store = ScoreStore(small_disk / "scores")
    with pytest.raises(ScoresError, match=r"could not be written to .* No space left on device"):
        make_scores(store, plan, model)
    assert store.read(KEY, plan.num_scores) is None
    kept = len(list(small_disk.glob("scores/.*/shard-*.npy")))
    assert kept > 3
    subprocess.run(["mount", "-o", "remount,size=1m", small_disk], check=True)
    scores, _ = make_scores(store, plan, model)
    undisturbed = ScoreStore(tmp_path / "undisturbed")
    assert np.array_equal(make_scores(undisturbed, plan, model)[0], scores)
    assert contents(undisturbed) == contents(store)


def test_a_read_only_disk(small_disk, plan, model):
    """What is there is read; what is not cannot be made."""
    store = ScoreStore(small_disk / "scores")
    scores, _ = make_scores(store, plan, model)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    store.check_usable()
    assert np.array_equal(make_scores(store, plan, model)[0], scores)
    with pytest.raises(ScoresError, match="Read-only file system"):
        make_scores(ScoreStore(small_disk / "others"), plan, model)
    with pytest.raises(ScoresError, match="Read-only file system"):
        ScoreStore(small_disk / "others").check_usable()


# Processes that are killed, and that meet.


def main(root, num_rows):
    """Score, and say when a shard is written."""
    torch.set_num_threads(1)
    engine.BATCHES_PER_SHARD = SMALL_SHARD
    plan, model = make_plan(int(num_rows)), make_model(layers=2)
    put = engine.Draft.put

    def put_and_tell(self, *args):
        put(self, *args)
        sys.stdout.write("shard\n")
        sys.stdout.flush()

    engine.Draft.put = put_and_tell
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()
    _, origin = make_scores(ScoreStore(root), plan, model)
    sys.stdout.write(f"{origin}\n")


def _start(root, num_rows):
    paths = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
    process = subprocess.Popen(
        [sys.executable, __file__, root, str(num_rows)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
    )
    assert process.stdout.readline() == "ready\n"
    return process


def _go(process):
    process.stdin.write("go\n")
    process.stdin.flush()


def _killed_and_resumed(tmp_path, num_kills, num_rows=3000):
    plan = make_plan(num_rows)
    undisturbed = ScoreStore(tmp_path / "undisturbed")
    started = time.monotonic()
    make_scores(undisturbed, plan, make_model(layers=2))
    duration = time.monotonic() - started
    store, rng, kills = ScoreStore(tmp_path / "killed"), random.Random(0), 0
    done = 0
    while kills < num_kills:
        process = _start(store.root, num_rows)
        _go(process)
        while not kills and not list(store.root.glob("*/shard-*.npy")) and process.poll() is None:
            time.sleep(0.01)  # the first is killed when it has made something
        time.sleep(rng.uniform(0, 2 * duration / num_kills))
        process.kill()
        told = process.communicate()[0].splitlines()
        assert process.returncode == -signal.SIGKILL or told[-1].startswith(("made", "found"))
        kills += 1
        done += told.count("shard")
        kept = len(list(store.root.glob("*/shard-*.npy")))
        assert done <= kept <= done + 1  # it may have been killed before it could say so
        done = kept
    process = _start(store.root, num_rows)
    _go(process)
    told = process.communicate(timeout=120)[0].splitlines()
    assert process.returncode == 0
    assert done + told.count("shard") == len(contents(undisturbed)) - 1
    assert contents(store) == contents(undisturbed)
    return done


def test_killed_three_times(tmp_path):
    assert _killed_and_resumed(tmp_path, 3) > 0


@pytest.mark.slow
def test_killed_twenty_times(tmp_path):
    _killed_and_resumed(tmp_path, 20, num_rows=20_000)


def test_two_at_once(tmp_path):
    """One makes the scores; the other waits for it and finds them."""
    store = ScoreStore(tmp_path / "scores")
    processes = [_start(store.root, 3000) for _ in range(2)]
    for process in processes:
        _go(process)
    told = [process.communicate(timeout=120)[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted(lines[-1].split()[0] for lines in told) == ["found", "made"]
    assert sum(lines.count("shard") for lines in told) == len(contents(store)) - 1
    assert entries(store.root)[0].faults == []


def test_the_shards_of_the_package_hold_more():
    """The tests' are small, so that there are many."""
    assert BATCHES_PER_SHARD > SMALL_SHARD


if __name__ == "__main__":
    main(*sys.argv[1:])
