"""The whole job: one section per table of the file. Rules between the fields are in `rules.py`."""

from ltx_titan.config.base import Section
from ltx_titan.config.optimization import (
    LoRASection,
    LossSection,
    OptimizerSection,
    PreservationSection,
    SchedulerSection,
    SigmaSection,
)
from ltx_titan.config.sections import (
    ActivationCheckpointSection,
    AlertsSection,
    CheckpointSection,
    CompileSection,
    DataSection,
    Float8Section,
    HubSection,
    JobSection,
    KernelsSection,
    MetricsSection,
    ModelSection,
    ParallelismSection,
    ProfilingSection,
    TrainingSection,
)
from ltx_titan.config.streams import AudioSection, VideoSection
from ltx_titan.config.validation import ValidationSection

RELEASED_SHAPES = ("ltx-2-19b", "ltx-2.3-22b", "ltx-2.5-22b")
"""Values of `model.shape` that need no file."""


class JobConfig(Section):
    """A parsed job: one attribute per section of the file."""

    job: JobSection = JobSection()
    """Output folder and description."""
    model: ModelSection = ModelSection()
    """Transformer weights and training mode."""
    data: DataSection = DataSection()
    """Source of the samples."""
    video: VideoSection | None = None
    """Video stream; without it the transformer gets no video."""
    audio: AudioSection | None = None
    """Audio stream; without it the transformer gets no audio."""
    sigma: SigmaSection = SigmaSection()
    """Sigma distribution."""
    training: TrainingSection = TrainingSection()
    """Length, batch, precision."""
    parallelism: ParallelismSection = ParallelismSection()
    """Device mesh."""
    activation_checkpoint: ActivationCheckpointSection = ActivationCheckpointSection()
    """Recomputation of activations."""
    compile: CompileSection = CompileSection()
    """torch.compile."""
    float8: Float8Section = Float8Section()
    """float8 matmuls."""
    kernels: KernelsSection = KernelsSection()
    """Fused operations."""
    loss: LossSection = LossSection()
    """Error of the velocity and its weights."""
    preservation: PreservationSection = PreservationSection()
    """LoRA: closeness to the base."""
    optimizer: OptimizerSection = OptimizerSection()
    """Update rule."""
    scheduler: SchedulerSection = SchedulerSection()
    """Learning-rate schedule."""
    checkpoint: CheckpointSection = CheckpointSection()
    """Training state and exports."""
    validation: ValidationSection = ValidationSection()
    """Sampled clips and held-out loss."""
    lora: LoRASection = LoRASection()
    """Adapters."""
    metrics: MetricsSection = MetricsSection()
    """Logging."""
    alerts: AlertsSection = AlertsSection()
    """Messages when a run ends or stalls."""
    hub: HubSection = HubSection()
    """Upload of the result."""
    profiling: ProfilingSection = ProfilingSection()
    """Traces."""
