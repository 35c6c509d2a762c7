"""What others have quantized: read, compared with the original, and given low-rank factors for what it misses."""
