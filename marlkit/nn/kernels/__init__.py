"""Networks with hand-written evaluation and derivatives, where autograd is too slow."""
