"""Media and captions to latents and text features."""
