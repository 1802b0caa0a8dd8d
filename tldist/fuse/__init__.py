"""Fuse: merge models of one architecture into one, with statistics that fit it."""
