"""Heterogeneous transfer: maps between the features of two models, from samples that both have seen."""
