"""Error of the formats of a frozen base: of weights, and of the gradients of adapters on one block.

    python -m ltx_titan.benchmarks.quantization [--shape ltx-2.3-22b] [--out rows.jsonl]

1. Weights: 2 million random ones, normally distributed and with heavier tails (Student's t with 5 degrees of freedom,
   nearer to trained weights, of which a few are large).
2. Gradients: a model of one block with random weights and adapters on all of its linear layers, whose bases are in a
   format, against float32; one clip of 48 video tokens. It shows how far a format turns a step of training, at the
   start and without what adapters could compensate; not how much a trained model loses.

Errors are relative L2 norms. NF4 (Dettmers et al., 2023; groups of 64, scales in bfloat16, not quantized again) is not
supported by `lora.base_dtype` and is computed for comparison.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ltx_titan.benchmarks.measure import environment, write_rows
from ltx_titan.benchmarks.precision import make_inputs, relative_error
from ltx_titan.common.options import Maybe, parse_options
from ltx_titan.config import BaseDtype, LoRASection
from ltx_titan.lora import adapters, apply_lora
from ltx_titan.model import LTXTransformer
from ltx_titan.model.init import initial_spread
from ltx_titan.weights import QuantizedLinear, released_config

# Quantiles of a normal distribution, from the paper's appendix.
_NF4 = (
    *(-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0, 0.0795803, 0.1609302),
    *(0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0),
)
_NF4_GROUP = 64
_BANK = 1 << 24


@dataclass(frozen=True)
class QuantizationOptions:
    """Options of the benchmark."""

    shape: str = "ltx-2.3-22b"
    """Released model, or JSON file with checkpoint metadata."""

    out: Maybe[Path] = None
    """File for the rows, as JSON lines."""


def nf4(weight: Tensor) -> Tensor:
    """A weight rounded to NF4; its size is a multiple of the group's."""
    levels = torch.tensor(_NF4)
    groups = weight.reshape(-1, _NF4_GROUP)
    scale = groups.abs().amax(1, keepdim=True).bfloat16().float()
    codes = torch.bucketize(groups / scale, (levels[1:] + levels[:-1]) / 2)
    return (levels[codes] * scale).view_as(weight)


def quantized(layer: nn.Linear, form: BaseDtype) -> Tensor:
    """A layer's weight after rounding to a format."""
    with torch.no_grad():
        return QuantizedLinear.from_linear(layer, form).weight.float()


FORMS: dict[str, Callable[[nn.Linear], Tensor]] = {
    "bfloat16": lambda layer: layer.weight.bfloat16().float(),
    **{form: partial(quantized, form=form) for form in ("int8", "float8", "nvfp4", "int4")},
    "nf4": lambda layer: nf4(layer.weight),
}


def weight_errors() -> dict[str, dict[str, float]]:
    """Relative errors of weights by distribution and format."""
    torch.manual_seed(0)
    samples = {
        "normal": torch.randn(512, 4096),
        "student t, 5 degrees": torch.distributions.StudentT(5.0).sample((512, 4096)),
    }
    found = {}
    for name, weight in samples.items():
        layer = nn.Linear(4096, 512, bias=False)
        layer.weight = nn.Parameter(0.02 * weight, requires_grad=False)
        found[name] = {form: relative_error(rounded(layer), layer.weight) for form, rounded in FORMS.items()}
    return found


def gradient_errors(shape: str) -> dict[str, dict[str, float]]:
    """Relative errors of the outputs, and of all gradients together, by format of the base."""
    transformer = {**released_config(shape)["transformer"], "num_layers": 1}
    strategy, inputs = make_inputs(torch.device("cpu"), transformer, 2, 4, 6)
    assert inputs.video is not None and inputs.audio is not None
    with torch.device("meta"):
        model = LTXTransformer.from_config(transformer)
    model.to_empty(device="cpu")
    _fill(model)
    apply_lora(model, LoRASection(targets=("t2v",), base_dtype="float32"))
    layers = list(adapters(model).values())
    for layer in layers:
        # Not zero, as at the start, or only half of the gradients would be there.
        nn.init.normal_(layer.lora_A.weight, std=0.02)
        nn.init.normal_(layer.lora_B.weight, std=0.02)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)

    def run() -> tuple[Tensor, Tensor]:
        """All outputs, and all gradients, as vectors."""
        model.zero_grad(set_to_none=True)
        video, audio = model(inputs.video, inputs.audio)
        strategy.loss(video, audio, inputs).total.backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        return torch.cat([video.detach().flatten(), audio.detach().flatten()]), torch.cat(gradients)

    outputs, gradients = run()
    bases = [layer.base for layer in layers if isinstance(layer.base, nn.Linear)]
    exact = [base.weight for base in bases]
    found = {}
    for form, rounded in FORMS.items():
        for base, weight in zip(bases, exact, strict=True):
            base.weight = weight
            base.weight = nn.Parameter(rounded(base), requires_grad=False)
        seen = run()
        found[form] = {"outputs": relative_error(seen[0], outputs), "gradients": relative_error(seen[1], gradients)}
        print(form, found[form], flush=True)
    return found


@torch.no_grad()
def _fill(model: nn.Module) -> None:
    """Initial weights from one bank of numbers: drawing a billion takes a minute."""
    bank = torch.randn(_BANK, generator=torch.Generator().manual_seed(0))
    for number, (name, parameter) in enumerate(model.named_parameters()):
        mean, std = initial_spread(name, tuple(parameter.shape))
        # By a prime, so that no two weights are the same numbers.
        numbers = bank.roll(number * 8_161_033 % _BANK)
        for part in parameter.view(-1).split(_BANK):
            part.copy_(numbers[: part.numel()] * std + mean)


def main() -> None:
    """Prints and writes both parts."""
    options = parse_options(
        QuantizationOptions, sys.argv[1:], prog="ltx_titan.benchmarks.quantization", description=__doc__
    )
    common = environment(torch.device("cpu"))
    rows = [{**common, "case": "weights", "errors": weight_errors()}]
    print(rows[0]["errors"], flush=True)
    write_rows(options.out, rows)
    rows.append({**common, "case": "gradients, one block", "errors": gradient_errors(options.shape)})
    write_rows(options.out, rows)


if __name__ == "__main__":
    main()
