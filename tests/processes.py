"""What the tests of several processes share: a saved model, and the launch of their own file in two processes."""

import copy
import math
import os
import subprocess
import sys
from pathlib import Path

import torch
from trl_helpers import (
    all_masked_row,
    assert_margin,
    float64_logits,
    label_rows,
    nll_of_row,
    oracle_nll,
    scores_of,
    threshold_between,
)

TIMEOUT = 900


def saved_llama(folder, tokenizer, **settings):
    """A tiny Llama far from uniform, saved with its tokenizer below `folder`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
        **settings,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return model


def save_tuned_model(model, tokenizer, folder):
    """Save, and return, the model after a change that moves perplexities up and down; the model itself stays."""
    tuned = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in tuned.model.layers[-1].parameters():
            weight += 0.1 * torch.randn_like(weight)
    tuned.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tuned


def rows_with_an_empty_pair(tokenizer, model, num_rows):
    """Rows of which 2 and 3, all that rank 1 gets first, keep nothing at a threshold; NLL and threshold in nats."""
    rows = label_rows(tokenizer, num_rows)
    nats = math.log(threshold_between(oracle_nll(rows, model)))
    for row in (2, 3):
        rows[row] = all_masked_row(
            rows[row], lambda given: nll_of_row(given, lambda ids: float64_logits(model, ids)), nats + 0.01
        )
    nll = oracle_nll(rows, model)
    assert_margin(scores_of(nll), nats)
    return rows, nll, nats


def load(folder):
    """The model, in float32, and the tokenizer of `saved_llama`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder / "model")


def two_processes(script, folder, *arguments, **environment):
    """Run a test module as a script in two gloo processes, which leave `rank-0.pt` and `rank-1.pt` in a folder.

    Args:
        script: The module's `__file__`; it is given the folder and the arguments.
        folder: A folder.
        *arguments: Strings.
        **environment: Variables for the processes.

    Returns:
        What each rank has left, and the error output of both.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script, folder]
    command += arguments
    # The folder of this file last: its modules must not shadow what is installed.
    paths = [os.environ.get("PYTHONPATH", ""), str(Path(script).parents[1]), str(Path(script).parent)]
    defaults = {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "STM_HOME": str(folder / "stm-home"),
        "OMP_NUM_THREADS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    done = subprocess.run(
        command, env=os.environ | defaults | environment, timeout=TIMEOUT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-20000:]
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in (0, 1)], done.stderr
