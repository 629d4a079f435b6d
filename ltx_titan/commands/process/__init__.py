"""`process-dataset`, `process-videos` and `process-captions`."""
