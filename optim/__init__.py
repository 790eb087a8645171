"""Optimisers of embedding rows, and the learning-rate schedule."""
