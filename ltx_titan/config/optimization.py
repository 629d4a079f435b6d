"""Sections about learning: sigma distribution, loss weights, optimizer, learning-rate schedule and LoRA adapters."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, StrictInt, field_validator, model_validator

from ltx_titan.config.base import AboveZero, Decay, Fraction, NonNegative, Positive, Section, StreamName, Words

OptimizerName = Literal["adamw", "adamw8bit", "adamw4bit", "adamw_schedulefree", "prodigy", "muon", "adafactor"]
SigmaName = Literal["shifted_logit_normal", "uniform", "distilled"]
ErrorName = Literal["mse", "huber"]
WeightingName = Literal["none", "sigma_sqrt", "cosmap", "min_snr"]
BaseDtype = Literal["float32", "bfloat16", "int8", "int4", "float8", "nvfp4"]
Float8Matmuls = Literal["auto", "on", "off"]

# Each updates a parameter on its own, so that an update can run inside the backward pass.
_PER_PARAMETER = ("adamw", "adamw8bit", "adamw4bit", "adamw_schedulefree", "adafactor")
_ROUNDED = ("adamw", "adamw8bit", "adamw4bit", "adafactor")
_RENAMED = dict.fromkeys(
    ("schedule_free", "schedulefree", "adamw_schedule_free", "schedulefree_adamw", "adamwschedulefree"),
    "adamw_schedulefree",
)
"""Other spellings of an optimizer's name."""
_LOWEST_PRODIGY_LR = 0.01


class SigmaSection(Section):
    """`[sigma]`: distribution of the sigmas that are drawn in training; 1 is pure noise."""

    name: SigmaName = "shifted_logit_normal"
    """`shifted_logit_normal` draws higher sigmas for longer clips, as in base training; `uniform` does not. `distilled`
    draws the eight sigmas at which a distilled checkpoint is sampled, each equally often."""
    shift: AboveZero | None = None
    """shifted_logit_normal: factor on the odds of sigma (SD3's timestep shift) for clips of any length; unset follows
    the number of tokens: 2.6 at 1,024, 7.8 at 4,096, and higher beyond."""
    std: AboveZero = 1.0
    """shifted_logit_normal: standard deviation of the log-odds; larger draws more extreme sigmas."""
    eps: float = Field(1e-3, ge=0.0, lt=0.5)
    """shifted_logit_normal: lowest sigma."""
    uniform_prob: Fraction = 0.1
    """shifted_logit_normal: fraction of sigmas drawn uniformly instead, so that low sigmas are always trained."""
    min_value: Fraction = 0.0
    """uniform: lowest sigma."""
    max_value: Fraction = 1.0
    """uniform: highest sigma."""
    video_min: Fraction = 0.0
    """Lowest sigma of the video; the distribution is cut off there and keeps its shape above. Raise it to learn motion
    and composition only."""
    video_max: Fraction = 1.0
    """Highest sigma of the video. Lower it to learn texture and detail only."""
    audio_min: Fraction = 0.0
    """Lowest sigma of the audio."""
    audio_max: Fraction = 1.0
    """Highest sigma of the audio."""

    def range_of(self, stream: StreamName) -> tuple[float, float]:
        """Lowest and highest sigma of a stream."""
        return (self.video_min, self.video_max) if stream == "video" else (self.audio_min, self.audio_max)


class LossSection(Section):
    """`[loss]`: error of the velocity, and weights over sigma and of the two streams."""

    name: ErrorName = "mse"
    """Error of the predicted velocity: `mse` is its square, as in base training; `huber` grows linearly beyond
    `huber_delta`, so that outliers, such as defects of the data, matter less."""
    huber_delta: AboveZero = 1.0
    """huber: difference at which the error turns linear; a velocity has a standard deviation of about 1.4."""
    weighting: WeightingName = "none"
    """Factor by sigma s. `cosmap`, 2 / (pi (1 - 2 s + 2 s^2)), favors medium sigmas; `min_snr`, min((1 - s)^2,
    `snr_gamma` s^2), nearly drops high ones; `sigma_sqrt`, 1 / s^2, favors low ones and needs a lowest sigma well
    above 0."""
    snr_gamma: AboveZero = 5.0
    """min_snr: signal-to-noise ratio above which it no longer counts."""
    video_weight: NonNegative = 1.0
    """Factor of the video loss; the two losses are added."""
    audio_weight: NonNegative = 1.0
    """Factor of the audio loss, which is usually the larger one; lower it if audio improves at the expense of video."""


class PreservationSection(Section):
    """`[preservation]`: keeps an adapted model close to its base; needs `model.mode = "lora"`.

    Each weight adds to the loss the mean squared difference from the velocity of the same model with its adapters
    switched off, on the same noised clip. Both parts are logged without their weights.
    """

    prior_weight: NonNegative = 0.0
    """Weight of the difference on the batch's own captions, which holds back what is learned as well: 0.1 to 0.5 for
    a start. Costs a forward pass of the base, a third to a half of a step. 0 computes nothing."""
    blank_prompt_weight: NonNegative = 0.0
    """Weight of the difference without captions, so that what is learned stays tied to captions: 0.5 to 1. Costs a
    forward pass of the base and a second training pass, 1.3 to 1.5 steps more."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts that are computed, as they are logged under `loss/`."""
        weights = {"prior": self.prior_weight, "blank_prompt": self.blank_prompt_weight}
        return tuple(name for name, weight in weights.items() if weight > 0)

    @property
    def passes(self) -> int:
        """Forward and backward passes over a batch: without captions there is a second one."""
        return 2 if self.blank_prompt_weight > 0 else 1


class _Selection(Section):
    """Selects weights by name and block; both keys must match."""

    match: Words = ()
    """Parts of the model (`video`, `audio`, `cross_modal`, `self_attention`, `text_attention`, `feed_forward`) or of
    names of weights (`attn1.to_q`, `audio_to_video_attn`, `patchify_proj`, `lora_B`), any of them; unset means all."""
    blocks: Annotated[tuple[StrictInt, StrictInt], Field(strict=False)] | None = None
    """First and last block, counted from 0; unset means all, and the weights outside the blocks."""

    @model_validator(mode="after")
    def _selects_something(self) -> Self:
        if not self.match and self.blocks is None:
            raise ValueError("expected match or blocks, found neither; set the section's own keys for all weights")
        if self.blocks is not None and not 0 <= self.blocks[0] <= self.blocks[1]:
            raise ValueError(
                f"blocks = {list(self.blocks)}: expected [first, last] with 0 <= first <= last; correct them"
            )
        return self


class ParameterGroup(_Selection):
    """`[[optimizer.groups]]`: weights that are trained differently.

    A weight belongs to the first group that matches it. Each group's gradient norm is logged as
    `optim/grad_norm_<name>`.
    """

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    """Name of the group in the metrics: lower-case letters, digits and underscores."""
    lr_factor: AboveZero = 1.0
    """Factor on the learning rate. 0.1 protects a stream that is good already; 16 on `lora_B` is LoRA+."""
    weight_decay: NonNegative | None = None
    """Decoupled weight decay; unset means `optimizer.weight_decay`."""
    freeze: bool = False
    """Do not train these weights: no gradients and no optimizer state for them."""

    @model_validator(mode="after")
    def _is_trained_or_frozen(self) -> Self:
        if self.name in ("video", "audio", "cross"):
            raise ValueError(f"name = {self.name!r} is that of a stream in the metrics; choose another name")
        if self.freeze and (self.lr_factor != 1.0 or self.weight_decay is not None):
            raise ValueError("freeze = true: expected neither lr_factor nor weight_decay; remove them, or freeze")
        return self


class OptimizerSection(Section):
    """`[optimizer]`: update rule and its memory.

    State per trained weight: adamw 8 bytes, adamw8bit 2.1, adamw4bit 1.1, adamw_schedulefree 8, prodigy 16, muon 4,
    adafactor close to 0. docs/optimizers.md says when to use each.
    """

    name: OptimizerName = "adamw"
    """`adamw_schedulefree` averages the weights instead of decaying the rate, and samples, evaluates and exports the
    average. `prodigy` estimates its step size. `muon` orthogonalizes the updates of the blocks' matrices, which it
    gathers for that; AdamW updates the rest."""
    lr: Annotated[float, Field(gt=0.0, le=1.0)] = 1e-4
    """Peak learning rate, multiplied by the schedule. Muon's updates are scaled so that AdamW's rates fit. AdamW moves
    every weight by about this much in a step, so nothing above 1 can train. prodigy: factor on the estimated step
    size, 1 if unset."""
    betas: Annotated[tuple[Decay, Decay], Field(strict=False)] = (0.9, 0.999)
    """AdamW and Prodigy: decay rates of the first and second moment; a lower second one adapts faster and is noisier.
    adamw_schedulefree: the first is the average's weight in the trained weights."""
    eps: AboveZero = 1e-8
    """AdamW and Prodigy: added to the denominator; raise it if rarely used weights get huge updates."""
    d_coef: AboveZero = 1.0
    """prodigy: factor on the estimate of the step size; 0.5 or 2 if it learns too fast or too slowly."""
    weight_decay: NonNegative = 0.01
    """Decoupled weight decay, multiplied by the learning rate."""
    momentum: Decay = 0.95
    """Muon: momentum."""
    stochastic_rounding: bool = False
    """AdamW and Adafactor on bfloat16 weights: round stochastically, so that small updates are kept on average."""
    offload_state: bool = False
    """Keep the state in host memory and copy it block by block; moves its size over PCIe twice per step."""
    in_backward: bool = False
    """Update each weight as soon as its gradient is ready and free the gradient; excludes clipping and accumulation."""
    ema_decay: Decay | None = None
    """Decay rate of a moving average of the trained weights (4 bytes each), such as 0.999; unset keeps none."""

    groups: Annotated[tuple[ParameterGroup, ...], Field(strict=False)] = ()
    """Weights with a learning rate or weight decay of their own, or frozen ones."""

    @field_validator("name", mode="before")
    @classmethod
    def _is_known(cls, name: object) -> object:
        if isinstance(name, str) and name in _RENAMED:
            raise ValueError(f'expected "{_RENAMED[name]}", found another spelling, "{name}"; change it')
        return name

    @model_validator(mode="before")
    @classmethod
    def _prodigy_has_another_default(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("name") == "prodigy":
            return {"lr": 1.0, **data}
        return data

    @model_validator(mode="after")
    def _supports_its_options(self) -> Self:
        names = [group.name for group in self.groups]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"groups: expected different names, found {', '.join(repeated)} twice; rename one")
        per_parameter = ", ".join(_PER_PARAMETER)
        if self.in_backward and self.name not in _PER_PARAMETER:
            raise ValueError(
                f'in_backward = true: expected name to be one of {per_parameter}, found "{self.name}"; change either'
            )
        # One optimizer per parameter against one per block: the two group parameters differently.
        if self.in_backward and self.offload_state:
            raise ValueError(
                "expected at most one of in_backward and offload_state to be true, found both; remove one of them"
            )
        if self.stochastic_rounding and self.name not in _ROUNDED:
            raise ValueError(
                f"stochastic_rounding = true: expected name to be one of {', '.join(_ROUNDED)}, "
                f'found "{self.name}"; change either'
            )
        self._check_schedule_free()
        self._check_prodigy()
        return self

    def _check_schedule_free(self) -> None:
        if self.name != "adamw_schedulefree":
            return
        if self.betas[0] == 0.0:
            raise ValueError(
                'betas = [0, ...]: expected a first value above 0 with name = "adamw_schedulefree", whose average '
                "cannot be recovered from the trained weights without it; set it to 0.9"
            )
        if self.ema_decay is not None:
            raise ValueError(
                f'ema_decay = {self.ema_decay}: expected unset with name = "adamw_schedulefree", which averages the '
                "weights itself; remove it"
            )

    def _check_prodigy(self) -> None:
        if self.name != "prodigy":
            return
        if self.lr < _LOWEST_PRODIGY_LR:
            raise ValueError(
                f'lr = {self.lr}: expected about 1 with name = "prodigy", where it is a factor on the estimated step '
                "size; remove it, and set d_coef for smaller or larger steps"
            )
        if self.offload_state:
            raise ValueError(
                'offload_state = true: expected false with name = "prodigy", whose step size is estimated from all '
                "weights before any is updated; remove it"
            )
        scaled = [group.name for group in self.groups if group.lr_factor != 1.0]
        if scaled:
            raise ValueError(
                f'groups: expected lr_factor = 1 with name = "prodigy", whose step size is estimated for all weights '
                f"together; found another one in {', '.join(scaled)}; remove it, or use adamw"
            )


class SchedulerSection(Section):
    """`[scheduler]`: learning rate after the warmup, as a factor of `optimizer.lr`."""

    name: Literal["constant", "linear", "cosine", "cosine_with_restarts", "polynomial", "step", "wsd"] = "constant"
    """`constant` can be extended at any time; the decaying ones reach a lower loss; `wsd` is constant with a short
    decay at the end."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear increase from 0; a few dozen stabilize Adam's first updates."""
    start_factor: AboveZero = 1.0
    """linear: factor at the start."""
    end_factor: NonNegative = 0.1
    """linear: factor at the end."""
    min_factor: Fraction | None = None
    """cosine, cosine_with_restarts, wsd: lowest factor. Unset means 0; for cosine_with_restarts 0.5."""
    restart_period: Positive | None = None
    """cosine_with_restarts: steps of the first period; unset means a quarter of the run."""
    restart_mult: Positive = 1
    """cosine_with_restarts: ratio between the lengths of successive periods."""
    power: AboveZero = 1.0
    """polynomial: exponent; 1 decays linearly to 0, larger decays earlier."""
    gamma: AboveZero = 0.1
    """step: factor applied at each decay."""
    step_size: Positive | None = None
    """step: steps between two decays; unset means half of the run."""
    decay_steps: Positive | None = None
    """wsd: steps of the linear decay at the end; unset means a fifth of the run."""


ADAPTER_KEYS = ("type", "algo")
"""Keys with which other trainers choose a kind of adapter; ours has one kind, and `dora`."""


def unsupported_adapter(kind: object) -> str | None:
    """Why a kind of adapter that is often asked for is not supported; None for any other value."""
    name = {"lokr": "LoKr", "loha": "LoHa"}.get(kind.lower()) if isinstance(kind, str) else None
    if name is None:
        return None
    return (
        f"{name} is not supported, because its update is a Kronecker or Hadamard product: the rows and columns of a "
        "weight that tensor parallelism puts on a rank are not those of the factors, and no library that ltx_titan "
        "depends on shards them; remove the key to train a LoRA, or set lora.dora = true"
    )


class LoRARank(_Selection):
    """`[[lora.ranks]]`: adapted layers with another rank. A layer has the rank of the first entry that matches it."""

    rank: Positive
    """Rank of these adapters."""
    alpha: AboveZero | None = None
    """Alpha of these adapters; unset keeps the scale of the others."""


class LoRASection(Section):
    """`[lora]`: low-rank adapters on a frozen base, `y = W x + (alpha / rank) B A x`; needs `model.mode = "lora"`."""

    rank: Positive = 32
    """Rank of an adapter; higher learns more and is larger. 8-16 for motion, 32-64 for a style, 96-128 for many."""
    alpha: AboveZero = 32.0
    """Scale of an adapter is alpha / rank. Exports fold it into B, because the LoRA file format does not store it."""
    dropout: Decay = 0.0
    """Dropout probability of an adapter's input; regularizes small datasets and costs a pass over the input."""
    targets: Annotated[tuple[str, ...], Field(min_length=1, strict=False)] = ("all_attention",)
    """Presets (`all_attention`, `video`, `v2v`, ...) or suffixes of module names (`attn1.to_q`), in any combination."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead, which keeps the update size of high ranks."""
    dora: bool = False
    """Train magnitude and direction of each output separately (DoRA). Slower; exported as a merged checkpoint only."""
    base_dtype: BaseDtype = "bfloat16"
    """Format of the frozen weights. int8 and float8 halve their memory, int4 quarters it, nvfp4 needs a fifth more than
    int4 and is more accurate. An official fp8 or NVFP4 file is used unchanged with float8 or nvfp4."""
    float8_matmuls: Float8Matmuls = "off"
    """Multiply a float8 base in float8, with activations quantized on use: faster, with gradients a few percent less
    exact. `off` dequantizes; `auto` multiplies so on GPUs that can (compute capability 8.9); `on` also emulates it on a
    CPU."""

    ranks: Annotated[tuple[LoRARank, ...], Field(strict=False)] = ()
    """Layers with another rank than `rank`, among those of `targets`."""

    @model_validator(mode="before")
    @classmethod
    def _is_of_a_supported_kind(cls, table: Any) -> Any:
        for key in ADAPTER_KEYS if isinstance(table, dict) else ():
            if (reason := unsupported_adapter(table.get(key))) is not None:
                raise ValueError(f'{key} = "{table[key]}": {reason}')
        return table

    @field_validator("targets", mode="before")
    @classmethod
    def _is_a_list(cls, targets: object) -> object:
        # A string is a sequence too: its letters would become the targets.
        if isinstance(targets, str):
            raise ValueError(f'expected a list of presets or name endings, found a string; write ["{targets}"]')
        return targets

    @property
    def scaling(self) -> float:
        """Factor of `B A x`."""
        # rsLoRA (Kalajdzievski, 2023): with alpha / rank the update shrinks as the rank grows.
        return self.alpha / self._divisor(self.rank)

    def with_rank(self, chosen: LoRARank) -> Self:
        """The section of a layer with a rank of its own."""
        alpha = self.scaling * self._divisor(chosen.rank) if chosen.alpha is None else chosen.alpha
        return self.model_copy(update={"rank": chosen.rank, "alpha": alpha})

    def _divisor(self, rank: int) -> float:
        return rank**0.5 if self.rslora else rank
