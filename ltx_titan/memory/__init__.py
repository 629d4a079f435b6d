"""Memory of a training step, predicted from a job, and what activation checkpointing makes of it."""
