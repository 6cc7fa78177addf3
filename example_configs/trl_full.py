"""Full fine-tuning with Selective Token Masking, from TRL.

Run: python trl_full.py MODEL CHATS.jsonl
Learning rate: the paper's for full fine-tuning (2e-6).
"""

import sys

import torch
from datasets import load_dataset

from stm_plugin import STMSFTConfig, STMSFTTrainer

model, data = sys.argv[1:]

trainer = STMSFTTrainer(
    model,
    args=STMSFTConfig(
        output_dir="stm-full",
        stm_threshold=2.5,
        learning_rate=2e-6,
        lr_scheduler_type="cosine",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        num_train_epochs=1,
        max_length=512,
        use_cpu=not torch.cuda.is_available(),
    ),
    train_dataset=load_dataset("json", data_files=data, split="train"),
)
trainer.train()
trainer.save_model()
