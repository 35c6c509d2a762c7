"""Tensors in, tensors out: grids and codes, rounding, sketches, factors, statistics, the stored weight."""
