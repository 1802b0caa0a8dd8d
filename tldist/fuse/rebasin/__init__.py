"""Git Re-Basin: the hidden units of models that did not start from the same weights, put into one order."""
