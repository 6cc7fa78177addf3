"""`example_configs/experiments/get_data.py`, which needs the hub, on rows as the hub has them."""

import json
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
SCRIPT = runpy.run_path(str(ROOT / "example_configs" / "experiments" / "get_data.py"))


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("mbpp_train", ("text", "code", "test_list")),
        ("mbpp_validation", ("text", "code", "test_list")),
        ("gsm8k", ("question", "answer")),
    ],
)
def test_chats_are_those_of_the_authors(name, fields):
    file = DATA / f"{name}.jsonl"
    if not file.exists():
        pytest.skip(f"needs {file.name} in {DATA}")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    made = [SCRIPT["FILES"][name][-1]({field: row[field] for field in fields}) for row in rows]
    assert [row["messages"] for row in made] == [row["messages"] for row in rows]


def test_arguments_that_an_instruction_does_not_take_are_left_out():
    row = {"key": 1, "prompt": "p", "instruction_id_list": ["a", "b"]}
    filled = {"num_words": 3, "relation": None}, {"num_words": None, "relation": None}
    assert SCRIPT["ifeval"](row | {"kwargs": list(filled)}) == row | {"kwargs": [{"num_words": 3}, {}]}


def test_every_file_is_written_as_its_task_reads_it(tmp_path, monkeypatch, capsys, punkt_tab):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    pytest.importorskip("lm_eval", reason="lm_eval, of the extra 'forgetting', is not installed")
    from stm_plugin.tasks.loading import load_tasks

    hub = {
        "google-research-datasets/mbpp": {
            "text": "t",
            "code": "c\r\n",
            "test_list": ["assert 1"],
            "test_setup_code": "",
        },
        "openai/gsm8k": {"question": "q", "answer": "so\n#### 5"},
        "allenai/ai2_arc": {"id": "1", "question": "q", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "A"},
        "google/IFEval": {
            "key": 1,
            "prompt": "p",
            "instruction_id_list": ["punctuation:no_comma"],
            "kwargs": [{"n": None}],
        },
    }
    asked = []

    def load_dataset(dataset, config, split):
        asked.append((dataset, config, split))
        return datasets.Dataset.from_list([hub[dataset]])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    SCRIPT["main"](str(tmp_path / "data"))
    assert len(set(asked)) == len(asked) == capsys.readouterr().out.count(": 1 rows of ")
    kinds = {"mbpp": "mbpp_test", "gsm8k": "gsm8k", "arc_challenge": "arc_challenge", "ifeval": "ifeval"}
    texts = [f"{kind}={tmp_path / 'data' / name}.jsonl" for kind, name in kinds.items()]
    loaded = load_tasks(texts, run_model_code=True)
    assert {kind: len(task.eval_docs) for kind, task in loaded.tasks.items()} == dict.fromkeys(kinds, 1)
