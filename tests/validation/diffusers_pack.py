"""The nano pack in diffusers' classes.

Transformer names come from diffusers' own conversion of official LoRA keys, which it applies to whole weights as well;
a strict load shows that every parameter gets a value.
"""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LTX2VideoTransformer3DModel
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_ltx2_lora_to_diffusers
from diffusers.pipelines.ltx2 import LTX2Pipeline
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from safetensors.torch import load_file
from torch import nn

from ltx_titan.codecs import AudioCodec, VideoCodec

_PREFIX = "model.diffusion_model."
# Text projection and connectors, which diffusers converts by a script outside the package; by whole component.
_TEXT = {
    "video_embeddings_connector": "video_connector",
    "audio_embeddings_connector": "audio_connector",
    "transformer_1d_blocks": "transformer_blocks",
    "video_aggregate_embed": "video_text_proj_in",
    "audio_aggregate_embed": "audio_text_proj_in",
    "q_norm": "norm_q",
    "k_norm": "norm_k",
}


def diffusers_pipeline(path, config: dict, video_codec: VideoCodec, audio_codec: AudioCodec) -> LTX2Pipeline:
    """Text to video and audio, without a text encoder, in float32."""
    tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
    return LTX2Pipeline(
        # The test passes sigmas; the scheduler must not shift them.
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=video_codec.vae,
        audio_vae=audio_codec.vae,
        text_encoder=None,
        tokenizer=None,
        connectors=_connectors(config["transformer"], tensors),
        transformer=_transformer(config["transformer"], tensors),
        vocoder=None,
    )


def _transformer(config: dict, tensors: dict) -> LTX2VideoTransformer3DModel:
    heads, audio_heads = config["num_attention_heads"], config["audio_num_attention_heads"]
    model = LTX2VideoTransformer3DModel(
        num_layers=config["num_layers"],
        num_attention_heads=heads,
        attention_head_dim=config["attention_head_dim"],
        cross_attention_dim=config["cross_attention_dim"],
        audio_num_attention_heads=audio_heads,
        audio_attention_head_dim=config["audio_attention_head_dim"],
        audio_cross_attention_dim=config["audio_cross_attention_dim"],
        caption_channels=config["caption_channels"],
        gated_attn=True,
        cross_attn_mod=True,
        audio_gated_attn=True,
        audio_cross_attn_mod=True,
        use_prompt_embeddings=False,
        perturbed_attn=True,
        rope_type="split",
    )
    names = [name for name in tensors if name.startswith(_PREFIX) and "_connector." not in name]
    official = {f"diffusion_model.{name.removeprefix(_PREFIX)}": tensors[name] for name in names}
    converted = _convert_non_diffusers_ltx2_lora_to_diffusers(official)
    return _filled(model, {name.removeprefix("transformer."): tensor for name, tensor in converted.items()})


def _connectors(config: dict, tensors: dict) -> LTX2TextConnectors:
    states = tensors["text_embedding_projection.video_aggregate_embed.weight"].shape[1]
    model = LTX2TextConnectors(
        caption_channels=config["caption_channels"],
        text_proj_in_factor=states // config["caption_channels"],
        video_connector_num_attention_heads=config["connector_num_attention_heads"],
        video_connector_attention_head_dim=config["connector_attention_head_dim"],
        video_connector_num_layers=config["connector_num_layers"],
        video_gated_attn=True,
        audio_connector_num_attention_heads=config["audio_connector_num_attention_heads"],
        audio_connector_attention_head_dim=config["audio_connector_attention_head_dim"],
        audio_connector_num_layers=config["audio_connector_num_layers"],
        audio_gated_attn=True,
        rope_type="split",
        per_modality_projections=True,
        video_hidden_dim=config["cross_attention_dim"],
        audio_hidden_dim=config["audio_cross_attention_dim"],
        proj_bias=True,
    )
    weights = {}
    for name, tensor in tensors.items():
        if name.startswith(_PREFIX) and "_connector." in name:
            weights[_renamed(name.removeprefix(_PREFIX))] = tensor
        elif name.startswith("text_embedding_projection."):
            weights[_renamed(name.removeprefix("text_embedding_projection."))] = tensor
    return _filled(model, weights)


def _renamed(name: str) -> str:
    return ".".join(_TEXT.get(part, part) for part in name.split("."))


def _filled(model: nn.Module, weights: dict[str, torch.Tensor]) -> nn.Module:
    model.load_state_dict(weights, strict=True)
    return model.eval()
