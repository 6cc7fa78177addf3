"""Final labels, digests, batches and evaluation of `STMSFTTrainer` against an oracle, for every form of data."""

import copy
import hashlib
import json
import math
import random

import numpy as np
import pytest

pytest.importorskip("trl", reason="trl is not installed")

import datasets
from conftest import TEXT
from trl_helpers import (
    IGNORE,
    MARGIN,
    RecordingSTM,
    as_dataset,
    assert_margin,
    cut,
    documents_of_batches,
    masked_rows,
    one_thread,  # noqa: F401
    oracle_digest,
    oracle_nll,
    plain_trainer,
    scores_of,
    stm_trainer,
    threshold_between,
)

TOOLS_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] or '' }}"
    "{% for call in message['tool_calls'] or [] %}<call>{{ call['function']['name'] }}"
    "({{ call['function']['arguments'] | tojson }})</call>{% endfor %}<|im_end|>\n{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _turns(i):
    return [
        {"role": "user" if j % 2 == 0 else "assistant", "content": f"{TEXT[(i + j) % 6]} {i * 7 + j}"}
        for j in range(2 + 2 * (i % 3))
    ]


def _chat(i):
    return {
        "prompt": [{"role": "user", "content": f"{TEXT[(i + 1) % 6]} Number {i}."}],
        "completion": [{"role": "assistant", "content": f"{TEXT[i % 6]} # {i * 37}" + " and so on" * (i % 4)}],
    }


def _tool_chat(i):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": i, "b": 2 * i}}}
    tool = {"type": "function", "function": {"name": "add", "description": "Add two numbers.", "parameters": {}}}
    return {
        "messages": [
            {"role": "user", "content": f"Add {i} and {2 * i}.", "tool_calls": None},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": str(3 * i), "tool_calls": None},
            {"role": "assistant", "content": f"The sum is {3 * i}.", "tool_calls": None},
        ],
        "tools": json.dumps([tool]),
    }


def _ids(tokenizer, i):
    return tokenizer(f"{TEXT[i % 6]} {i} {TEXT[(i + 2) % 6]}")["input_ids"][: 12 + 5 * (i % 7)]


def _partly_labelled(tokenizer, i):
    ids, draw = _ids(tokenizer, i), random.Random(i)
    labels = [token if draw.random() < 0.6 else IGNORE for token in ids]
    labels[0], labels[-1] = (ids[0] if i % 2 else IGNORE), ids[-1]
    return {"input_ids": ids, "labels": labels}


def _form(name, tokenizer):
    """Rows, config keywords and trainer keywords of a form of data."""
    rows = range(9)
    return {
        "messages": (
            [{"messages": _chat(i)["prompt"] + _chat(i)["completion"]} for i in rows],
            {"assistant_only_loss": True},
            {},
        ),
        "messages, full loss": ([{"messages": _turns(i)} for i in rows], {}, {}),
        "multi-turn": ([{"messages": _turns(i)} for i in rows], {"assistant_only_loss": True}, {}),
        "tool calls": ([_tool_chat(i) for i in rows], {"assistant_only_loss": True}, {}),
        "prompt and completion, chat": ([_chat(i) for i in rows], {}, {}),
        "prompt and completion, full loss": ([_chat(i) for i in rows], {"completion_only_loss": False}, {}),
        "prompt and completion, plain": (
            [{"prompt": f"{TEXT[i % 6]} ", "completion": f"{TEXT[(i + 3) % 6]} {i}"} for i in rows],
            {},
            {},
        ),
        "text": ([{"text": f"{TEXT[i % 6]} {i} {TEXT[(i + 2) % 6]}"} for i in rows], {}, {}),
        "formatting_func": (
            [{"question": TEXT[(i + 1) % 6], "answer": f"{TEXT[i % 6]} {i}"} for i in rows],
            {},
            {"formatting_func": lambda row: f"Q: {row['question']}\nA: {row['answer']}"},
        ),
        "input_ids": ([{"input_ids": _ids(tokenizer, i)} for i in rows], {}, {}),
        "input_ids and labels": ([_partly_labelled(tokenizer, i) for i in rows], {}, {}),
    }[name]


FORMS = [
    "messages",
    "messages, full loss",
    "multi-turn",
    "tool calls",
    "prompt and completion, chat",
    "prompt and completion, full loss",
    "prompt and completion, plain",
    "text",
    "formatting_func",
    "input_ids",
    "input_ids and labels",
]
LAYOUTS = {
    "off": {"max_length": None},
    "bfd": {"packing": True, "packing_strategy": "bfd", "max_length": 130},
    "bfd_split": {"packing": True, "packing_strategy": "bfd_split", "max_length": 60},
    "wrapped": {"packing": True, "packing_strategy": "wrapped", "max_length": 50},
    "padding_free": {"padding_free": True, "max_length": None},
    "keep_start": {"max_length": 60, "truncation_mode": "keep_start"},
    "keep_end": {"max_length": 24, "truncation_mode": "keep_end"},
}


def _setup(form, layout, tokenizer):
    rows, options, keywords = _form(form, tokenizer)
    options, tokenizer = options | LAYOUTS[layout], copy.deepcopy(tokenizer)
    if form == "tool calls":
        tokenizer.chat_template = TOOLS_TEMPLATE
        options["max_length"] = options["max_length"] and 3 * options["max_length"]  # these chats are longer
    return rows, options, keywords, tokenizer


def _columns_but_labels(dataset):
    return {name: dataset[name][:] for name in dataset.column_names if name not in ("labels", "stm_masked_tokens")}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
def test_final_labels_equal_the_oracle(form, layout, tokenizer, make_model, tmp_path):
    rows, options, keywords, tokenizer = _setup(form, layout, tokenizer)
    plain = plain_trainer(make_model(), rows, tokenizer, tmp_path / "plain", keywords, **options).train_dataset
    nll = oracle_nll(plain, make_model())
    threshold = threshold_between(nll)
    expected = masked_rows(plain, nll, math.log(threshold))

    trainer = stm_trainer(
        make_model(), rows, tokenizer, tmp_path / "stm", keywords, max_steps=1, stm_threshold=threshold, **options
    )
    assert trainer.train_dataset["labels"][:] == [row.get("labels") or row["input_ids"] for row in plain]
    trainer.train()
    masked = trainer.train_dataset
    assert [list(row) for row in masked["labels"]] == expected
    assert _columns_but_labels(masked) == _columns_but_labels(plain)
    counts = [
        sum(a != b for a, b in zip(row["labels"], new, strict=True)) for row, new in zip(plain, expected, strict=True)
    ]
    assert list(masked["stm_masked_tokens"]) == counts
    receipt = json.loads((tmp_path / "stm" / "stm.json").read_text())
    assert receipt["label_tokens"] == len(scores_of(nll))
    assert receipt["masked_tokens"] == sum(counts) > 0
    assert receipt["mask_digest"] == oracle_digest(plain, expected)
    if layout in ("bfd", "bfd_split"):
        assert max(len(cut(row)) for row in masked) > 1, "the layout packed nothing: the test says nothing"


def test_a_shifted_score_would_be_seen(tokenizer, make_model, tmp_path):
    """The oracle's labels differ from those of scores that are one position off, so the tests above can fail."""
    rows, options, keywords, tokenizer = _setup("multi-turn", "off", tokenizer)
    plain = plain_trainer(make_model(), rows, tokenizer, tmp_path, keywords, **options).train_dataset
    nll = oracle_nll(plain, make_model())
    threshold = math.log(threshold_between(nll))
    shifted = [[math.nan, *row[:-1]] for row in nll]
    late = [
        [IGNORE if not math.isnan(a) and b > threshold else c for a, b, c in zip(one, two, row["labels"], strict=True)]
        for one, two, row in zip(nll, shifted, plain, strict=True)
    ]
    assert late != masked_rows(plain, nll, threshold)


def test_packed_documents_do_not_see_each_other(tokenizer, make_model, tmp_path):
    """Scores of packed rows are those of each document alone; joined, they would be others."""
    rows, options, keywords, tokenizer = _setup("text", "bfd", tokenizer)
    plain = plain_trainer(make_model(), rows, tokenizer, tmp_path, keywords, **options).train_dataset
    alone = scores_of(oracle_nll(plain, make_model()))
    joined = scores_of(oracle_nll([{k: row[k] for k in ("input_ids", "labels")} for row in plain], make_model()))
    assert len(joined) > len(alone)


# --- One digest for the same documents ------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["multi-turn", "text"])
def test_digest_does_not_depend_on_packing_or_order(form, tokenizer, make_model, tmp_path):
    rows, options, keywords, _ = _setup(form, "off", tokenizer)
    layouts = {
        "off": {"max_length": None},
        "bfd": {"packing": True, "max_length": 256},
        "padding_free": {"padding_free": True, "max_length": None},
        "shuffled": {"max_length": 256, "shuffle_dataset": True, "seed": 7},
        "small scoring batches": {"max_length": None, "stm_tokens_per_batch": 1},
    }
    plain = plain_trainer(make_model(), rows, tokenizer, tmp_path, keywords, **options).train_dataset
    threshold = threshold_between(oracle_nll(plain, make_model()))
    receipts = []
    for name, layout in layouts.items():
        trainer = stm_trainer(
            make_model(),
            rows[::-1] if name == "bfd" else rows,
            tokenizer,
            tmp_path / name,
            keywords,
            max_steps=1,
            stm_threshold=threshold,
            stm_scores_dir=str(tmp_path / f"scores of {name}"),
            **options | layout,
        )
        trainer.train()
        receipts.append(json.loads((tmp_path / name / "stm.json").read_text()))
    for field in ("mask_digest", "label_tokens", "masked_tokens", "scores_key", "documents"):
        assert len({json.dumps(receipt[field]) for receipt in receipts}) == 1, field


def test_digest_changes_with_one_label(tokenizer, make_model, tmp_path):
    digests = set()
    for at in (3, 4):
        rows = [{"input_ids": _ids(tokenizer, i), "labels": _ids(tokenizer, i)} for i in range(4)]
        rows[2]["labels"][at] = IGNORE
        trainer = stm_trainer(make_model(), rows, tokenizer, tmp_path, max_steps=1, stm_threshold=math.inf)
        trainer.train()
        digests.add(json.loads((tmp_path / "stm.json").read_text())["mask_digest"])
    assert len(digests) == 2


def test_equal_rows_are_masked_alike_and_scored_once(tokenizer, make_model, tmp_path):
    row = _partly_labelled(tokenizer, 3)
    rows = [row, _partly_labelled(tokenizer, 4), copy.deepcopy(row), {**row, "labels": list(row["input_ids"])}]
    nll = oracle_nll(rows, make_model())
    threshold = threshold_between(nll)
    trainer = stm_trainer(make_model(), rows, tokenizer, tmp_path, max_steps=1, stm_threshold=threshold)
    trainer.train()
    assert [list(labels) for labels in trainer.train_dataset["labels"]] == masked_rows(rows, nll, math.log(threshold))
    (entry,) = (tmp_path / "stm-home" / "scores").glob("[!.]*")
    stored = json.loads((entry / "manifest.json").read_text())["num_scores"]
    assert stored == len(scores_of(nll)) - len(scores_of(nll[2:3]))


def test_labels_that_are_not_the_ids_are_scored_as_labels(tokenizer, make_model, tmp_path):
    """TRL passes any labels on; a score belongs to the label, not to the token at its place."""
    rows = []
    for i in range(5):
        ids = _ids(tokenizer, i)
        rows.append({"input_ids": ids, "labels": [(token * 7 + 3) % 300 for token in ids]})
    nll = oracle_nll(rows, make_model())
    threshold = threshold_between(nll)
    trainer = stm_trainer(make_model(), rows, tokenizer, tmp_path, max_steps=1, stm_threshold=threshold)
    trainer.train()
    assert [list(labels) for labels in trainer.train_dataset["labels"]] == masked_rows(rows, nll, math.log(threshold))


# --- Batches --------------------------------------------------------------------------------------------------------


def _by_ids(dataset, starts_masked):
    """Labels of each document by its ids, as a collator hands them over."""
    found = {}
    for row in dataset:
        for start, end in cut(row):
            labels = list(row["labels"][start:end])
            if starts_masked:
                labels[0] = IGNORE
            found.setdefault(tuple(row["input_ids"][start:end]), []).append(labels)
    return found


@pytest.mark.parametrize(
    ("layout", "workers"),
    [
        ("off", 0),
        ("off", 2),
        ("bfd", 0),
        ("bfd", 2),
        ("wrapped", 0),
        ("padding_free", 0),
        ("keep_end", 0),
        ("multiple", 0),
    ],
)
def test_batches_carry_exactly_the_masked_labels(layout, workers, tokenizer, make_model, tmp_path):
    if layout == "multiple":
        rows, options, keywords, tokenizer = _setup("multi-turn", "off", tokenizer)
        options["pad_to_multiple_of"] = 16
    else:
        rows, options, keywords, tokenizer = _setup("multi-turn", layout, tokenizer)
    plain = plain_trainer(make_model(), rows, tokenizer, tmp_path / "plain", keywords, **options).train_dataset
    threshold = threshold_between(oracle_nll(plain, make_model()))
    trainer = stm_trainer(
        make_model(),
        rows,
        tokenizer,
        tmp_path / "stm",
        keywords,
        trainer_class=RecordingSTM,
        stm_threshold=threshold,
        dataloader_num_workers=workers,
        learning_rate=0.0,
        **options,
    )
    trainer.train()
    expected = _by_ids(trainer.train_dataset, starts_masked=trainer.padding_free)
    assert all("stm_masked_tokens" not in batch for batch in trainer.batches)
    again = [dict(batch) for batch in trainer.get_train_dataloader()]
    assert all("stm_masked_tokens" not in batch for batch in again)
    for batches in (trainer.batches, again):
        found = {}
        for ids, labels in documents_of_batches(batches):
            found.setdefault(tuple(ids), []).append(labels)
        assert {ids: sorted(rows) for ids, rows in found.items()} == {i: sorted(rows) for i, rows in expected.items()}
    masked = sum(labels.count(IGNORE) for rows in expected.values() for labels in rows)
    assert masked > sum(list(row["labels"]).count(IGNORE) for row in plain)


@pytest.mark.parametrize("removed", [False, True])
def test_columns_of_ones_own_stay_and_stms_is_seen_by_nobody(removed, tokenizer, make_model, tmp_path):
    rows = [{**_partly_labelled(tokenizer, i), "name": f"row {i}", "weight": i / 2} for i in range(6)]
    options = {"remove_unused_columns": removed, "stm_threshold": 500.0}
    plain = plain_trainer(make_model(), rows, tokenizer, tmp_path, **options).train_dataset
    trainer = stm_trainer(make_model(), rows, tokenizer, tmp_path, trainer_class=RecordingSTM, **options)
    seen, collate = [], trainer.data_collator.torch_call
    trainer.data_collator.torch_call = lambda rows: (seen.extend(set(row) for row in rows), collate(rows))[1]
    trainer.train()
    assert trainer.train_dataset["name"][:] == plain["name"][:]
    assert trainer.train_dataset["weight"][:] == plain["weight"][:]
    if removed:
        list(trainer.get_train_dataloader())
    own = {"input_ids", "labels"} if removed else {"input_ids", "labels", "name", "weight"}
    assert seen
    assert all(names == own for names in seen)
    assert all("stm_masked_tokens" not in batch for batch in trainer.batches)


@pytest.mark.parametrize(
    "kind",
    [
        "selected",
        "shuffled",
        "torch format",
        "numpy format",
        "some columns shown",
        "from disk",
        "sliced parquet",
        "concatenated",
        "int32 and large lists",
        "fixed lengths",
        "no labels",
    ],
)
def test_any_arrow_layout_of_the_rows(kind, tokenizer, make_model, tmp_path):
    dataset = as_dataset([_partly_labelled(tokenizer, i) for i in range(10)])
    if kind == "selected":
        dataset = dataset.select([7, 3, 3, 0, 9])
    elif kind == "shuffled":
        dataset = dataset.shuffle(seed=3)
    elif kind == "torch format":
        dataset = dataset.with_format("torch")
    elif kind == "numpy format":
        dataset = dataset.with_format("numpy")
    elif kind == "some columns shown":
        dataset = dataset.add_column("extra", list(range(10))).with_format("numpy", columns=["input_ids", "labels"])
    elif kind == "from disk":
        dataset.save_to_disk(tmp_path / "disk")
        dataset = type(dataset).load_from_disk(tmp_path / "disk")
    elif kind == "concatenated":
        dataset = datasets.concatenate_datasets(
            [dataset.select([1, 4]), dataset.select(range(3)), dataset.shuffle(seed=1)]
        )
    elif kind == "int32 and large lists":
        large = datasets.LargeList(datasets.Value("int64"))
        dataset = dataset.cast(datasets.Features(input_ids=datasets.List(datasets.Value("int32")), labels=large))
    elif kind == "fixed lengths":
        dataset = dataset.map(lambda row: {name: row[name][:12] for name in row})
        dataset = dataset.cast(
            datasets.Features(dict.fromkeys(("input_ids", "labels"), datasets.List(datasets.Value("int64"), 12)))
        )
    elif kind == "no labels":
        dataset = dataset.remove_columns("labels")
    else:
        dataset.to_parquet(tmp_path / "rows.parquet")
        dataset = type(dataset).from_parquet(str(tmp_path / "rows.parquet")).select(range(2, 8))
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "disk").rglob("*")} if kind == "from disk" else {}
    options = {"dataset_kwargs": {"skip_prepare_dataset": True}}  # so that the layout reaches STM
    rows = [{k: list(map(int, v)) for k, v in row.items()} for row in dataset]
    nll = oracle_nll(rows, make_model())
    threshold = threshold_between(nll)
    trainer = stm_trainer(make_model(), dataset, tokenizer, tmp_path, max_steps=1, stm_threshold=threshold, **options)
    trainer.train()
    found = trainer.train_dataset
    assert found.format["type"] == dataset.format["type"]
    assert [list(map(int, row)) for row in found["labels"]] == masked_rows(rows, nll, math.log(threshold))
    assert [list(map(int, row)) for row in found["input_ids"]] == [row["input_ids"] for row in rows]
    if kind not in ("no labels", "fixed lengths"):
        assert found.features["labels"] == dataset.features["labels"]
    if kind == "some columns shown":
        assert found.with_format(None)["extra"][:] == list(range(10))
    if kind == "from disk":
        assert {file: file.stat().st_mtime_ns for file in (tmp_path / "disk").rglob("*")} == files, (
            "a cache was written"
        )


# --- Strategies -----------------------------------------------------------------------------------------------------


def _strategy_rows(tokenizer, make_model, tmp_path):
    """A plain data set of partly equal lengths, its oracle scores, and a threshold with margin."""
    rows, options, keywords, tokenizer = _setup("multi-turn", "bfd", tokenizer)
    plain = plain_trainer(make_model(), rows, tokenizer, tmp_path / "plain", keywords, **options).train_dataset
    nll = oracle_nll(plain, make_model())
    return rows, options, keywords, tokenizer, plain, nll, threshold_between(nll)


def _stop_ids(tokenizer):
    return {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|endoftext|>")}


def _oracle_strategy(plain, nll, nats, strategy, seed=0, stop_ids=()):
    """Final labels of a strategy, document by document in plain Python; asserts that `low` has no near ties."""
    out = []
    for row, values in zip(plain, nll, strict=True):
        labels = list(row["labels"])
        for start, end in cut(row):
            every = [t for t in range(start, end) if not math.isnan(values[t])]
            pool = [t for t in every if row["labels"][t] not in stop_ids]
            count = sum(values[t] > nats for t in pool)
            if strategy == "high":
                chosen = [t for t in pool if values[t] > nats]
            elif strategy == "low":
                order = sorted(pool, key=lambda t: values[t])
                if 0 < count < len(order):
                    assert values[order[count]] - values[order[count - 1]] > 1e-6, "a near tie: choose other rows"
                chosen = order[:count]
            else:
                message = np.array([seed, *(row["labels"][t] for t in every)], dtype="<i8").tobytes()
                state = int.from_bytes(hashlib.sha256(message).digest(), "little")
                draw = np.random.Generator(np.random.PCG64(state)).permutation(len(pool)) if count else []
                chosen = [pool[i] for i in draw[:count]]
            for t in chosen:
                labels[t] = IGNORE
        out.append(labels)
    return out


@pytest.mark.parametrize("keep_stop", [False, True])
@pytest.mark.parametrize(("strategy", "seed"), [("high", 0), ("low", 0), ("random", 0), ("random", 5)])
def test_strategies_and_stop_tokens(strategy, seed, keep_stop, tokenizer, make_model, tmp_path):
    rows, options, keywords, tokenizer, plain, nll, _ = _strategy_rows(tokenizer, make_model, tmp_path)
    stop_ids = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("a")}
    stops = np.array(
        [v for r, vs in zip(plain, nll, strict=True) for t, v in enumerate(vs) if r["labels"][t] in stop_ids]
    )
    threshold = math.exp(np.nanmin(stops) + 0.01)  # so that stop tokens would be masked
    assert_margin(scores_of(nll), math.log(threshold))
    model = make_model()
    model.generation_config.eos_token_id = sorted(stop_ids)
    trainer = stm_trainer(
        model,
        rows,
        tokenizer,
        tmp_path / "stm",
        keywords,
        max_steps=1,
        stm_threshold=threshold,
        stm_strategy=strategy,
        stm_seed=seed,
        stm_keep_stop_tokens=keep_stop,
        **options,
    )
    trainer.train()
    expected = _oracle_strategy(plain, nll, math.log(threshold), strategy, seed, stop_ids if keep_stop else ())
    assert [list(labels) for labels in trainer.train_dataset["labels"]] == expected
    receipt = json.loads((tmp_path / "stm" / "stm.json").read_text())
    label_positions = [(r, t) for r, values in enumerate(nll) for t, v in enumerate(values) if not math.isnan(v)]
    stop_positions = [(r, t) for r, t in label_positions if plain[r]["labels"][t] in stop_ids]
    assert receipt["stop_tokens"] == len(stop_positions)
    assert receipt["stop_tokens_masked"] == sum(expected[r][t] == IGNORE for r, t in stop_positions)
    assert (receipt["stop_tokens_masked"] == 0) or not keep_stop
    assert receipt["strategy"] == strategy
    assert receipt["seed"] == seed
    assert receipt["keep_stop_tokens"] is keep_stop
    assert receipt["mask_digest"] == oracle_digest(plain, expected)


@pytest.mark.parametrize("strategy", ["low", "random"])
def test_controls_do_not_depend_on_packing(strategy, tokenizer, make_model, tmp_path):
    rows, options, keywords, tokenizer, _, _, threshold = _strategy_rows(tokenizer, make_model, tmp_path)
    digests = set()
    for name, layout in {
        "off": {"packing": False, "max_length": None},
        "bfd": {"packing": True, "max_length": 256},
    }.items():
        trainer = stm_trainer(
            make_model(),
            rows if name == "off" else rows[::-1],
            tokenizer,
            tmp_path / name,
            keywords,
            max_steps=1,
            stm_threshold=threshold,
            stm_strategy=strategy,
            stm_seed=3,
            **options | layout,
        )
        trainer.train()
        digests.add(json.loads((tmp_path / name / "stm.json").read_text())["mask_digest"])
    assert len(digests) == 1


@pytest.mark.parametrize("keep_stop", [False, True])
@pytest.mark.parametrize("fraction", [0.1, 0.35, 0.9])
def test_fraction(fraction, keep_stop, tokenizer, make_model, tmp_path):
    rows, options, keywords, tokenizer, plain, nll, _ = _strategy_rows(tokenizer, make_model, tmp_path)
    stop_ids = {tokenizer.eos_token_id} if keep_stop else ()
    candidates = np.array(
        [
            value
            for row, values in zip(plain, nll, strict=True)
            for t, value in enumerate(values)
            if not math.isnan(value) and row["labels"][t] not in stop_ids
        ]
    )
    allowed = math.floor(fraction * len(candidates))
    nats = min(value for value in candidates if (candidates > value).sum() <= allowed)
    above = candidates[candidates > nats]
    assert len(above)
    assert above.min() - nats > MARGIN
    trainer = stm_trainer(
        make_model(),
        rows,
        tokenizer,
        tmp_path / "stm",
        keywords,
        max_steps=1,
        stm_mask_fraction=fraction,
        stm_keep_stop_tokens=keep_stop,
        **options,
    )
    trainer.train()
    # Halfway to the next score, so that float32 rounding of the threshold itself decides nothing.
    expected = _oracle_strategy(plain, nll, (nats + above.min()) / 2, "high", stop_ids=stop_ids)
    assert [list(labels) for labels in trainer.train_dataset["labels"]] == expected
    receipt = json.loads((tmp_path / "stm" / "stm.json").read_text())
    assert receipt["masked_tokens"] <= allowed
    assert receipt["threshold_nats"] == pytest.approx(nats, abs=1e-4)
    assert receipt["threshold"] == pytest.approx(math.exp(nats), rel=1e-3)
    assert receipt["mask_fraction"] == fraction
    assert trainer.state.log_history[0]["stm/threshold"] == receipt["threshold"]


# --- The receipt ----------------------------------------------------------------------------------------------------

RECEIPT_FIELDS = {
    "threshold",
    "threshold_nats",
    "mask_fraction",
    "strategy",
    "seed",
    "keep_stop_tokens",
    "reference",
    "label_tokens",
    "masked_tokens",
    "masked_fraction",
    "unscored_label_tokens",
    "stop_tokens",
    "stop_tokens_masked",
    "stop_tokens_masked_fraction",
    "rows",
    "documents",
    "rows_without_kept_tokens",
    "scores_entry",
    "scores_key",
    "dtype",
    "autocast",
    "normalization",
    "mask_digest",
    "versions",
}


@pytest.mark.parametrize("threshold", [None, math.inf])
def test_receipt_is_complete_and_consistent(threshold, tokenizer, make_model, tmp_path):
    from importlib.metadata import version

    rows, options, keywords, tokenizer, plain, nll, some = _strategy_rows(tokenizer, make_model, tmp_path)
    trainer = stm_trainer(
        make_model(),
        rows,
        tokenizer,
        tmp_path / "stm",
        keywords,
        max_steps=1,
        stm_threshold=threshold or some,
        **options,
    )
    trainer.train()
    text = (tmp_path / "stm" / "stm.json").read_text()
    receipt = json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
    assert receipt.keys() >= RECEIPT_FIELDS
    nats = math.log(threshold or some)
    masked = [list(labels) for labels in trainer.train_dataset["labels"]]
    assert receipt["threshold"] == ("inf" if threshold else some)
    assert receipt["threshold_nats"] == ("inf" if threshold else nats)
    assert receipt["rows"] == len(plain)
    assert receipt["documents"] == sum(len(cut(row)) for row in plain)
    assert receipt["label_tokens"] == len(scores_of(nll))
    assert receipt["masked_tokens"] == int((scores_of(nll) > nats).sum())
    assert receipt["masked_fraction"] == receipt["masked_tokens"] / receipt["label_tokens"]
    assert receipt["unscored_label_tokens"] == 0
    assert receipt["rows_without_kept_tokens"] == sum(
        {*row["labels"]} != {IGNORE} and {*new} == {IGNORE} for row, new in zip(plain, masked, strict=True)
    )
    assert receipt["stop_tokens_masked_fraction"] == receipt["stop_tokens_masked"] / receipt["stop_tokens"]
    assert receipt["dtype"] == ["torch.float32"]
    assert receipt["autocast"] == "none"
    assert receipt["reference"] == "initial"
    assert receipt["normalization"] == "global"
    assert receipt["mask_digest"] == oracle_digest(plain, masked)
    assert (tmp_path / "stm-home" / "scores" / receipt["scores_entry"]).is_dir()
    manifest = json.loads((tmp_path / "stm-home" / "scores" / receipt["scores_entry"] / "manifest.json").read_text())
    assert manifest["key"] == receipt["scores_key"]
    for package in ("torch", "transformers", "trl", "peft", "accelerate", "datasets"):
        assert receipt["versions"][package] == version(package)
    assert {"stm_plugin", "python"} <= receipt["versions"].keys()


def test_rows_without_kept_tokens_are_counted_and_trained(tokenizer, make_model, tmp_path, caplog):
    rows = [_partly_labelled(tokenizer, i) for i in range(6)]
    nll = oracle_nll(rows, make_model())
    rows[1]["labels"] = [IGNORE] * len(rows[1]["labels"])  # no label token at all: not counted
    worst = int(np.nanargmax(nll[2]))
    rows[2]["labels"] = [label if t == worst else IGNORE for t, label in enumerate(rows[2]["labels"])]
    nll = oracle_nll(rows, make_model())
    threshold = math.exp(np.nanmax(nll[2]) - 0.01)
    assert_margin(scores_of(nll), math.log(threshold))
    with caplog.at_level("INFO", logger="stm_plugin"):
        trainer = stm_trainer(
            make_model(),
            rows,
            tokenizer,
            tmp_path,
            stm_threshold=threshold,
            max_length=None,
            per_device_train_batch_size=1,
        )
        trainer.train()
    receipt = json.loads((tmp_path / "stm.json").read_text())
    empty = [i for i, row in enumerate(masked_rows(rows, nll, math.log(threshold))) if set(row) == {IGNORE}]
    assert 2 in empty
    assert receipt["rows_without_kept_tokens"] == len(empty) - 1
    assert f"{len(empty) - 1} of 6 rows keep no token" in caplog.text
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)


# --- Evaluation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("kind", ["one", "dict", "passed", "passed dict"])
def test_evaluation_sets_are_not_masked(kind, packing, tokenizer, make_model, tmp_path):
    rows = [_chat(i) for i in range(9)]
    others = {"first": as_dataset(rows[:5]), "second": as_dataset(rows[3:])}
    given = {"one": others["first"], "dict": others, "passed": None, "passed dict": None}[kind]
    options = {"learning_rate": 0.0, "packing": packing, "max_length": 96, "stm_threshold": 500.0}
    options |= {"eval_strategy": "epoch"} if given is not None else {}
    results = []
    for make in (plain_trainer, stm_trainer):
        trainer = make(make_model(), rows, tokenizer, tmp_path, {"eval_dataset": given}, **options)
        trainer.train()
        passed = {"passed": others["first"], "passed dict": others}.get(kind)
        metrics = trainer.evaluate(passed) if passed is not None else trainer.evaluate()
        logged = {k: v for entry in trainer.state.log_history for k, v in entry.items() if k.endswith("_loss")}
        losses = {k: v for k, v in (logged | metrics).items() if k.startswith("eval") and k.endswith("loss")}
        results.append((losses, trainer.eval_dataset))
    assert len(results[0][0]) == (2 if "dict" in kind else 1)
    assert results[0][0] == results[1][0]
    for plain, masked in zip(*(_sets(found) for _, found in results), strict=True):
        assert plain["labels"][:] == masked["labels"][:]
        assert "stm_masked_tokens" not in masked.column_names
    assert trainer.state.log_history[-1].keys().isdisjoint({"stm/kept_tokens", "eval_stm/kept_tokens"})


def _sets(found):
    return [] if found is None else list(found.values()) if isinstance(found, dict) else [found]


def test_evaluating_before_training_changes_nothing(tokenizer, make_model, tmp_path):
    rows = [_chat(i) for i in range(9)]
    labels, losses = [], []
    for evaluate in (False, True):
        trainer = stm_trainer(
            make_model(),
            rows,
            tokenizer,
            tmp_path / str(evaluate),
            {"eval_dataset": as_dataset(rows[:4])},
            stm_threshold=500.0,
            stm_scores_dir=str(tmp_path / f"scores {evaluate}"),
        )
        if evaluate:
            trainer.evaluate()
        trainer.train()
        labels.append(trainer.train_dataset["labels"][:])
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert labels[0] == labels[1]
    assert losses[0] == losses[1]
