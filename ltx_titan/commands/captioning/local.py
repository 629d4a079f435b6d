"""Captioning model in this process: any multimodal chat model of transformers that accepts images, or audio as well.

On one GPU the weights are loaded in bfloat16 if they fit into its free memory, and otherwise in int8.
"""

from math import prod
from pathlib import Path
from typing import Any

import torch

from ltx_titan.commands.captioning.parts import ClipParts
from ltx_titan.commands.captioning.server import Captioner, CaptionError
from ltx_titan.common.hardware import GIB
from ltx_titan.weights import read_metadata

# Models that also generate speech: captions need only the part that generates text.
_TEXT_PARTS = {
    "qwen2_5_omni": "Qwen2_5OmniThinkerForConditionalGeneration",
    "qwen3_omni_moe": "Qwen3OmniMoeThinkerForConditionalGeneration",
}
# Memory beside the weights: activations and KV cache of a request of the default size (32 frames, 768 pixels).
_RESERVE = 2 * GIB


def local_captioner(
    folder: Path, device: str = "cpu", max_tokens: int = 1024, load_in_8bit: bool = False, with_audio: bool = True
) -> Captioner:
    """Loads a model and its processor.

    Args:
        folder: local folder of a multimodal chat model, with its processor and chat template.
        device: device of the model; `auto` distributes it over all GPUs (needs accelerate).
        max_tokens: maximal length of an answer.
        load_in_8bit: int8 weights (torchao), about half the memory.
        with_audio: whether it receives audio.

    Raises:
        ValueError: the folder contains no such model, or the model does not accept audio that it would receive.
    """
    model, processor = _load(folder, device, load_in_8bit)
    # Processors without audio support silently drop it, and the instruction would still state that it is attached.
    if with_audio and not any(getattr(processor, name, None) for name in ("feature_extractor", "audio_processor")):
        raise ValueError(f"--local-model: the processor of {folder} does not accept audio; add --skip-audio")
    tokenizer = getattr(processor, "tokenizer", processor)

    @torch.inference_mode()
    def caption(parts: ClipParts, instruction: str) -> str:
        messages = [{"role": "user", "content": _content(parts, instruction)}]
        # Processors check the rate against that of their feature extractor instead of resampling.
        options = {"sampling_rate": parts.audio.sample_rate} if parts.audio is not None else {}
        try:
            inputs = processor.apply_chat_template(
                messages,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs=options,
            )
            inputs = inputs.to(model.device, dtype=model.dtype)
            # Greedy, so that the same clip gets the same caption in every run.
            found = model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
        except torch.OutOfMemoryError as error:
            # The next file may be shorter, and fragments of this one should not fail it as well.
            torch.cuda.empty_cache()
            raise CaptionError("out of GPU memory; lower --fps, --max-frames or --max-side") from error
        except (ValueError, TypeError, IndexError, KeyError) as error:
            raise CaptionError(f"the model rejects the input ({type(error).__name__}: {error})") from error
        return tokenizer.decode(found[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return caption


def needs_8bit(folder: Path, free_bytes: int) -> bool:
    """Whether a model fits into memory with int8 weights only.

    Counts 2 bytes a weight in bfloat16, and 1 for the matrices of linear layers in int8. Models that also generate
    speech are counted without that part.

    Args:
        folder: local folder of the model.
        free_bytes: free memory of the GPU.

    Raises:
        ValueError: it does not fit in int8 either.
    """
    shapes = {
        name: tensor.shape
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in read_metadata(path).tensors.items()
    }
    # The part that generates text, if the file has it apart.
    shapes = {name: shape for name, shape in shapes.items() if name.startswith("thinker.")} or shapes
    full = sum(2 * prod(shape) for shape in shapes.values())
    linear = sum(prod(shape) for name, shape in shapes.items() if len(shape) == 2 and "embed" not in name)
    if full + _RESERVE <= free_bytes:
        return False
    if full - linear + _RESERVE <= free_bytes:
        return True
    raise ValueError(
        f"--local-model: {folder} needs {(full - linear + _RESERVE) / GIB:.1f} GiB with int8 weights (estimated), and "
        f"{free_bytes / GIB:.1f} GiB of the GPU are free; use a smaller model, --device auto with several GPUs, or "
        "--server"
    )


def _load(folder: Path, device: str, load_in_8bit: bool) -> tuple[Any, Any]:
    # Here, because transformers takes seconds to import and clients of a server do without it.
    import transformers

    if not (folder / "config.json").is_file():
        raise ValueError(f"--local-model: {folder} has no config.json; expected a local folder of a multimodal model")
    # Explicit, because transformers otherwise asks on the terminal whether to run the folder's own code.
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    on_cpu = device != "auto" and torch.device(device).type == "cpu"
    options["dtype"] = torch.float32 if on_cpu else torch.bfloat16
    if device != "auto" and torch.device(device).type == "cuda" and not load_in_8bit:
        load_in_8bit = needs_8bit(folder, torch.cuda.mem_get_info(torch.device(device))[0])
        if load_in_8bit:
            print(f"{folder}: loaded with int8 weights, as bfloat16 does not fit into the free memory of the GPU")
    if load_in_8bit:
        from torchao.quantization import Int8WeightOnlyConfig

        options["quantization_config"] = transformers.TorchAoConfig(Int8WeightOnlyConfig())
    if device == "auto":
        options["device_map"] = "auto"
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        name = _TEXT_PARTS.get(config.model_type)
        loader = getattr(transformers, name) if name else transformers.AutoModelForMultimodalLM
        model = loader.from_pretrained(folder, **options)
        processor = transformers.AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError, ImportError) as error:
        raise ValueError(f"--local-model: transformers cannot load {folder}: {error}") from error
    if not hasattr(processor, "apply_chat_template") or not getattr(processor, "chat_template", None):
        raise ValueError(f"--local-model: {folder} has no chat template; expected an instruction-tuned model")
    # accelerate has placed the parts of an `auto` model; `to` is for a model on one device.
    return (model if device == "auto" else model.to(device)).eval(), processor


def _content(parts: ClipParts, instruction: str) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = []
    for time_s, frame in parts.frames:
        if parts.kind == "video":
            # The time before each frame: frames alone do not show how fast something happens.
            content.append({"type": "text", "text": f"{time_s:.1f} s:"})
        content.append({"type": "image", "image": frame})
    if parts.audio is not None:
        content.append({"type": "audio", "audio": parts.audio.waveform[0].numpy()})
    content.append({"type": "text", "text": instruction})
    return content
