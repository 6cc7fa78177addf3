"""The few numbers and names that every module agrees on."""

IGNORE_INDEX = -100
"""Label of a position that takes no part in the loss (the value of PyTorch, transformers and TRL)."""

DEFAULT_THRESHOLD = 2.5
"""Perplexity above which a label token is masked (the paper's tau)."""

TOKENS_PER_BATCH = 4096
"""Most tokens of one forward pass while scoring on an accelerator, unless an option says otherwise."""

TOKENS_PER_BATCH_ON_CPU = 1024
"""The same on a CPU, whose caches larger batches outgrow."""

SCORES_FORMAT_VERSION = 3
"""Version of the scores folder's layout; part of every key."""

RECEIPT_NAME = "stm.json"
"""File that a masked run leaves in every folder it saves."""

REPORT_NAME = "stm_report.html"
"""File that `stm_report` leaves in the output folder."""

MASKED_COLUMN = "stm_masked_tokens"
"""Column of a masked data set: label tokens of the row that STM masked."""

PAPER_ID = "2501.14315"
PAPER_TITLE = "Mitigating Forgetting in LLM Fine-Tuning via Low-Perplexity Token Learning"
PAPER_CITATION = """@article{wu2025stm,
    title         = {{Mitigating Forgetting in LLM Fine-Tuning via Low-Perplexity Token Learning}},
    author        = {Wu, Chao-Chung and Tam, Zhi Rui and Lin, Chieh-Yen and Chen, Yun-Nung and Sun, Shao-Hua
                     and Lee, Hung-yi},
    year          = 2025,
    eprint        = {2501.14315},
    archivePrefix = {arXiv},
}"""
