"""From a model to a quantized folder: plan, observe, solve, write, verify."""
