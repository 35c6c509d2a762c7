"""Packed modules in a loaded model, and the hook of transformers."""
