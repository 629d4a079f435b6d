"""Small adapted transformers for the tests of this folder."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ltx_titan.config import LoRASection
from ltx_titan.lora import adapters, apply_lora, init_lora_
from ltx_titan.model import LTXTransformer, Modality
from ltx_titan.model.init import init_random_
from tests.golden_cases import load_case
from tests.model.golden_transformer import build_inputs, build_transformer

CASE = "av_22b"


def settings(**fields) -> LoRASection:
    return LoRASection(**{"rank": 4, "alpha": 8, "base_dtype": "float32"} | fields)


def config() -> dict:
    return load_case(CASE).entry["config"]["transformer"]


def transformer(device: str = "cpu") -> LTXTransformer:
    with torch.device(device):
        model = LTXTransformer.from_config(config())
    if device != "meta":
        init_random_(model, 0)
    return model


def adapted(chosen: LoRASection) -> LTXTransformer:
    """A transformer whose adapters are not zero."""
    model = transformer()
    apply_lora(model, chosen)
    init_lora_(model, seed=1)
    stir(model)
    return model


@torch.no_grad()
def stir(model: nn.Module) -> None:
    """Moves B away from zero and magnitudes away from the base's."""
    generator = torch.Generator().manual_seed(2)
    for layer in adapters(model).values():
        layer.lora_B.weight.copy_(torch.randn(layer.lora_B.weight.shape, generator=generator) * 0.1)
        if layer.magnitude is not None:
            layer.magnitude.mul_(1 + 0.2 * torch.rand(layer.magnitude.shape, generator=generator))


def golden_inputs() -> tuple[Modality, Modality]:
    video, audio, _ = build_inputs(load_case(CASE), "base")
    return video, audio


def loss_of(model: nn.Module) -> Tensor:
    """A scalar that depends on all outputs of the model."""
    video, audio = model(*golden_inputs())
    generator = torch.Generator().manual_seed(3)
    return sum((out.float() - torch.randn(out.shape, generator=generator)).square().mean() for out in (video, audio))


def same_bits(one: Tensor, two: Tensor) -> bool:
    """Bitwise equality, also for the NaNs among the numbers of quantized data."""
    as_bits = {4: torch.int32, 2: torch.int16}[one.element_size()]
    return one.dtype == two.dtype and torch.equal(one.view(as_bits), two.view(as_bits))


def write_checkpoint(path: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A small official checkpoint with the golden weights, and a tensor of another component."""
    state = build_transformer(load_case(CASE)).state_dict()
    tensors = {f"model.diffusion_model.{name}": tensor.to(dtype).contiguous() for name, tensor in state.items()}
    tensors["vae.decoder.conv.weight"] = torch.arange(4.0)
    save_file(tensors, path, {"config": json.dumps({"transformer": config()}), "model_version": "2.3.0"})
    return path
