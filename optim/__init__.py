"""Optimisers of embedding rows and of dense parameters, learning rate, loss scale."""
