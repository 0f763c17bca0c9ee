"""Trainers: how long, where and how a recipe is trained."""
