"""Transferability: how well a backbone's features suit a labelled domain, before anything is trained."""
