"""Masks in a run of training: made ahead from stored scores, or live at every step."""
