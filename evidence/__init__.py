"""What the sources of marlkit's systems claim, and what was found when it was tried: see ``docs/evidence.md``."""
