"""Results as lm-eval (0.4.11 to 0.4.13) has them, made from scores of documents."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np


def results_of(tasks: Mapping[str, Mapping[str, list]], model: str = "models/initial", **changes) -> dict:
    """What `lm_eval.simple_evaluate` returns.

    Args:
        tasks: By task, values of the documents by metric, "acc" or "exact_match,strict-match".
        model: The model's name.
        **changes: Entries to set in a task's config, or "limit"; `docs` names the documents' content by task.
    """
    docs = changes.pop("docs", {})
    results = {
        "results": {},
        "group_subtasks": {task: [] for task in tasks},
        "configs": {},
        "versions": {},
        "n-shot": {},
        "higher_is_better": {},
        "n-samples": {},
        "config": {"model": "hf", "model_args": {"pretrained": model}, "limit": changes.pop("limit", None)},
        "lm_eval_version": "0.4.13",
        "transformers_version": "5.23.0",
        "samples": {},
    }
    for task, metrics in tasks.items():
        columns = {(key if "," in key else f"{key},none"): values for key, values in metrics.items()}
        num = len(next(iter(columns.values())))
        entry = {"name": task, "alias": task, "sample_len": num}
        for key, values in columns.items():
            flat = np.array([float(v) for value in values for v in (value if isinstance(value, list) else [value])])
            entry[key] = float(flat.mean())
            name, _, filter_name = key.partition(",")
            has_error = len(flat) > 1 and not isinstance(values[0], list)
            entry[f"{name}_stderr,{filter_name}"] = float(flat.std(ddof=1) / len(flat) ** 0.5) if has_error else "N/A"
        results["results"][task] = entry
        results["configs"][task] = {
            "task": task,
            "output_type": "generate_until",
            "doc_to_text": "<function prompt at 0x7f0012345678>",
            "num_fewshot": 0,
            "metadata": {"version": 1.0, "pretrained": model},
            "dataset_kwargs": {"file": f"/somewhere/{model}"},
        } | changes
        results["versions"][task] = 1.0
        results["n-shot"][task] = 0
        results["higher_is_better"][task] = {key.partition(",")[0]: True for key in columns}
        results["n-samples"][task] = {"original": 1000, "effective": num}
        results["samples"][task] = [
            _sample(index, filter_name, columns, docs.get(task, range(num))[index])
            for filter_name in dict.fromkeys(key.partition(",")[2] for key in columns)
            for index in range(num)
        ]
    return results


def _sample(index: int, filter_name: str, columns: dict[str, list], doc: object) -> dict:
    mine = {key.partition(",")[0]: value for key, value in columns.items() if key.partition(",")[2] == filter_name}
    content = {"question": f"What is {doc}?"}
    return {
        "doc_id": index,
        "doc": content,
        "target": str(doc),
        "arguments": [("prompt", {"until": []})],
        "resps": [["an answer"]],
        "filtered_resps": ["an answer"],
        "filter": filter_name,
        "metrics": list(mine),
        "doc_hash": _hash(json.dumps(content, indent=2)),
        "prompt_hash": _hash(f"prompt {doc}"),
        "target_hash": _hash(str(doc)),
    } | {name: values[index] for name, values in mine.items()}


def write_results(folder: Path, results: dict, date: str = "2026-11-27T10-00-00.000000", samples: bool = True) -> Path:
    """Write results as lm-eval's `EvaluationTracker` lays them out; the results file."""
    name = results["config"]["model_args"]["pretrained"]
    place = folder / name.replace("/", "__")
    place.mkdir(parents=True, exist_ok=True)
    kept = {key: value for key, value in results.items() if key != "samples"}
    facts = kept | {"model_source": "hf", "model_name": name, "chat_template": "{{ messages }}"}
    file = place / f"results_{date}.json"
    file.write_text(json.dumps(facts, indent=2), encoding="utf-8")
    for task, rows in results["samples"].items() if samples else ():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (place / f"samples_{task}_{date}.jsonl").write_text(lines, encoding="utf-8")
    return file


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
