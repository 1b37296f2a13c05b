"""Work over many examples on many machines: in shards, on Ray, each done and written once."""
