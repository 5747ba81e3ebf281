"""What others do with a KV cache, one file a method: the arithmetic as published, every byte counted. For measuring only."""
