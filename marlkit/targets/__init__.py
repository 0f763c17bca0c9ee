"""Targets: the networks that values are bootstrapped with."""
