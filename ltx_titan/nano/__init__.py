"""Miniature and synthetic inputs: the nano pack, debug clips, random checkpoints, synthetic samples."""
