"""Training state: distributed checkpoints that resume on any mesh."""

from ltx_titan.checkpoint.background import BackgroundSaver
from ltx_titan.checkpoint.finite import first_not_finite
from ltx_titan.checkpoint.folders import (
    METRICS_KEY,
    KeepBest,
    best_steps,
    complete_folders,
    folders_with_states,
    latest_complete,
    read_trainer_state,
    remove_leftovers,
    saved_steps,
    set_aside,
    step_folder,
)
from ltx_titan.checkpoint.state import (
    DamagedError,
    SavedTensors,
    SaveError,
    TrainingState,
    load_state,
    num_bytes,
    save_everything,
    save_state,
    state_tensors,
)

__all__ = [
    "METRICS_KEY",
    "BackgroundSaver",
    "DamagedError",
    "KeepBest",
    "SaveError",
    "SavedTensors",
    "TrainingState",
    "best_steps",
    "complete_folders",
    "first_not_finite",
    "folders_with_states",
    "latest_complete",
    "load_state",
    "num_bytes",
    "read_trainer_state",
    "remove_leftovers",
    "save_everything",
    "save_state",
    "saved_steps",
    "set_aside",
    "state_tensors",
    "step_folder",
]
