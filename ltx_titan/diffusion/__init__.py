from ltx_titan.diffusion.draws import StepDraws, StreamPlan, draw_caption_drops, draw_step
from ltx_titan.diffusion.flow import (
    add_noise,
    denoised_from_velocity,
    euler_ancestral_step,
    euler_step,
    keep_given,
    noise_given,
    velocity_from_denoised,
    velocity_target,
)
from ltx_titan.diffusion.schedule import linear_quadratic_schedule, sigma_schedule
from ltx_titan.diffusion.sigma import ShiftedLogitNormal, SigmaSampler, UniformSigma

__all__ = [
    "ShiftedLogitNormal",
    "SigmaSampler",
    "StepDraws",
    "StreamPlan",
    "UniformSigma",
    "add_noise",
    "denoised_from_velocity",
    "draw_caption_drops",
    "draw_step",
    "euler_ancestral_step",
    "euler_step",
    "keep_given",
    "linear_quadratic_schedule",
    "noise_given",
    "sigma_schedule",
    "velocity_from_denoised",
    "velocity_target",
]
