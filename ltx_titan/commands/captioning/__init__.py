"""Captioning of clips with a multimodal model: `ltx-titan caption`."""
