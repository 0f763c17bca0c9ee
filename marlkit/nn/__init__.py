"""The parts of components: networks, distributions, normalisers."""
