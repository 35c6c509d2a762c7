"""Measuring equipment."""
