"""Environments: what the agents act in."""
