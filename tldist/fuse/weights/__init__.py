"""Fusion in weight space: tensors of several models to one, streamed from file to file. NumPy, no torch."""
