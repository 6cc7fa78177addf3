"""A data set with its scores: found again, shown row by row, and what other thresholds would mask of it."""
