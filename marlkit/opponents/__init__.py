"""Opponent models: what each agent believes of the others' policies."""
