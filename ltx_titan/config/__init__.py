from ltx_titan.config.errors import ConfigError, Problem
from ltx_titan.config.job import RELEASED_SHAPES, Degrees, JobConfig, check_world
from ltx_titan.config.load import build_job, dump_job, job_changes, load_job, plain_job, read_tables
from ltx_titan.config.lora import LoRASettings
from ltx_titan.config.optimizer import OptimizerSettings
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
from ltx_titan.config.streams import AudioBlock, StrategyConfig, VideoBlock
from ltx_titan.config.validation import SampleCondition, ValidationSample, ValidationSection

__all__ = [
    "RELEASED_SHAPES",
    "ActivationCheckpointSection",
    "AudioBlock",
    "CheckpointSection",
    "CompileSection",
    "ConfigError",
    "DataSection",
    "Degrees",
    "Float8Section",
    "JobConfig",
    "JobSection",
    "KernelsSection",
    "LoRASettings",
    "LossSection",
    "MetricsSection",
    "ModelSection",
    "OptimizerSettings",
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
    "VideoBlock",
    "build_job",
    "check_world",
    "dump_job",
    "job_changes",
    "load_job",
    "plain_job",
    "read_tables",
]
