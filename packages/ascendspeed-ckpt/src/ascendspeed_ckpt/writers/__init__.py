"""Writers of checkpoints, one for each format."""
