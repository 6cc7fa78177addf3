"""Per-token NLL of a data set under a model: what is scored, the forward passes, and the scores on disk."""
