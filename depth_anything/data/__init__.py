"""Read training data: shards, pseudo-labels, the order of samples, decoding and augmentation."""
