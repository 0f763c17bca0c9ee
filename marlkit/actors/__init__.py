"""Actors: they choose the agents' actions."""
