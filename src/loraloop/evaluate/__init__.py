"""Measuring a model: plays in an environment, and exact intervals for what came out."""
