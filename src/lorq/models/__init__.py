"""Somebody else's model: found, taken apart, walked part by part; and texts."""
