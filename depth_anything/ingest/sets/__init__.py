"""Readers of the public data sets that `depth-anything shard` knows by name."""
