"""Data: components that produce the batches of training."""
