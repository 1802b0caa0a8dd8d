"""Evaluate: how good a bundle or a package is on a labelled domain."""
