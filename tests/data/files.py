"""Small sample files and folders of them."""

import torch

from ltx_titan.data import write_sample

AV_SOURCES = {"conditions": "conditions", "latents": "video_latents", "audio_latents": "audio_latents"}


def video(frames=2, height=3, width=4, seed=0, **fields):
    latents = torch.randn(128, frames, height, width, generator=torch.Generator().manual_seed(seed))
    sizes = {"num_frames": frames, "height": height, "width": width}
    return {"latents": latents.to(torch.bfloat16), **sizes, "fps": 24.0, **fields}


def audio(steps=5, seed=0, **fields):
    latents = torch.randn(8, steps, 16, generator=torch.Generator().manual_seed(seed))
    sizes = {"num_time_steps": steps, "frequency_bins": 16}
    return {"latents": latents, **sizes, "duration": steps / 25, **fields}


def features(tokens=8, seed=0, **fields):
    generator = torch.Generator().manual_seed(seed)
    embeds = {
        "video_prompt_embeds": torch.randn(tokens, 6, generator=generator).to(torch.bfloat16),
        "audio_prompt_embeds": torch.randn(tokens, 4, generator=generator).to(torch.bfloat16),
    }
    return {**embeds, "prompt_attention_mask": torch.tensor([0] * 3 + [1] * (tokens - 3)), **fields}


def without(fields, *keys):
    return {key: value for key, value in fields.items() if key not in keys}


def write_dataset(root, names, frames=lambda i: 2, folders=("conditions", "latents", "audio_latents")):
    makers = {
        "conditions": lambda i: features(seed=i),
        "latents": lambda i: video(frames=frames(i), seed=i),
        "audio_latents": lambda i: audio(seed=i),
    }
    for folder in folders:
        for i, name in enumerate(names):
            write_sample(root / folder / f"{name}.pt", makers[folder](i))
    return root
