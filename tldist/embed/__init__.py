"""Embed: a domain of any size to shards of vectors, resumable, with PyTorch or with ONNX Runtime alone."""
