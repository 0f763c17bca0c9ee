"""What components are made of: networks, distributions, normalisers."""
