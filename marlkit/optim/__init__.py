"""Updates and optimisers: losses, gradients, parameters."""
