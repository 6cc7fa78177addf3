"""The demo: plain fine-tuning and STM side by side on a small real model, offline (`stm demo`)."""
