"""What a run leaves in its folder: metrics, checkpoints, curves, videos, versions."""
