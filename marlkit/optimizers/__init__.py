"""Optimisers of the parameters."""
