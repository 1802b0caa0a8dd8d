"""How fast a package is on this machine, beside PyTorch on the same images."""
