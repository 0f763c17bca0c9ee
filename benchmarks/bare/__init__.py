"""Bare PyTorch loops of the mathematics of some recipes, for comparison: plain tensors and the simulator, no framework."""
