"""VMAS simulated in batches: what the environment is made of."""
