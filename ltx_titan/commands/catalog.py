"""The commands of `ltx-titan`: their modules, and one line about each. Importing it imports none of them."""

from importlib import import_module
from typing import Any

# command: (module or module:object, one line for the list of commands)
COMMANDS = {
    "train": ("ltx_titan.commands.train", "train a job on the GPUs of this node, or of several"),
    "init": ("ltx_titan.commands.init", "write a commented job file from a few answers"),
    "doctor": ("ltx_titan.commands.doctor", "check drivers, versions, disk, memory, and the files of a job"),
    "estimate": ("ltx_titan.estimate.command", "predict memory and step time of a job, search its fastest mesh"),
    "sample": ("ltx_titan.commands.sample", "sample clips from a checkpoint, with or without a LoRA"),
    "export": ("ltx_titan.commands.export", "export a checkpoint for inference tools, from any mesh"),
    "import-config": ("ltx_titan.commands.import_ltx", "convert a job of another trainer to a job file (TOML)"),
    "split-scenes": ("ltx_titan.commands.split_scenes", "cut long videos into clips of one scene each"),
    "caption": ("ltx_titan.commands.captioning.caption", "caption clips with a multimodal model"),
    "compute-reference": (
        "ltx_titan.commands.compute_reference",
        "compute reference videos: edges, gray, blur or depth",
    ),
    "inspect": (
        "ltx_titan.commands.inspection.inspect_data",
        "check clips or prepared data: contact sheet, buckets, tokens",
    ),
    "process-dataset": ("ltx_titan.commands.process.command:DATASET", "encode clips and captions for training"),
    "process-videos": ("ltx_titan.commands.process.command:VIDEOS", "encode videos, images and audio only"),
    "process-captions": ("ltx_titan.commands.process.command:CAPTIONS", "encode captions only"),
    "decode-latents": ("ltx_titan.commands.decode_latents", "decode prepared latents to video and audio files"),
    "push": ("ltx_titan.commands.push", "upload the result of a job to the Hugging Face Hub"),
    "lora info": ("ltx_titan.commands.lora:INFO", "show base model, rank, alpha, trigger word and norms of a LoRA"),
    "lora merge": ("ltx_titan.commands.lora:MERGE", "merge a LoRA into a checkpoint"),
    "lora extract": ("ltx_titan.commands.lora:EXTRACT", "make a LoRA from the difference of two checkpoints"),
    "lora convert": ("ltx_titan.commands.lora:CONVERT", "convert a LoRA for another tool"),
    "lora resize": ("ltx_titan.commands.lora:RESIZE", "reduce a LoRA to a smaller rank"),
    "make-nano": ("ltx_titan.nano.pack", "write a miniature LTX-2.3 or LTX-2.5 pack with random weights"),
    "make-clips": ("ltx_titan.nano.make_clips", "write procedural clips with audio and captions"),
    "make-debug-dataset": ("ltx_titan.nano.debug_dataset", "write a small captioned dataset"),
    "make-checkpoint": (
        "ltx_titan.nano.random_checkpoint",
        "write a checkpoint of a released model's size with random weights",
    ),
    "bench kernels": ("ltx_titan.benchmarks.kernels", "check and time the fused kernels"),
    "bench attention": ("ltx_titan.benchmarks.attention", "time the attention backends of torch"),
    "bench block": ("ltx_titan.benchmarks.block", "time a transformer block in training, next to diffusers"),
    "bench step": ("ltx_titan.benchmarks.step", "profile a training step of a job: where its time goes"),
    "bench small-gpu": (
        "ltx_titan.benchmarks.small_gpu",
        "check and time LoRA with streamed weights under memory caps",
    ),
    "bench scaling": ("ltx_titan.benchmarks.scaling_report", "make table and plot of steps on 1 to 8 GPUs"),
    "bench encode": ("ltx_titan.benchmarks.encode", "time the encoder of the video VAE"),
    "bench nano": ("ltx_titan.benchmarks.nano.command", "train and score the miniature pack"),
    "completion": ("ltx_titan.commands.completion", "print a completion script for bash, zsh or tcsh"),
}


def load_command(name: str) -> Any:
    """Imports a command: an object with `DESCRIPTION` and `run`."""
    module_name, _, object_name = COMMANDS[name][0].partition(":")
    module = import_module(module_name)
    return getattr(module, object_name) if object_name else module
