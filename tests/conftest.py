"""Fixtures: a tiny tokenizer and model made in the process, a few rows of data, the real model where it can be had."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "disabled")

# With more threads than free cores, the tiny models of these tests run up to a hundred times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
from pathlib import Path

import hypothesis
import pytest

# The same seeds in every run, however slow the machine: a gate must not fail by chance.
# `pytest --hypothesis-profile explore` tries many new ones.
hypothesis.settings.register_profile(
    "gate",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile(
    "explore", hypothesis.settings.get_profile("gate"), derandomize=False, max_examples=5000, print_blob=True
)
hypothesis.settings.load_profile("gate")

pytest.register_assert_rewrite("axolotl_helpers", "step_helpers", "trl_helpers")

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>\n{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

TEXT = [
    "def add(a, b):\n    return a + b",
    "Write a function that adds two numbers.",
    "The capital of France is Paris.",
    "What is the capital of France?",
    "for i in range(10): print(i)",
    "Sort the list and return the largest of its values, please.",
]


@pytest.fixture(autouse=True)
def _stm_home(tmp_path, monkeypatch):
    """Keep every test's scores in its own folder."""
    monkeypatch.setenv("STM_HOME", str(tmp_path / "stm-home"))


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE tokenizer with a ChatML template that has generation markers."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )


@pytest.fixture(scope="session")
def make_model(tokenizer):
    """Make a tiny random Llama whose logits are far from uniform; the same weights for the same seed."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(seed=0, **settings):
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        config = LlamaConfig(
            **{
                "vocab_size": len(tokenizer),
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "initializer_range": 0.3,
                "pad_token_id": None,
                "eos_token_id": tokenizer.eos_token_id,
            }
            | settings
        )
        model = LlamaForCausalLM(config)
        torch.set_rng_state(state)
        return model

    return make


@pytest.fixture(scope="session")
def chats():
    """Twelve short chats as prompt and completion."""
    return [
        {
            "prompt": [{"role": "user", "content": f"{TEXT[(i + 1) % 6]} Number {i}."}],
            "completion": [{"role": "assistant", "content": f"{TEXT[i % 6]} # {i * 37}" + " and so on" * (i % 4)}],
        }
        for i in range(12)
    ]


@pytest.fixture(scope="session")
def mbpp():
    """The MBPP training chats, where the checkout lies beside them."""
    path = SHARED_DATA / "mbpp_train.jsonl"
    if not path.exists():
        pytest.skip(f"needs the MBPP chats at {path}")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="session")
def punkt_tab():
    """NLTK's data in the real cache, where verifiers find them (session fixtures come before STM_HOME is moved)."""
    pytest.importorskip("nltk", reason="nltk, of the extra 'forgetting', is not installed")
    from stm_plugin.tasks import punkt

    try:
        punkt.ensure_punkt()
    except punkt.PunktNotFoundError as error:
        pytest.skip(str(error))
