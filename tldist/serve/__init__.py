"""Serve: a package behind HTTP, with batching, limits, health and metrics; no torch."""
