"""QLoRA (4-bit NF4 base) with Selective Token Masking, from TRL. Needs: pip install "stm-plugin[qlora]".

Run: python trl_qlora.py MODEL CHATS.jsonl
The scores are those of the quantized model, as it will train.
"""

import sys

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import BitsAndBytesConfig

from stm_plugin import STMSFTConfig, STMSFTTrainer

model, data = sys.argv[1:]

trainer = STMSFTTrainer(
    model,
    args=STMSFTConfig(
        output_dir="stm-qlora",
        stm_threshold=2.5,
        learning_rate=2e-4,
        per_device_train_batch_size=2,
        num_train_epochs=1,
        max_length=1024,
        packing=True,
        use_cpu=not torch.cuda.is_available(),
    ),
    train_dataset=load_dataset("json", data_files=data, split="train"),
    quantization_config=BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    ),
    peft_config=LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer.train()
trainer.save_model()
