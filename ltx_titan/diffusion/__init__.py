from ltx_titan.diffusion.draws import (
    ConditionPlan,
    StepDraws,
    StreamDraws,
    StreamPlan,
    draw_caption_drops,
    draw_step,
    sigma_sampler,
)
from ltx_titan.diffusion.flow import (
    add_noise,
    denoised_from_velocity,
    euler_ancestral_step,
    euler_step,
    initial_latent,
    restore_clean,
    velocity_from_denoised,
    velocity_target,
)
from ltx_titan.diffusion.guidance import Guidance, apg_delta, cfg_delta, cfg_star_delta, guide, stg_delta
from ltx_titan.diffusion.objective import MEAN_SQUARED_ERROR, Objective
from ltx_titan.diffusion.sampler import PASSES, SampledStream, StepReport, count_forwards, needed_passes, sample
from ltx_titan.diffusion.schedule import beta_schedule, distilled_schedule, linear_quadratic_schedule, sigma_schedule
from ltx_titan.diffusion.sigma import ShiftedLogitNormal, SigmaSampler, UniformSigma

__all__ = [
    "MEAN_SQUARED_ERROR",
    "PASSES",
    "ConditionPlan",
    "Guidance",
    "Objective",
    "SampledStream",
    "ShiftedLogitNormal",
    "SigmaSampler",
    "StepDraws",
    "StepReport",
    "StreamDraws",
    "StreamPlan",
    "UniformSigma",
    "add_noise",
    "apg_delta",
    "beta_schedule",
    "cfg_delta",
    "cfg_star_delta",
    "count_forwards",
    "denoised_from_velocity",
    "distilled_schedule",
    "draw_caption_drops",
    "draw_step",
    "euler_ancestral_step",
    "euler_step",
    "guide",
    "initial_latent",
    "linear_quadratic_schedule",
    "needed_passes",
    "restore_clean",
    "sample",
    "sigma_sampler",
    "sigma_schedule",
    "stg_delta",
    "velocity_from_denoised",
    "velocity_target",
]
