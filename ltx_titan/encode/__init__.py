"""Encoding of media and captions: files to latents and text features, as plain functions without any command.

`buckets`, `clips` and `references` decide which pixels of a file are encoded; `latents` and `captions` encode them;
`encoders` loads the models; `media_dataset` does all of it while training.
"""
