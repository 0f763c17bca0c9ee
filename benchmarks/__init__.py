"""Time per iteration, by step, and comparisons with a bare loop, another library and the floating-point limit."""
