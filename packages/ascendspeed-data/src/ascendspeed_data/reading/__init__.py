"""Read inputs as a stream: files as shards, shards as records."""
