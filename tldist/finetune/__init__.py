"""Stage: fit a pre-trained model to a target domain."""
