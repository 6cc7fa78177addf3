"""What the tests of several processes share: a saved model, and the launch of their own file in two processes."""

import os
import subprocess
import sys
from pathlib import Path

import torch


def saved_llama(folder, tokenizer):
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
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return model


def load(folder):
    """The model, in float32, and the tokenizer of `saved_llama`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder / "model")


def run_in_two_processes(file, *arguments, timeout, **environment):
    """Run a test file as a script in two processes; what they wrote to stderr. Fails if they do."""
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", ""), str(Path(__file__).parents[1])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        **environment,
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", file]
    done = subprocess.run(
        [*command, *map(str, arguments)], env=environment, timeout=timeout, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-20000:]
    return done.stderr
