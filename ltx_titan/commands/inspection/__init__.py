"""Inspection of clips and prepared data: `ltx-titan inspect`."""
