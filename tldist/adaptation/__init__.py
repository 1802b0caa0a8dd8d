"""Adapting while training: what is learned from images of the target that have no labels."""
