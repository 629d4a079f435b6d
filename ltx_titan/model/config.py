"""Architecture config: every difference between LTX-2, 2.3 and 2.5, from the `transformer` object of the metadata.

One table of fields with the defaults of absent keys. The code branches on these fields, never on a version. Keys that
released files have but that we build in only one way are checked against that one value, so a checkpoint of another
architecture is refused by name instead of producing wrong numbers.
"""

from dataclasses import dataclass

# The one value of each key that the model code implements.
_FIXED_VALUES = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_type": "default",
    "causal_temporal_positioning": True,
    "connector_norm_output": True,
    "cross_attention_norm": True,
    "double_self_attention": False,
    "dropout": 0.0,
    "norm_elementwise_affine": False,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "positional_embedding_type": "rope",
    "qk_norm": "rms_norm",
    "share_ff": False,
    "standardization_norm": "rms_norm",
    "upcast_attention": False,
    "use_audio_video_cross_attention": True,
    "av_cross_ada_norm": True,
    "use_embeddings_connector": True,
    "use_linear_projection": False,
    "use_middle_indices_grid": True,
}

# Together these keys mark a checkpoint whose captions are projected before the connectors (2.3 and later).
_CAPTION_KEYS = {
    "caption_proj_before_connector": True,
    "caption_projection_first_linear": False,
    "caption_proj_input_norm": False,
    "caption_projection_second_linear": False,
}


@dataclass(frozen=True)
class StreamConfig:
    """Sizes of one stream: video or audio."""

    heads: int
    head_dim: int
    in_channels: int
    out_channels: int
    context_dim: int
    caption_dim: int | None
    max_positions: tuple[float, ...]
    ff_bias: bool

    @property
    def width(self) -> int:
        """Width of the residual stream."""
        return self.heads * self.head_dim

    @property
    def stored_context_dim(self) -> int:
        """Width of prepared text contexts: of the text encoder's connectors, before any projection in the model."""
        return self.caption_dim or self.context_dim


@dataclass(frozen=True)
class TransformerConfig:
    """Architecture of one checkpoint.

    Attributes:
        video, audio: sizes of the two streams.
        num_layers: number of blocks.
        norm_eps: epsilon of every norm.
        rope_theta, rope_interleaved, rope_double_precision: rotary embedding (see rope.py).
        timestep_scale: factor on sigma and timesteps before the sinusoid.
        cross_gate_timestep_scale: the same for the gates of the cross-modal attention.
        gated_attention: per-head output gates.
        text_modulation: timestep modulation of the text attention (nine-row tables instead of six).
        prompt_adaln: that modulation depends on sigma; otherwise its table is used alone.
        keyframe_embedding: learned embedding for tokens of a single pixel frame.
    """

    video: StreamConfig
    audio: StreamConfig
    num_layers: int
    norm_eps: float
    rope_theta: float
    rope_interleaved: bool
    rope_double_precision: bool
    timestep_scale: float
    cross_gate_timestep_scale: float
    gated_attention: bool
    text_modulation: bool
    prompt_adaln: bool
    keyframe_embedding: bool

    @property
    def table_rows(self) -> int:
        """Rows of a block's modulation table: shift, scale, gate of each modulated sub-layer."""
        return 9 if self.text_modulation else 6

    @classmethod
    def from_metadata(cls, config: dict) -> "TransformerConfig":
        """Reads the `transformer` object of checkpoint metadata.

        Raises:
            ValueError: a key has a value that we do not build, or the streams' head counts differ.
        """
        for key, required in _FIXED_VALUES.items():
            if key in config and config[key] != required:
                raise ValueError(
                    f"config.transformer.{key}: expected {required!r}, found {config[key]!r}. This is not an LTX-2 "
                    f"family transformer that ltx_titan supports; check model.checkpoint_path."
                )
        text_projected_outside = caption_projected_before_connector(config)
        caption_dim = None if text_projected_outside else config.get("caption_channels", 3840)
        video = StreamConfig(
            heads=config.get("num_attention_heads", 32),
            head_dim=config.get("attention_head_dim", 128),
            in_channels=config.get("in_channels", 128),
            out_channels=config.get("out_channels", 128),
            context_dim=config.get("cross_attention_dim", 4096),
            caption_dim=caption_dim,
            max_positions=tuple(config.get("positional_embedding_max_pos", (20, 2048, 2048))),
            ff_bias=config.get("ff_bias", True),
        )
        audio = StreamConfig(
            heads=config.get("audio_num_attention_heads", 32),
            head_dim=config.get("audio_attention_head_dim", 64),
            in_channels=config.get("audio_in_channels", 128),
            out_channels=config.get("audio_out_channels", 128),
            context_dim=config.get("audio_cross_attention_dim", 2048),
            caption_dim=caption_dim,
            max_positions=tuple(config.get("audio_positional_embedding_max_pos", (20,))),
            ff_bias=config.get("audio_ff_bias", True),
        )
        if video.heads != audio.heads:
            raise ValueError(
                f"config.transformer: num_attention_heads ({video.heads}) and audio_num_attention_heads "
                f"({audio.heads}) differ; cross-modal attention needs them equal."
            )
        rope_type = config.get("rope_type", "split")
        if rope_type not in ("split", "interleaved"):
            raise ValueError(f"config.transformer.rope_type: expected 'split' or 'interleaved', found {rope_type!r}.")
        return cls(
            video=video,
            audio=audio,
            num_layers=config.get("num_layers", 48),
            norm_eps=config.get("norm_eps", 1e-6),
            rope_theta=config.get("positional_embedding_theta", 10000.0),
            rope_interleaved=rope_type == "interleaved",
            # Only this exact string selects the float64 grid, as in the reference; any other value means float32.
            rope_double_precision=config.get("frequencies_precision") == "float64",
            timestep_scale=config.get("timestep_scale_multiplier", 1000),
            # Released files have 1000; 1 is what the reference assumes if the key is absent.
            cross_gate_timestep_scale=config.get("av_ca_timestep_scale_multiplier", 1),
            gated_attention=config.get("apply_gated_attention", False),
            text_modulation=config.get("cross_attention_adaln", False),
            # 2.3 files do not have this key and yet have the module.
            prompt_adaln=config.get("use_prompt_adaln_single", True),
            keyframe_embedding=config.get("use_keyframes_abs_pos_embedding", False),
        )


def caption_projected_before_connector(config: dict) -> bool:
    """Whether captions reach the transformer at its own width (2.3 and later) or at the text encoder's (LTX-2).

    Args:
        config: the `transformer` object of checkpoint metadata.

    Raises:
        ValueError: the four keys that decide this contradict each other.
    """
    present = {key: config[key] for key in _CAPTION_KEYS if config.get(key) is not None}
    if not present.get("caption_proj_before_connector", False) and not any(present.values()):
        return False
    if present != _CAPTION_KEYS:
        raise ValueError(
            f"config.transformer: the caption projection keys must be either all absent or exactly {_CAPTION_KEYS}; "
            f"found {present}."
        )
    return True
