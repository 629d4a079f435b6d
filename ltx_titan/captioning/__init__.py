from ltx_titan.captioning.caption import CaptionOptions, caption_files

__all__ = ["CaptionOptions", "caption_files"]
