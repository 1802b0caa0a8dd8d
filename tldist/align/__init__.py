"""Align: map source and target features into a common space, refit the head there."""
