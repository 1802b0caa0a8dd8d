"""Measures: how far two sets of features are from each other, how alike two layers are."""
