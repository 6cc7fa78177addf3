"""Write the data of these experiments, from the Hugging Face Hub, as JSON lines.

Run: python get_data.py DATA
Prompts: those of the authors' published MBPP and GSM8K data (arXiv 2501.14315).
"""

import argparse
import json
from pathlib import Path

MBPP_PROMPT = """\
Please refer the given test cases and generate a python function for my problem. \
Make sure the written code is wrapped in code block : ```python
<your code>
```
>>> Problem:
{text}
>>> Test Cases:
{tests}
"""
GSM8K_PROMPT = """\
You are given a grade school math question. Please answer the question in the following format:

Q: <Question>
A: <Think step by step here> #### <number only answer>

Format requirements : you must first output your reasoning before finalized with the " #### " format \
followed by the final numeric answer

Q: {question}
A: """


def mbpp(row):
    """A problem with its tests as a question, its published code as the answer."""
    question = MBPP_PROMPT.format(text=row["text"], tests="\n".join(row["test_list"]))
    return {"messages": chat(question, f"```python\n{row['code']}\n```"), **row}


def gsm8k(row):
    """A problem and its published answer."""
    return {"messages": chat(GSM8K_PROMPT.format(question=row["question"]), row["answer"]), **row}


def ifeval(row):
    """A prompt whose instructions have only the arguments that they take: the hub's table fills up the rest."""
    kwargs = [{name: value for name, value in given.items() if value is not None} for given in row["kwargs"]]
    return row | {"kwargs": kwargs}


def chat(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


FILES = {
    "mbpp_train": ("google-research-datasets/mbpp", "full", "train", mbpp),
    "mbpp_validation": ("google-research-datasets/mbpp", "full", "validation", mbpp),
    "mbpp_test": ("google-research-datasets/mbpp", "full", "test", mbpp),
    "gsm8k": ("openai/gsm8k", "main", "test", gsm8k),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", "test", dict),
    "ifeval": ("google/IFEval", None, "train", ifeval),
}
"""File, data set, its configuration and split (ids as in lm-eval's own tasks), and what makes a row."""


def main(folder):
    from datasets import load_dataset

    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, (dataset, config, split, make) in FILES.items():
        rows = [make(row) for row in load_dataset(dataset, config, split=split)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        Path(folder, f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{name}.jsonl: {len(rows)} rows of {dataset}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the data of these experiments as JSON lines.")
    parser.add_argument("folder", metavar="DATA", help="the folder to write; it is made")
    main(parser.parse_args().folder)
