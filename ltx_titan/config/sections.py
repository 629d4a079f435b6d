"""Sections about the run itself: model, data, precision, parallelism, checkpoints and logs.

One model per TOML table; the string below each field is its documentation, with the trade-off. `optimization.py` holds
the sections about learning, `streams.py` and `validation.py` those with lists of conditions and samples, `rules.py` the
rules between fields.
"""

import re
from pathlib import PurePath
from typing import Annotated, Literal

from pydantic import Field

from ltx_titan.config.base import (
    AboveZero,
    ComputeDtype,
    Fraction,
    FrameRate,
    Interval,
    NonNegative,
    PathText,
    Positive,
    RepoName,
    Section,
    Seed,
    Words,
)
from ltx_titan.config.streams import AudioCondition, VideoCondition

ActivationCheckpointMode = Literal["none", "full", "selective", "every_k", "budget"]
ExportLayout = Literal["transformer", "with_connectors", "complete"]


class JobSection(Section):
    """`[job]`: output folder and description of the run."""

    dump_folder: PathText = "outputs/debug"
    """Folder of everything the job writes; if it holds a complete checkpoint, the job resumes from it."""
    description: str = ""
    """Free text, stored with the results."""
    trigger: str | None = None
    """Trigger word of the captions, stored in LoRA files, whose readers show it. Unset means the one that the data was
    prepared with (`--lora-trigger`, `data.media.lora_trigger`)."""
    license: str | None = None
    """License of the trained weights, stored in LoRA files; unset means the base's, if its file states one."""
    deterministic: bool = False
    """Use only deterministic algorithms, so that the same job gives the same bits twice on the same hardware; 30 %
    slower in one measurement, and an error where an operation has no deterministic form."""
    timeout_s: Annotated[float, Field(ge=5.0)] = 1800.0
    """Seconds that ranks wait for another one before the run ends and names it; raise it if one rank does what others
    wait for longer than this, such as reading a checkpoint from a slow disk."""


class ModelSection(Section):
    """`[model]`: the transformer and which of its weights are trained."""

    checkpoint_path: PathText | None = None
    """Official checkpoint (.safetensors); its metadata defines the architecture. With `mode = "lora"` an fp8 or NVFP4
    file works too. For a split pack (LTX-2.5), the file of the transformer."""
    mode: Literal["full", "lora"] = "full"
    """`full` trains every transformer weight (about 16 bytes each, sharded); `lora` small adapters on a frozen base."""
    modalities: Literal["auto", "av", "video", "audio"] = "auto"
    """Streams that are built. `auto` builds those that the job uses; a stream that is not built takes no memory."""
    init: Literal["checkpoint", "random"] = "checkpoint"
    """`random` needs no file: for benchmarks and tests only."""
    shape: PathText | None = None
    """With `init = "random"`: ltx-2-19b, ltx-2.3-22b, ltx-2.5-22b, or a JSON file with checkpoint metadata."""
    num_layers: Positive | None = None
    """With `init = "random"`: number of blocks, so that a benchmark of a few blocks fits a smaller GPU."""
    adapter_path: PathText | None = None
    """With `mode = "lora"`: adapter file to start from; unset starts from the base model."""
    connectors_path: PathText | None = None
    """File with the text connectors; unset means `checkpoint_path`. Unused if the data holds finished contexts."""


class SyntheticSection(Section):
    """`[data.synthetic]`: shape of the samples of `source = "synthetic"`."""

    width: Positive = 768
    """Pixels; a multiple of 32."""
    height: Positive = 448
    """Pixels; a multiple of 32."""
    num_frames: Positive = 89
    """Pixel frames, 1 + a multiple of 8; the number of tokens grows with width x height x frames."""
    fps: FrameRate = 24.0
    """Frames per second; together with `num_frames` it sets the length of the audio."""
    num_samples: Positive = 64
    """Distinct samples; a small number overfits quickly, which is a useful check."""
    text_tokens: Positive = 1024
    """Tokens per caption; the released models use 1024."""
    contexts: bool = True
    """True yields finished text contexts, so that no connectors are loaded; false yields features for them."""


class MediaSection(Section):
    """`[data.media]`: clips and captions that are encoded during training, for datasets too large to store encoded.

    Each rank holds the encoders (about 27 GB for LTX-2.3, 3 GB with an offloaded text encoder) and spends part of every
    step on them; the ranks of a tp or cp group encode the same clip. If disk space permits, `ltx-titan process-dataset`
    and `source = "precomputed"` train faster.
    """

    dataset_path: PathText | None = None
    """Table of clips and captions (.csv, .json, .jsonl) in the format of `ltx-titan process-dataset`, or a folder of
    clips with a text file NAME.txt beside each."""
    text_encoder_path: PathText | None = None
    """Folder of Gemma 3, or the packed text encoder file of LTX-2.5."""
    resolution_buckets: str | None = None
    """Shapes that clips are resized and cropped to, `WxHxF;...` in pixels and frames; more buckets make batches harder
    to fill."""
    video_vae_path: PathText | None = None
    """File of the video VAE (split packs); unset means `model.checkpoint_path`."""
    audio_vae_path: PathText | None = None
    """File of the audio VAE (split packs); unset means `model.checkpoint_path`."""
    video_column: str | None = None
    """Column of videos; unset means `video` or `media_path`."""
    caption_column: str | None = None
    """Column of captions; unset means `caption`."""
    lora_trigger: str | None = None
    """Trigger word that is prepended to every caption."""
    vae_tiling: bool = False
    """Encode frames in tiles: less memory for large clips, faint seams."""
    offload_text_encoder: bool = False
    """Keep the text encoder in host memory and copy it to the GPU for each caption: 24 GB less between captions, about
    a second more per caption."""
    cache_dir: PathText | None = None
    """Folder that caches encoded samples for the next epoch or job; ranks may share it. Unset caches nothing."""
    cache_gib: AboveZero = 100.0
    """Size limit of that folder; the least recently used samples are evicted."""


class SourceSection(Section):
    """`[[data.sources]]`: one of several prepared datasets that a job trains on."""

    root: PathText
    """Folder with latents/, conditions/ and so on, or the folder that contains it as `.precomputed`."""
    name: Annotated[str, Field(pattern=r"^[\w.-]+$")] | None = None
    """Name in logs and metrics; unset means the folder's."""
    weight: AboveZero | None = None
    """Share of the drawn samples, relative to the weights of the other sources: all of them have one, or none. It
    balances datasets of different sizes; an epoch then has as many samples as all sources together."""
    repeats: Positive | None = None
    """Times that an epoch has each sample of the source, instead of `weight`; unset means once."""
    loss_weight: AboveZero = 1.0
    """Factor on the loss of its samples: below 1 for a regularization set, whose samples are drawn beside those of the
    subject and should pull less. The mean loss of each source is logged apart, without the factor."""
    modality: Literal["all", "video", "audio"] = "all"
    """Streams that the source has. A job with both streams trains on images and silent clips with `"video"`: its audio
    folder is neither needed nor read, and its samples have no audio loss."""
    caption_dropout: Fraction | None = None
    """As `data.caption_dropout`, for this source; unset means that one."""
    trigger: str | None = None
    """Trigger word that the captions were prepared with, stored in LoRA files. Checked, not added: captions are encoded
    already (`process-dataset --lora-trigger`). Unset means the recorded one."""
    video_conditions: Annotated[tuple[VideoCondition, ...], Field(strict=False)] | None = None
    """Conditions of the video, in place of those of [video]; an empty list has none."""
    audio_conditions: Annotated[tuple[AudioCondition, ...], Field(strict=False)] | None = None
    """Conditions of the audio, in place of those of [audio]."""

    @property
    def label(self) -> str:
        """The name, or the folder's without characters that a metric cannot have."""
        path = PurePath(self.root)
        folder = path.parent.name if path.name == ".precomputed" else path.name
        return self.name or re.sub(r"[^\w.-]", "_", folder)


class DataSection(Section):
    """`[data]`: source of the samples and prefetching."""

    source: Literal["precomputed", "media", "synthetic"] = "precomputed"
    """`media` encodes clips during training; `synthetic` measures speed without a dataset."""
    root: PathText | None = None
    """Folder with latents/, conditions/ and so on, or the folder that contains it as `.precomputed`."""
    sources: Annotated[tuple[SourceSection, ...], Field(strict=False)] = ()
    """Several prepared datasets instead of `root`, mixed by weights or repeats."""
    caption_dropout: Fraction = 0.0
    """Fraction of samples that are trained without their caption, which classifier-free guidance needs."""
    num_workers: int = Field(2, ge=0)
    """Threads that read ahead; 0 reads within the step, which is slower but easy to debug."""
    prefetch: Positive = 4
    """Micro-batches read ahead; each costs its size in (pinned) host memory."""
    on_bad_sample: Literal["stop", "skip"] = "stop"
    """Damaged samples: `stop` ends the job with the name of the first. `skip` trains on another sample of that shape
    instead and logs both in skipped_samples.jsonl of the dump folder; the job still ends once more than 1 % of the
    samples, and more than one, are damaged."""
    media: MediaSection = MediaSection()
    """Clips that are encoded during training; used with `source = "media"`."""
    synthetic: SyntheticSection = SyntheticSection()
    """Shape of synthetic samples; used with `source = "synthetic"`."""


class TrainingSection(Section):
    """`[training]`: length, batch and precision of the run."""

    steps: Positive = 2000
    """Optimizer steps; the horizon of the learning-rate schedule."""
    stop_at: Positive | None = None
    """Stop after this step without changing the schedule, to run a job in parts."""
    seed: Seed = 42
    """Seed of data order, noise and new weights; results do not depend on the number of GPUs."""
    global_batch_size: Positive = 1
    """Samples per optimizer step over all ranks; the learning rate is tuned for it."""
    local_batch_size: Positive = 1
    """Samples per forward of a data-parallel rank; gradients are accumulated up to the global batch. Larger is faster
    and needs more memory."""
    dtype: ComputeDtype = "bfloat16"
    """Compute precision; float32 is for numerical checks."""
    weight_dtype: ComputeDtype = "float32"
    """Full fine-tuning: dtype that the trained weights are stored in. bfloat16 halves their memory, and updates below
    its resolution need `optimizer.stochastic_rounding`."""
    max_grad_norm: NonNegative = 1.0
    """Clip the gradient to this norm; 0 disables clipping."""
    max_skipped_steps: int = Field(5, ge=0)
    """Steps in a row whose update is skipped because their loss or gradient norm is not finite or a spike; the run ends
    at the next. Their samples are listed in skipped/. 0 skips none and ends at the first that is not finite, as
    `optimizer.in_backward` always does; the host then waits for the device in logged steps only."""
    spike_factor: Annotated[float, Field(gt=1.0)] | None = None
    """Also skip a step whose loss or gradient norm exceeds this multiple of the median of the last 100 steps, such as
    10; unset skips none for that."""
    gc_interval: Positive = 50
    """Steps between Python garbage collections; automatic ones are disabled because a rank that collects stalls all
    others."""


class ParallelismSection(Section):
    """`[parallelism]`: number of ranks along each axis of the mesh; their product is the world size."""

    dp_replicate: Positive = 1
    """Replicas of the sharded model (HSDP); more replicas mean less traffic between nodes and more memory."""
    dp_shard: int = Field(-1, ge=-1)
    """Ranks that shard the weights (FSDP2); -1 uses all remaining ranks."""
    cp: Positive = 1
    """Context parallel: ranks that split the tokens of a clip; for clips too long for one GPU."""
    tp: Positive = 1
    """Tensor parallel: ranks that split each matrix; keep it within a node."""
    cpu_offload: bool = False
    """Keep sharded weights, gradients and optimizer state in host memory; slow, for models that fit in no other way."""
    stream_blocks: Annotated[int, Field(ge=0)] | Literal["auto"] = 0
    """LoRA: keep the frozen weights of the blocks in host memory, and this many blocks on the GPU at a time, copied
    ahead of use, for small GPUs; 0 keeps all blocks on the GPU, `auto` all, if they fit, or as many as do,
    or with `activation_checkpoint.mode = "budget"` three, and activations fill the memory. Losses are the same."""
    fsdp_static_slots: Literal["auto", "on", "off"] = "auto"
    """Gather the weights of blocks straight into two fixed buffers, without FSDP2's copies; losses are the same. `auto`
    does so if the job allows it and logs the reason otherwise; `on` refuses such a job."""
    fsdp_copy_engines: Literal["auto", "on", "off"] = "off"
    """With static slots: copy weights from the memory of the other GPUs of a host by copy engines, which take no
    multiprocessors from the computation, instead of NCCL's all-gathers; losses are the same. `auto` does so if the GPUs
    can, and logs the reason otherwise; `on` refuses a job whose GPUs cannot. Experimental: 3 to 9 % faster on two GPUs,
    not yet run on more, nor with a rank that stops."""
    fsdp_exchange_gradients: Literal["auto", "on", "off"] = "auto"
    """With static slots: send gradients in `training.dtype` and add them in float32, which is half the traffic of a
    float32 reduce-scatter; only the order of sums over three or more ranks differs. `auto` does it with copy
    engines."""


class ActivationCheckpointSection(Section):
    """`[activation_checkpoint]`: activations recomputed in the backward pass instead of stored."""

    mode: ActivationCheckpointMode = "none"
    """`full` stores only block inputs (about 33 % more compute); `selective` also stores attention and large matmul
    outputs; `every_k` recomputes one block in k; `budget` stores as much as `memory_gib` holds, first what is most
    expensive to recompute."""
    memory_gib: Annotated[float, Field(gt=0.0)] | Literal["auto"] = "auto"
    """budget: GiB of activations stored on each GPU; `auto` fills the GPU, by the estimate of `ltx-titan estimate`."""
    k: Positive | None = None
    """every_k: one block in k is recomputed."""
    offload: bool = False
    """full, every_k: keep the inputs of recomputed blocks in host memory; the copies overlap with compute."""


class CompileSection(Section):
    """`[compile]`: torch.compile, block by block."""

    enable: bool = False
    """Faster steps after a minute or two of compilation; float8 is slower than bfloat16 without it."""
    graphs: Literal["auto", "on", "off"] = "auto"
    """Replay forward and backward as one CUDA graph for each batch shape, so that the host's speed does not matter.
    `auto` does so if the job allows it and logs the reason otherwise; `on` refuses such a job."""


Float8Recipe = Literal["none", "native", "tensorwise", "rowwise"]


class Float8Section(Section):
    """`[float8]`: float8 matmuls in attention and FFN."""

    recipe: Float8Recipe = "none"
    """`native`: this package's layers, which quantize by rows, in fewer passes: the fastest. torchao's:
    `tensorwise` scales whole tensors, `rowwise` rows."""
    skip_blocks: Annotated[int, Field(ge=0)] = 0
    """So many of the first and of the last blocks stay in bfloat16."""
    all_gather: bool = False
    """tensorwise: FSDP2 all-gathers weights in float8, half the traffic of bfloat16, for a small cost per step."""


class KernelsSection(Section):
    """`[kernels]`: implementation of the fused operations."""

    backend: Literal["auto", "triton", "torch"] = "auto"
    """`auto` uses what measured fastest: `triton`, the fused kernels, on Hopper GPUs, and plain `torch` elsewhere."""


class KeepBestSection(Section):
    """`[checkpoint.keep_best]`: checkpoints that are kept for a metric, besides the newest ones.

    A checkpoint's value is the one that is logged at its step and stored in it, so that a resumed run compares it too.
    """

    metric: Annotated[str, Field(min_length=1)] | None = None
    """Name of the metric in metrics.jsonl, such as `held_out/total`, `quality/text_video` or `loss`; unset keeps none.
    A loss of training varies with the drawn sigmas, a validation's does not."""
    mode: Literal["min", "max"] = "min"
    """Whether lower or higher values are better."""
    count: Positive = 1
    """Number of best checkpoints that are kept; those among the `keep_last` newest count, too."""


class CheckpointSection(Section):
    """`[checkpoint]`: training state and exported weights."""

    enable: bool = True
    """False writes neither checkpoints nor exports: for speed measurements."""
    interval: Interval = 250
    """Steps between checkpoints (about 12 bytes per trained weight each); 0 saves only at the end."""
    keep_last: int = Field(2, ge=-1)
    """Number of newest checkpoints to keep; -1 keeps all. The newest is never deleted."""
    keep_best: KeepBestSection = KeepBestSection()
    """Checkpoints that are also kept because a metric was best."""
    background: bool = True
    """Write while training continues, from a copy in host memory as large as the checkpoint; false blocks training."""
    resume: bool = True
    """Resume from the newest complete checkpoint; false starts from step 0 and requires an empty folder."""
    export: bool = True
    """Write export/*.safetensors for inference tools at the end."""
    export_interval: Interval = 0
    """Steps between further exports during training, which waits for each; 0 exports at the end only."""
    export_dtype: ComputeDtype = "bfloat16"
    """Precision of the exported weights; float32 doubles the file size."""
    export_layout: ExportLayout = "with_connectors"
    """Contents of an exported transformer: `with_connectors` adds the base's text connectors, which ComfyUI and
    ltx-pipelines look for beside it, `complete` everything in the base's file, `transformer` nothing. LoRA files hold
    adapters only."""


class MetricsSection(Section):
    """`[metrics]`: logging."""

    interval: Positive = 1
    """Steps between log lines; each costs one device synchronization, besides that of `training.max_skipped_steps`."""
    tensorboard: bool = True
    """Also write tensorboard/."""
    wandb: Literal["off", "online", "offline"] = "off"
    """Also log to Weights & Biases (`pip install wandb`); `offline` writes to the dump folder, for `wandb sync`."""
    wandb_project: str = "ltx-titan"
    """Project of the run; the run is named after the dump folder."""
    wandb_entity: str | None = None
    """User or team of the run; unset means your default entity."""
    wandb_tags: Words = ()
    """Tags of the run."""
    wandb_clips: bool = True
    """Upload validation clips; false keeps them on this machine."""


class AlertsSection(Section):
    """`[alerts]`: messages about a run, as JSON with `event`, `text`, `step`, `run` and `time`.

    Sent in the background with a limit of 10 s; one that fails is logged, and training continues.
    """

    webhook_variable: str | None = None
    """Environment variable that holds a URL to POST to. Not the URL, which is a secret: a job is stored in checkpoints
    and shown by W&B."""
    command: Words = ()
    """Program and arguments that get the JSON on standard input; no shell."""
    events: Annotated[tuple[Literal["finished", "failed", "spiking", "stalled"], ...], Field(strict=False)] = (
        "finished",
        "failed",
        "spiking",
        "stalled",
    )
    """Events to report: the end, an error, a skipped step, a rank that the others have waited for for a minute. At most
    one of a kind every five minutes."""


class HubSection(Section):
    """`[hub]`: upload of the result to the Hugging Face Hub when `ltx-titan train` has finished.

    The token is read from the environment variable HF_TOKEN alone. A failed upload is reported and changes nothing
    about the run; `ltx-titan push` repeats it.
    """

    repo: RepoName | None = None
    """Repository to upload to, `OWNER/NAME`; it is created if it does not exist. Unset uploads nothing."""
    private: bool = True
    """Visibility of a repository that is created; an existing one keeps its own."""
    base_model: RepoName | None = None
    """Repository of the base model, `OWNER/NAME`, to which the model card links."""
    clips: bool = True
    """Upload the clips of the last validation and show them on the model card."""


class ProfilingSection(Section):
    """`[profiling]`: trace of a few steps."""

    trace_start: Positive | None = None
    """First traced step (from 1); unset disables tracing. Choose a step after compilation."""
    trace_steps: Positive = 3
    """Number of traced steps; each adds tens of MB to the file."""
    memory_snapshot: bool = False
    """Record every allocation; slows the run."""
