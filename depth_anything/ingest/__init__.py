"""Read raw datasets and photographs and write them as shards."""
