"""Reading inputs: files into shards, shards into records; nothing is held whole."""
