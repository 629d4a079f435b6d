from ltx_titan.config.errors import ConfigError, Problem
from ltx_titan.config.job import RELEASED_SHAPES, Degrees, JobConfig, check_world
from ltx_titan.config.load import build_job, dump_job, job_changes, load_job, plain_job, read_tables
from ltx_titan.config.lora import LoRASection
from ltx_titan.config.optimizer import OptimizerSection
from ltx_titan.config.sections import (
    ActivationCheckpointSection,
    CheckpointSection,
    CompileSection,
    DataSection,
    Float8Section,
    JobSection,
    KernelsSection,
    LossSection,
    MetricsSection,
    ModelSection,
    ParallelismSection,
    ProfilingSection,
    SchedulerSection,
    SigmaSection,
    SyntheticSection,
    TrainingSection,
)
from ltx_titan.config.streams import AudioSection, StrategyConfig, VideoSection
from ltx_titan.config.validation import SampleCondition, ValidationSample, ValidationSection

__all__ = [
    "RELEASED_SHAPES",
    "ActivationCheckpointSection",
    "AudioSection",
    "CheckpointSection",
    "CompileSection",
    "ConfigError",
    "DataSection",
    "Degrees",
    "Float8Section",
    "JobConfig",
    "JobSection",
    "KernelsSection",
    "LoRASection",
    "LossSection",
    "MetricsSection",
    "ModelSection",
    "OptimizerSection",
    "ParallelismSection",
    "Problem",
    "ProfilingSection",
    "SampleCondition",
    "SchedulerSection",
    "SigmaSection",
    "StrategyConfig",
    "SyntheticSection",
    "TrainingSection",
    "ValidationSample",
    "ValidationSection",
    "VideoSection",
    "build_job",
    "check_world",
    "dump_job",
    "job_changes",
    "load_job",
    "plain_job",
    "read_tables",
]
