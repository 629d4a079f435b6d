"""Training state: distributed checkpoints that resume on any mesh."""

from ltx_titan.checkpoint.background import BackgroundSaver
from ltx_titan.checkpoint.folders import latest_complete, read_trainer_state, step_folder
from ltx_titan.checkpoint.state import TrainingState, load_state, save_everything, save_state

__all__ = [
    "BackgroundSaver",
    "TrainingState",
    "latest_complete",
    "load_state",
    "read_trainer_state",
    "save_everything",
    "save_state",
    "step_folder",
]
