"""What fine-tuning made a model forget: lm-eval before and after, the paper's TI and BWT, and `stm forgetting`."""
