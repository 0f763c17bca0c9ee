"""Networks evaluated and differentiated by hand where autograd costs too much."""
