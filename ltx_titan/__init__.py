"""Fine-tuning of the LTX-2 family of audio-video diffusion transformers, the TorchTitan way."""

__version__ = "0.1.0"
