"""What the foraging environment is made of, besides its rules."""
