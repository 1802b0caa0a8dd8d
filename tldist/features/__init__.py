"""Features: extraction, moments, heads fitted on them."""
