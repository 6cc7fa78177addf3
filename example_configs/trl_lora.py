"""LoRA with Selective Token Masking, from TRL.

Run: python trl_lora.py MODEL CHATS.jsonl
Each line of the chats is {"prompt": [...], "completion": [...]}; the loss is on the completion.
Hyper-parameters: the paper's STM script (LoRA r 16, alpha 32, dropout 0.05, all linear layers; lr 2e-5, cosine, 20
warm-up steps, batch 1, 3 epochs, 512 tokens).
"""

import sys

import torch
from datasets import load_dataset
from peft import LoraConfig

from stm_plugin import STMSFTConfig, STMSFTTrainer

model, data = sys.argv[1:]

trainer = STMSFTTrainer(
    model,
    args=STMSFTConfig(
        output_dir="stm-lora",
        stm_threshold=2.5,
        learning_rate=2e-5,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        per_device_train_batch_size=1,
        num_train_epochs=3,
        max_length=512,
        use_cpu=not torch.cuda.is_available(),
    ),
    train_dataset=load_dataset("json", data_files=data, split="train"),
    peft_config=LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer.train()
trainer.save_model()
