"""From a domain to batches of tensors: order, augmentation, loader."""
