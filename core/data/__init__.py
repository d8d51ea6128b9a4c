"""Text in, memory-mapped token shards out."""
