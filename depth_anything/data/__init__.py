"""Shards, labels and the order of samples."""
