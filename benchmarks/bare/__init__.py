"""Bare PyTorch loops of some recipes' mathematics, to measure marlkit by: plain tensors and the simulator, no framework."""
