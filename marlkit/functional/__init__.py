"""The mathematics of marlkit as pure functions of tensors; no keys, no modules, no configuration."""
