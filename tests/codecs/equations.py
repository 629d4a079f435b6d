"""The codecs' published equations in plain torch, on the tensors of a file under their names in the file.

Independent of diffusers and of our renaming: what agrees with these has every weight in its place, also where two have
one shape.
"""

import torch
import torch.nn.functional as F


def pixel_norm(x, eps):
    return x / (x.square().mean(1, keepdim=True) + eps).sqrt()


def _space_to_depth(x, p):
    b, c, d, h, w = x.shape
    x = x.view(b, c, d // p[0], p[0], h // p[1], p[1], w // p[2], p[2])
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)


def _depth_to_space(x, p):
    b, c, d, h, w = x.shape
    x = x.view(b, -1, *p, d, h, w).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return x.reshape(b, -1, d * p[0], h * p[1], w * p[2])


def _strides(kind):
    return {"space": (1, 2, 2), "time": (2, 1, 1), "all": (2, 2, 2)}[kind.split("_")[1]]


class VideoVae:
    """Section 5.1; `w` without the prefix `vae.`, `section` as in the metadata."""

    def __init__(self, w, section, decoder_padding):
        self.w, self.section, self.decoder_padding = w, section, decoder_padding

    def _conv(self, x, name, causal, padding):
        first, last = x[:, :, :1], x[:, :, -1:]
        x = torch.cat([first, first, x] if causal else [first, x, last], 2)
        x = F.pad(x, (1, 1, 1, 1, 0, 0), mode="constant" if padding == "zeros" else padding)
        return F.conv3d(x, self.w[f"{name}.conv.weight"], self.w[f"{name}.conv.bias"])

    def _res(self, x, name, layers, causal, padding):
        for layer in range(layers):
            y = x
            for conv in ("conv1", "conv2"):
                y = self._conv(F.silu(pixel_norm(y, 1e-8)), f"{name}.res_blocks.{layer}.{conv}", causal, padding)
            x = x + y
        return x

    def _statistics(self):
        return (self.w[f"per_channel_statistics.{key}-of-means"].view(-1, 1, 1, 1) for key in ("mean", "std"))

    def encode(self, x):
        b, c, f, h, w = x.shape
        x = x.view(b, c, f, h // 4, 4, w // 4, 4).permute(0, 1, 6, 4, 2, 3, 5).reshape(b, -1, f, h // 4, w // 4)
        x = self._conv(x, "encoder.conv_in", True, "zeros")
        for index, (kind, options) in enumerate(self.section["encoder_blocks"]):
            name = f"encoder.down_blocks.{index}"
            if kind == "res_x":
                x = self._res(x, name, options["num_layers"], True, "zeros")
                continue
            p, out = _strides(kind), x.shape[1] * options["multiplier"]
            if p[0] == 2:
                x = torch.cat([x[:, :, :1], x], 2)
            averaged = _space_to_depth(x, p).unflatten(1, (out, -1)).mean(2)
            x = _space_to_depth(self._conv(x, f"{name}.conv", True, "zeros"), p) + averaged
        x = self._conv(F.silu(pixel_norm(x, 1e-8)), "encoder.conv_out", True, "zeros")[:, :128]
        mean, std = self._statistics()
        return (x - mean) / std

    def decode(self, z):
        mean, std = self._statistics()
        x = self._conv(z * std + mean, "decoder.conv_in", False, self.decoder_padding)
        for index, (kind, options) in enumerate(reversed(self.section["decoder_blocks"])):
            name = f"decoder.up_blocks.{index}"
            if kind == "res_x":
                x = self._res(x, name, options["num_layers"], False, self.decoder_padding)
                continue
            p = _strides(kind)
            y = _depth_to_space(self._conv(x, f"{name}.conv", False, self.decoder_padding), p)
            if options.get("residual"):
                y = y + _depth_to_space(x, p).repeat(1, p[0] * p[1] * p[2] // options["multiplier"], 1, 1, 1)
            x = y[:, :, 1:] if p[0] == 2 else y
        x = self._conv(F.silu(pixel_norm(x, 1e-8)), "decoder.conv_out", False, self.decoder_padding)
        b, _, f, h, w = x.shape
        return x.view(b, 3, 4, 4, f, h, w).permute(0, 1, 4, 5, 3, 6, 2).reshape(b, 3, f, 4 * h, 4 * w)


class AudioVae:
    """Section 5.3, from and to a log-mel spectrogram; `w` without the prefix `audio_vae.`."""

    def __init__(self, w, levels, blocks):
        self.w, self.levels, self.blocks = w, levels, blocks

    def _conv(self, x, name, padding=(1, 1, 2, 0), stride=1):
        return F.conv2d(F.pad(x, padding), self.w[f"{name}.weight"], self.w[f"{name}.bias"], stride)

    def _block(self, x, name):
        y = x
        for conv in ("conv1", "conv2"):
            y = self._conv(F.silu(pixel_norm(y, 1e-6)), f"{name}.{conv}.conv")
        if f"{name}.nin_shortcut.conv.weight" in self.w:
            x = self._conv(x, f"{name}.nin_shortcut.conv", (0, 0, 0, 0))
        return x + y

    def _statistics(self, z):
        return (
            self.w[f"per_channel_statistics.{key}-of-means"].view(z.shape[1], 1, z.shape[3]) for key in ("mean", "std")
        )

    def encode(self, x):
        x = self._conv(x, "encoder.conv_in.conv")
        for level in range(self.levels):
            for index in range(self.blocks):
                x = self._block(x, f"encoder.down.{level}.block.{index}")
            if level < self.levels - 1:
                x = self._conv(x, f"encoder.down.{level}.downsample.conv", (0, 1, 2, 0), 2)
        x = self._block(self._block(x, "encoder.mid.block_1"), "encoder.mid.block_2")
        z = self._conv(F.silu(pixel_norm(x, 1e-6)), "encoder.conv_out.conv")[:, :8]
        mean, std = self._statistics(z)
        return (z - mean) / std

    def decode(self, z):
        mean, std = self._statistics(z)
        x = self._conv(z * std + mean, "decoder.conv_in.conv")
        x = self._block(self._block(x, "decoder.mid.block_1"), "decoder.mid.block_2")
        for level in reversed(range(self.levels)):
            for index in range(self.blocks + 1):
                x = self._block(x, f"decoder.up.{level}.block.{index}")
            if level:
                x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
                x = self._conv(x, f"decoder.up.{level}.upsample.conv.conv")[:, :, 1:]
        return self._conv(F.silu(pixel_norm(x, 1e-6)), "decoder.conv_out.conv")


class Vocoder:
    """Section 5.4, both forms; `w` without the first `vocoder.`, `section` as in the metadata."""

    def __init__(self, w, section):
        self.w, self.section = w, section

    def __call__(self, mel):
        x = mel.transpose(2, 3).flatten(1, 2)
        if "bwe" not in self.section:
            return self._generator(x, "", self.section, antialiased=False).tanh()
        low = self._generator(x, "vocoder.", self.section["vocoder"], antialiased=True).clamp(-1, 1)
        bwe = self.section["bwe"]
        hop, length = bwe["hop_length"], low.shape[-1]
        padded = F.pad(low, (0, -length % hop))
        frames = F.pad(padded, (bwe["n_fft"] - hop, 0)).flatten(0, 1)[:, None]
        spectrum = F.conv1d(frames, self.w["mel_stft.stft_fn.forward_basis"], stride=hop)
        real, imaginary = spectrum.chunk(2, 1)
        mels = self.w["mel_stft.mel_basis"] @ (real.square() + imaginary.square()).sqrt()
        mels = mels.clamp(min=1e-5).log().view(low.shape[0], -1, mels.shape[-1])
        residual = self._generator(mels, "bwe_generator.", bwe, antialiased=True)
        return (residual + self._tripled(padded)).clamp(-1, 1)[..., : 3 * length]

    def _tripled(self, x):
        t = (torch.arange(43) / 3 - 7) * 0.99
        taps = torch.sinc(t) * torch.cos(torch.pi * t.clamp(-6, 6) / 12) ** 2 * 0.99 / 3
        x = F.pad(x.flatten(0, 1)[:, None], (7, 7), mode="replicate")
        y = 3 * F.conv_transpose1d(x, taps[None, None], stride=3)
        return y[..., 42:-40].view(1, 2, -1)

    def _generator(self, x, prefix, section, antialiased):
        w = {name.removeprefix(prefix): tensor for name, tensor in self.w.items() if name.startswith(prefix)}
        x = F.conv1d(x, w["conv_pre.weight"], w["conv_pre.bias"], padding=3)
        rates, kernels = section["upsample_rates"], section["upsample_kernel_sizes"]
        sizes, dilations = section["resblock_kernel_sizes"], section["resblock_dilation_sizes"]
        for stage, (rate, kernel) in enumerate(zip(rates, kernels, strict=True)):
            x = x if antialiased else F.leaky_relu(x, 0.1)
            name = f"ups.{stage}"
            x = F.conv_transpose1d(x, w[f"{name}.weight"], w[f"{name}.bias"], rate, (kernel - rate) // 2)
            parts = []
            for place, size in enumerate(sizes):
                y, block = x, f"resblocks.{len(sizes) * stage + place}"
                for index, dilation in enumerate(dilations[place]):
                    z = y
                    for half, spread in ((1, dilation), (2, 1)):
                        act = f"{block}.acts{half}.{index}."
                        z = _smooth_snake(z, w, act) if antialiased else F.leaky_relu(z, 0.1)
                        conv = f"{block}.convs{half}.{index}"
                        z = F.conv1d(
                            z,
                            w[f"{conv}.weight"],
                            w[f"{conv}.bias"],
                            padding=spread * (size - 1) // 2,
                            dilation=spread,
                        )
                    y = y + z
                parts.append(y)
            x = sum(parts) / len(parts)
        x = _smooth_snake(x, w, "act_post.") if antialiased else F.leaky_relu(x, 0.01)
        return F.conv1d(x, w["conv_post.weight"], w.get("conv_post.bias"), padding=3)


def _smooth_snake(x, w, name):
    channels = x.shape[1]

    def taps(kind):
        return w[f"{name}{kind}"].expand(channels, 1, -1)

    up = F.conv_transpose1d(F.pad(x, (5, 5), mode="replicate"), taps("upsample.filter"), stride=2, groups=channels)
    x = (2 * up)[..., 15:-15]
    alpha, beta = (w[f"{name}act.{key}"].exp()[:, None] for key in ("alpha", "beta"))
    x = x + (alpha * x).sin().square() / (beta + 1e-9)
    return F.conv1d(F.pad(x, (5, 6), mode="replicate"), taps("downsample.lowpass.filter"), stride=2, groups=channels)
