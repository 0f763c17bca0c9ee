"""Functions of tensors without their Python: recorded once, replayed."""
