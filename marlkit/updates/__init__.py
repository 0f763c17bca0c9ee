"""Updates: losses, gradients, parameters."""
