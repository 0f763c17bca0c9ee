"""Data: they produce the batches of training."""
