"""What a run keeps so that nothing is lost: checkpoints on disk, and the way back into training."""
