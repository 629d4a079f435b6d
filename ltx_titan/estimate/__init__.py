"""Memory and time of a job, predicted without a GPU."""
