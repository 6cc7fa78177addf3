"""The real instruct model on the real data, against figures that were computed independently of this project.

SmolLM2-135M-Instruct, float32, the first 40 MBPP training rows cut at 512 tokens: 2,863 label tokens in assistant
turns; share above 1.5 / 2 / 2.5 / 3 / 10 / 1000: 47.1 / 37.4 / 33.1 / 30.2 / 19.8 / 4.5 %.
"""

import json
import os

import pytest

pytest.importorskip("trl", reason="trl is not installed")
pytest.importorskip("gguf", reason="gguf, which reads the packaged SmolLM2, is not installed")

SHARES = {2.5: 33.1, 1.5: 47.1, 2.0: 37.4, 3.0: 30.2, 10.0: 19.8, 1000.0: 4.5}
LABEL_TOKENS = 2863
TOLERANCE = 0.15  # percentage points


@pytest.fixture(scope="session")
def smollm2():
    """Folder of SmolLM2-135M-Instruct, from wherever the demo finds it."""
    import torch

    from stm_plugin.demo.model import ModelNotFoundError, find_model

    torch.set_num_threads(os.cpu_count() or 1)
    try:
        return str(find_model().path)
    except ModelNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def scores_dir(tmp_path_factory):
    """One store for both: packed or not, the same scores are found."""
    return str(tmp_path_factory.mktemp("scores"))


@pytest.fixture(scope="session")
def converted_tokenizer(smollm2):
    """SmolLM2's tokenizer as the figures had it: converted from GGUF without the model's own splitting of digits.

    It makes one token more of the 40 rows than the model's own, in a run of spaces before a number.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    tokenizer.backend_tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    return tokenizer


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "bfd"])
def test_masked_shares_of_mbpp(mbpp, tmp_path, scores_dir, smollm2, converted_tokenizer, packing):
    from datasets import Dataset
    from peft import LoraConfig

    from stm_plugin import STMSFTConfig, STMSFTTrainer

    rows = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in mbpp[:40]]
    config = STMSFTConfig(
        output_dir=str(tmp_path),
        max_length=512,
        packing=packing,
        max_steps=1,
        learning_rate=0.0,
        per_device_train_batch_size=1,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to=[],
        stm_scores_dir=scores_dir,
        save_strategy="no",
    )
    trainer = STMSFTTrainer(
        smollm2,
        config,
        train_dataset=Dataset.from_list(rows),
        processing_class=converted_tokenizer,
        peft_config=LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )
    for threshold, share in SHARES.items():
        config.stm_threshold = threshold
        trainer.train()
        receipt = json.loads((tmp_path / "stm.json").read_text())
        assert receipt["label_tokens"] == LABEL_TOKENS
        assert 100 * receipt["masked_fraction"] == pytest.approx(share, abs=TOLERANCE)
        masked = sum(trainer.train_dataset["stm_masked_tokens"])
        kept = sum(sum(label != -100 for label in labels) for labels in trainer.train_dataset["labels"])
        assert (masked, masked + kept) == (receipt["masked_tokens"], LABEL_TOKENS)
