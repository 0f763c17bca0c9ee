"""Critics: they predict values."""
