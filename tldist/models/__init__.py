"""Models as plain data and as modules: zoo, blocks, heads, composites."""
