"""Low-rank factors for a model that somebody else has quantized: read it, fit what it misses, hand it on."""
