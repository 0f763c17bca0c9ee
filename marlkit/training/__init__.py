"""A recipe as objects, and the four steps of an iteration."""
