"""What fine-tuning did to a model: how far its answers drifted and how far its weights moved."""
