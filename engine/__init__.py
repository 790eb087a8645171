"""A training run: one step, its graph, progress, model files, scores, self-check."""
