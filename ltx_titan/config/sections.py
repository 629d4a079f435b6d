"""What the sections of a job file hold: one model per TOML table, each field with its default and its trade-off.

Types are strict: `"5"` is not 5. An integer is welcome where a number is asked for. Unknown keys are errors. Rules
between fields are in `job.py`.
"""

import os
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

PathText = Annotated[str, AfterValidator(os.path.expanduser)]
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


def _none_is_zero(value: Any) -> Any:
    return 0 if value is None else value


class Section(BaseModel):
    """One table of a job file."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class JobSection(Section):
    """`[job]`: where the run writes and what it is called."""

    dump_folder: PathText = "outputs/debug"
    """Folder of everything the job writes; one that holds a complete checkpoint is resumed."""
    description: str = ""
    """Free text, kept with the results."""


class ModelSection(Section):
    """`[model]`: which weights are trained, and how."""

    checkpoint_path: PathText | None = None
    """Official checkpoint (.safetensors); its metadata decides the architecture. With `mode = "lora"` it may be an fp8
    or NVFP4 file; of a split pack (LTX-2.5), give the transformer's."""
    mode: Literal["full", "lora"] = "full"
    """`full` trains every transformer weight (about 16 bytes each, sharded); `lora` small adapters on a frozen base."""
    modalities: Literal["auto", "av", "video", "audio"] = "auto"
    """Streams that are built. `auto` builds those that the job uses; a stream left out saves its weights' memory."""
    init: Literal["checkpoint", "random"] = "checkpoint"
    """`random` needs no file: for benchmarks and tests, never for a model worth keeping."""
    shape: PathText | None = None
    """With `init = "random"`: ltx-2-19b, ltx-2.3-22b, ltx-2.5-22b, or a JSON file with checkpoint metadata."""
    num_layers: Positive | None = None
    """With `init = "random"`: keep this many blocks, so that a benchmark of one block fits a smaller GPU."""
    adapter_path: PathText | None = None
    """With `mode = "lora"`: adapter file to start from; unset starts from the base model."""
    connectors_path: PathText | None = None
    """File with the text connectors; unset means `checkpoint_path`. Unused where the data holds finished contexts."""


class SyntheticSection(Section):
    """`[data.synthetic]`: the clip that every synthetic sample has."""

    width: Positive = 768
    """Pixels; a multiple of 32."""
    height: Positive = 448
    """Pixels; a multiple of 32."""
    num_frames: Positive = 89
    """Pixel frames, 1 more than a multiple of 8; tokens grow with width x height x frames."""
    fps: float = Field(24.0, gt=0.0)
    """Frames per second; with `num_frames` it decides the length of the sound."""
    num_samples: Positive = 64
    """Distinct samples; a small number is quick to overfit, which is a useful check."""
    text_tokens: Positive = 1024
    """Tokens per caption; the released models read 1024."""
    contexts: bool = True
    """True yields finished text contexts, so that no connectors are needed; false yields features for them."""


class MediaSection(Section):
    """`[data.media]`: clips and captions that are encoded while training, for sets too large to keep encoded.

    Each rank holds the encoders (with LTX-2.3 about 27 GB, 3 GB with an offloaded text encoder) and spends part of
    every step on them, those of a tp or cp group on the same clip; where there is room on disk, `ltx-titan
    process-dataset` and `precomputed` train faster.
    """

    dataset_path: PathText | None = None
    """The table of clips and captions (.csv, .json, .jsonl), as `ltx-titan process-dataset` reads it."""
    text_encoder_path: PathText | None = None
    """Folder of Gemma 3, or the packed text encoder file of LTX-2.5."""
    resolution_buckets: str | None = None
    """Shapes that clips are brought to, `WxHxF;...` in pixels and frames; more of them make batches harder to fill."""
    video_vae_path: PathText | None = None
    """File of the video VAE (split packs); unset means `model.checkpoint_path`."""
    audio_vae_path: PathText | None = None
    """File of the audio VAE (split packs); unset means `model.checkpoint_path`."""
    video_column: str | None = None
    """Column of videos; unset means `video` or `media_path`."""
    caption_column: str | None = None
    """Column of captions; unset means `caption`."""
    lora_trigger: str | None = None
    """Word that is put in front of every caption."""
    vae_tiling: bool = False
    """Encode frames in tiles: less memory for large clips, faint seams."""
    offload_text_encoder: bool = False
    """Keep the text encoder in host memory and copy it to the GPU for each caption: 24 GB less between captions, about
    a second more for each."""
    cache_dir: PathText | None = None
    """Folder that keeps what was encoded, for the next epoch or job; ranks may share it. Unset keeps nothing."""
    cache_gib: float = Field(100.0, gt=0.0)
    """Size of that folder; what was not used for longest makes room."""


class DataSection(Section):
    """`[data]`: where samples come from and how far ahead they are read."""

    source: Literal["precomputed", "media", "synthetic"] = "precomputed"
    """`media` encodes clips while training; `synthetic` measures speed without a data set."""
    root: PathText | None = None
    """Folder with latents/, conditions/ and so on, or the folder that holds it as `.precomputed`."""
    caption_dropout: Share = 0.0
    """Share of samples that are trained without their caption, so that guidance has something to compare with."""
    num_workers: int = Field(2, ge=0)
    """Threads that read ahead; 0 reads within the step, which is slower but simple to debug."""
    prefetch: Positive = 4
    """Micro-batches read ahead; each costs its size in (pinned) host memory."""
    media: MediaSection = MediaSection()
    """Clips that are encoded while training; unused otherwise."""
    synthetic: SyntheticSection = SyntheticSection()
    """Shape of synthetic samples; unused otherwise."""


class SigmaSection(Section):
    """`[sigma]`: how noise levels are drawn in training."""

    name: Literal["shifted_logit_normal", "uniform"] = "shifted_logit_normal"
    """`shifted_logit_normal` leans to high noise for long clips, as in base training; `uniform` never does."""
    std: float = Field(1.0, gt=0.0)
    """shifted_logit_normal: spread; larger draws more extreme levels."""
    eps: float = Field(1e-3, ge=0.0, lt=1.0)
    """shifted_logit_normal: lowest level."""
    uniform_prob: Share = 0.1
    """shifted_logit_normal: share drawn uniformly instead, so that low noise is never starved."""
    min_value: Share = 0.0
    """uniform: lowest level."""
    max_value: Share = 1.0
    """uniform: highest level."""


class TrainingSection(Section):
    """`[training]`: length, batch and precision of the run."""

    steps: Positive = 2000
    """Optimizer steps; the horizon of the learning-rate schedule."""
    stop_at: Positive | None = None
    """End after this step and leave the schedule alone, to run a job in parts."""
    seed: int = Field(42, ge=0, lt=2**63)
    """Seeds data order, noise and new weights; results do not depend on the number of GPUs."""
    global_batch_size: Positive = 1
    """Samples per optimizer step over all ranks; the batch that the learning rate belongs to."""
    local_batch_size: Positive = 1
    """Samples in one forward of a data-parallel rank; accumulation follows. Larger is faster until memory ends."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Compute precision; float32 is for checks."""
    max_grad_norm: float = Field(1.0, ge=0.0)
    """Clip the gradient to this norm; 0 never clips."""
    gc_interval: Positive = 50
    """Steps between Python's garbage collections, which are off otherwise because ranks would pause at random."""


class ParallelismSection(Section):
    """`[parallelism]`: how many ranks each axis of the mesh has; their product is the world size."""

    dp_replicate: Positive = 1
    """Copies of the sharded model (HSDP); more copies mean less traffic between nodes and more memory."""
    dp_shard: int = Field(-1, ge=-1)
    """Ranks that share the weights (FSDP2); -1 takes what is left."""
    cp: Positive = 1
    """Context parallel: ranks that share one clip's tokens; for clips too long for one GPU."""
    tp: Positive = 1
    """Tensor parallel: ranks that share each matrix; keep it within a node."""
    cpu_offload: bool = False
    """Keep sharded weights, gradients and optimizer state in host memory; for models that fit no other way, slow."""


class ActivationCheckpointSection(Section):
    """`[activation_checkpoint]`: activations computed again in backward instead of kept."""

    mode: Literal["none", "full", "selective", "every_k"] = "none"
    """`full` keeps least, for a third more compute; `selective` keeps what is dear; `every_k` drops each k-th block."""
    k: Positive | None = None
    """every_k: one block in k is computed again."""
    offload: bool = False
    """full, every_k: keep what recomputed blocks start from in host memory, copied beside the computation."""


class CompileSection(Section):
    """`[compile]`: torch.compile, block by block."""

    enable: bool = False
    """Faster steps for a minute or two of start-up; float8 needs it to win."""
    graphs: Literal["auto", "on", "off"] = "auto"
    """Replay forward and backward as one CUDA graph for each batch shape, so that the host's speed does not matter.
    `auto` does so where the job allows it and logs the reason where not; `on` refuses such a job."""


class Float8Section(Section):
    """`[float8]`: float8 matrix products in attention and FFN."""

    recipe: Literal["none", "tensorwise", "rowwise"] = "none"
    """`tensorwise` is fastest; `rowwise` is more exact."""
    all_gather: bool = False
    """tensorwise: FSDP2 gathers weights as float8, half the traffic of bfloat16, for a little work per step."""


class KernelsSection(Section):
    """`[kernels]`: what computes the fused operations."""

    backend: Literal["auto", "triton", "torch"] = "auto"
    """`auto` takes what measured fastest: `triton`, the fused kernels, on Hopper GPUs; `torch`, plain, elsewhere."""


class LossSection(Section):
    """`[loss]`: what the streams' losses count."""

    video_weight: float = Field(1.0, ge=0.0)
    """Factor on the video loss; the two losses are added."""
    audio_weight: float = Field(1.0, ge=0.0)
    """Factor on the audio loss, which is usually the larger one; lower it where sound learns at the video's expense."""


class SchedulerSection(Section):
    """`[scheduler]`: the learning rate over the steps after warm-up, as a factor of `optimizer.lr`."""

    name: Literal["constant", "linear", "cosine", "cosine_with_restarts", "polynomial", "step", "wsd"] = "constant"
    """`constant` can be prolonged at will; the decaying ones end better; `wsd` is constant with a short decay."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear rise from nothing; a few dozen calm the first updates of Adam."""
    start_factor: float = Field(1.0, gt=0.0)
    """linear: factor at the start."""
    end_factor: float = Field(0.1, ge=0.0)
    """linear: factor at the end."""
    min_factor: Share | None = None
    """cosine, cosine_with_restarts, wsd: lowest factor. Unset means 0, for restarts 0.5 (5e-5 at the default lr)."""
    restart_period: Positive | None = None
    """cosine_with_restarts: steps of the first period; unset means a quarter of the run."""
    restart_mult: Positive = 1
    """cosine_with_restarts: each period is this many times as long as the one before."""
    power: float = Field(1.0, gt=0.0)
    """polynomial: 1 is a straight line to 0; larger falls earlier."""
    gamma: float = Field(0.1, gt=0.0)
    """step: factor at each step down."""
    step_size: Positive | None = None
    """step: steps between two steps down; unset means half of the run."""
    decay_steps: Positive | None = None
    """wsd: length of the linear decay at the end; unset means a fifth of the run."""


class CheckpointSection(Section):
    """`[checkpoint]`: what is kept of the run."""

    enable: bool = True
    """False keeps nothing, neither state nor export: for measuring speed."""
    interval: Annotated[int, BeforeValidator(_none_is_zero), Field(ge=0)] = 250
    """Steps between checkpoints (about 12 bytes per trained weight each); 0 saves only at the end."""
    keep_last: int = Field(2, ge=-1)
    """Newest checkpoints that are kept; -1 keeps all. The newest is never deleted."""
    background: bool = True
    """Write while training goes on, from a copy in host memory (as large as the checkpoint); false waits."""
    resume: bool = True
    """Continue from the newest complete checkpoint; false starts afresh, in an empty folder only."""
    export: bool = True
    """Write export/*.safetensors for inference tools at the end."""
    export_interval: Annotated[int, BeforeValidator(_none_is_zero), Field(ge=0)] = 0
    """Steps between further exports on the way (training waits while each is written); 0 exports at the end only."""
    export_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of the export; float32 doubles the file."""


class MetricsSection(Section):
    """`[metrics]`: what is logged."""

    interval: Positive = 1
    """Steps between lines; each line costs one device synchronisation."""
    tensorboard: bool = True
    """Also write tensorboard/."""
    wandb: Literal["off", "online", "offline"] = "off"
    """Also log to Weights & Biases (`pip install wandb`); `offline` writes below the dump folder, for `wandb sync`."""
    wandb_project: str = "ltx-titan"
    """Project there; the run is called like the dump folder."""
    wandb_entity: str | None = None
    """User or team there; unset takes your default one."""
    wandb_tags: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Tags of the run."""
    wandb_clips: bool = True
    """Upload validation clips; false keeps them on this machine."""


class ProfilingSection(Section):
    """`[profiling]`: a trace of a few steps."""

    trace_start: Positive | None = None
    """First traced step (from 1); unset traces nothing. Choose one after compilation."""
    trace_steps: Positive = 3
    """Traced steps; each adds tens of MB to the file."""
    memory_snapshot: bool = False
    """Record every allocation; slows the run."""
