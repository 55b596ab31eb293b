"""Writing shards: raw data sets, photographs and a user's own data to shard sets."""
