"""Flow matching: the straight path from data to noise, and the steps back along it.

A point on the path is x = (1 - sigma) x0 + sigma eps; the network predicts its velocity eps - x0. Training uses the
first two functions, sampling the others. All arithmetic is float32; steps return the sample's dtype.
"""

import math

import torch
from torch import Tensor


def add_noise(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Noisy tokens (1 - sigma) clean + sigma noise, for tokens [B, S, C] and one sigma per sample [B], in float32."""
    sigma = sigma.float()[:, None, None]
    return (1 - sigma) * clean.float() + sigma * noise.float()


def velocity_target(clean: Tensor, noise: Tensor) -> Tensor:
    """Velocity target of the network [B, S, C]: noise - clean, in float32."""
    return noise.float() - clean.float()


def denoised_from_velocity(sample: Tensor, velocity: Tensor, timesteps: Tensor) -> Tensor:
    """Clean tokens: sample - velocity * timesteps. With timesteps [B, S, 1], clean tokens (0) are unchanged."""
    # Per-token timesteps rather than the sample's sigma: a clean token must come out as it went in, whatever the
    # network predicts for it.
    return (sample.float() - velocity.float() * timesteps.float()).to(sample.dtype)


def velocity_from_denoised(sample: Tensor, denoised: Tensor, sigma: float) -> Tensor:
    """Velocity (sample - denoised) / sigma of tokens [B, S, C], in the sample's dtype.

    Raises:
        ValueError: `sigma` is 0, where the velocity is not defined.
    """
    if sigma == 0:
        raise ValueError("sigma is 0, where a velocity is not defined; expected a positive sigma.")
    return ((sample.float() - denoised.float()) / sigma).to(sample.dtype)


def euler_step(sample: Tensor, denoised: Tensor, sigma: float, next_sigma: float) -> Tensor:
    """One Euler step of tokens [B, S, C] from `sigma` to `next_sigma`, with the denoised prediction at `sigma`.

    Raises:
        ValueError: `sigma` is 0.
    """
    # Through the denoised prediction and not the network's velocity, because guidance and restored tokens change the
    # former.
    velocity = velocity_from_denoised(sample.float(), denoised, sigma)
    return (sample.float() + velocity * (next_sigma - sigma)).to(sample.dtype)


def euler_ancestral_step(
    sample: Tensor,
    denoised: Tensor,
    sigma: float,
    next_sigma: float,
    noise: Tensor,
    eta: float = 1.0,
    noise_scale: float = 1.0,
) -> Tensor:
    """One Euler step that goes below `next_sigma` and returns to it with fresh noise.

    The step goes down to d = s' (1 + (s' / s - 1) eta), from s = `sigma` towards s' = `next_sigma`; then the signal is
    rescaled by (1 - s') / (1 - d) and noise with the missing variance s'^2 - d^2 ((1 - s') / (1 - d))^2 is added.

    Args:
        sample: tokens at `sigma` [B, S, C].
        denoised: prediction of the clean tokens [B, S, C].
        sigma: current sigma, above 0.
        next_sigma: sigma to reach; 0 returns the prediction.
        noise: fresh standard normal noise of the sample's shape.
        eta: 0 is a plain Euler step, 1 replaces as much noise as the step allows.
        noise_scale: factor on the fresh noise.
    """
    if next_sigma == 0:
        return denoised.to(sample.dtype)
    # eta moves the target of the deterministic part from s' down towards s'^2 / s.
    down = next_sigma * (1 + (next_sigma / sigma - 1) * eta)
    # The same Euler step, written as an interpolation between sample and prediction.
    lower = down / sigma * sample.float() + (1 - down / sigma) * denoised.float()
    rescale = (1 - next_sigma) / (1 - down)
    # max: rounding can make a difference of nearly equal variances negative.
    renoise = math.sqrt(max(next_sigma**2 - (down * rescale) ** 2, 0.0))
    return (rescale * lower + noise_scale * renoise * noise.float()).to(sample.dtype)


def initial_latent(latent: Tensor, clean: Tensor, noise: Tensor, denoise_mask: Tensor, noise_scale: float) -> Tensor:
    """Initial latent of a sampling run: noise where the mask is 1, clean content where it is 0.

    Args:
        latent: starting tokens [B, S, C], zeros or an earlier result to refine.
        clean: content of conditioned tokens [B, S, C].
        noise: standard normal noise [B, S, C].
        denoise_mask: 1 for a generated token, 0 for a clean one [B, S, 1].
        noise_scale: fraction of noise in generated tokens: the first sigma of the schedule.
    """
    noisy = torch.lerp(latent.float(), noise.float(), noise_scale)
    return torch.lerp(clean.float(), noisy, denoise_mask.float()).to(latent.dtype)


def restore_clean(denoised: Tensor, clean: Tensor, denoise_mask: Tensor) -> Tensor:
    """Restores clean tokens in a prediction [B, S, C]: denoised * mask + clean * (1 - mask), with a mask [B, S, 1]."""
    mask = denoise_mask.float()
    return (denoised.float() * mask + clean.float() * (1 - mask)).to(denoised.dtype)
