"""Opponent models: each agent's beliefs about the others' policies."""
