"""Captions to text features: Gemma through transformers, then the projection of the checkpoint.

LTX-2 and LTX-2.3 use Gemma 3, a folder; LTX-2.5 a fine-tuned Gemma 4, one file that also contains the projection. The
checkpoint's metadata specifies which; it cannot use features of another model.

Gemma runs as a bare language model. The hidden states of all its layers are used, L + 1 of them: the scaled token
embeddings, the outputs of all layers but the last, and the output of the last after the final norm. The checkpoint's
feature extractor projects them to the features that datasets store, and the connectors turn these into a context during
training.

Captions are tokenized without a template: stripped, with a leading BOS and no EOS, truncated to 1024 tokens or the
tokenizer's own limit if that is less, padded on the left. Padding takes no compute: a real token's states do not depend
on it, so Gemma runs on the longest caption of the batch, and the padded positions are zeros, which the feature
extractor ignores.

The encoder can be quantized, for GPUs with less than 24 GB. Features then differ slightly, least with int8, most with
int4: encode a whole dataset with one precision.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    Gemma3Model,
    Gemma3TextModel,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ltx_titan.codecs.packed_gemma import load_packed_model, load_packed_tokenizer, open_packed_gemma
from ltx_titan.model import FeatureExtractor
from ltx_titan.weights import TEXT_PROJECTION, CheckpointMetadata, QuantizedLinear, load_module, read_metadata

MAX_TOKENS = 1024
TextPrecision = Literal["full", "int8", "float8", "int4"]


@dataclass(frozen=True)
class TextEncoder:
    """A loaded Gemma language model with its tokenizer.

    Attributes:
        model: the language model, without vision tower or head.
        tokenizer: its tokenizer.
        max_tokens: captions are truncated and padded to this length; see `most_tokens`.
        version: name of the fine-tuned Gemma 4; None for Gemma 3, and if the file does not specify it.
        projection_path: the packed file that also has the text projection; None if the checkpoint has it.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_tokens: int = MAX_TOKENS
    version: str | None = None
    projection_path: Path | None = None

    @property
    def dimensions(self) -> dict[str, int]:
        """Sizes that a feature extractor is built from: `hidden_size` and `num_hidden_layers`."""
        config = self.model.config
        return {"hidden_size": config.hidden_size, "num_hidden_layers": config.num_hidden_layers}

    def tokenize(self, caption: str) -> list[int]:
        """Returns the token ids of one caption, BOS first, at most `max_tokens`, not padded."""
        ids = self.tokenizer(caption.strip(), truncation=True, max_length=self.max_tokens)["input_ids"]
        # Gemma 3's tokenizer adds a BOS, Gemma 4's does not.
        bos = self.tokenizer.bos_token_id
        if bos is not None and ids[:1] != [bos]:
            ids = [bos, *ids]
        return ids[: self.max_tokens]

    @torch.no_grad()
    def encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Runs Gemma on captions.

        Returns:
            Hidden states [B, S, D, L] of S = `max_tokens` positions, width D and L layers, in the model's dtype, zero
            at padding; and the mask [B, S], int64, 1 for real tokens, which are at the end.
        """
        ids = [self.tokenize(caption) for caption in captions]
        longest = max(len(row) for row in ids)
        # Any id can pad: its position is masked and its states are overwritten.
        padded = torch.tensor([[row[0]] * (longest - len(row)) + row for row in ids])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids])
        padded, mask = padded.to(self.model.device), mask.to(self.model.device)
        # No cache: captions are encoded, never continued.
        output = self.model(input_ids=padded, attention_mask=mask, output_hidden_states=True, use_cache=False)
        # L tensors [B, S, D] -> [B, S, D, L]: the feature extractor flattens channel-major, layer innermost.
        states = torch.stack(output.hidden_states, dim=-1)
        # Left padding: zeros in front of the shorter captions, then of all up to max_tokens.
        states = states.masked_fill(mask[:, :, None, None] == 0, 0)
        before = self.max_tokens - longest
        hidden_states = torch.nn.functional.pad(states, (0, 0, 0, 0, before, 0))
        return hidden_states, torch.nn.functional.pad(mask, (before, 0))


def most_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Length of text features: 1024, or `model_max_length` if the tokenizer states a smaller one, as a miniature does.

    The connectors need a multiple of their registers.
    """
    return min(MAX_TOKENS, tokenizer.model_max_length)


def text_encoder_config(path: str | Path) -> PretrainedConfig:
    """Reads and checks the configuration of a text encoder, no weights.

    Args:
        path: a folder of Gemma 3, or the packed file of LTX-2.5.

    Raises:
        ValueError: `path` is neither.
    """
    path = Path(path)
    if path.is_file():
        return open_packed_gemma(path).config
    if not (path / "config.json").is_file():
        raise ValueError(
            f"{path}: no config.json found; expected a local folder of Gemma 3 as transformers saves it (the published "
            "one is google/gemma-3-12b-it-qat-q4_0-unquantized), or the packed text encoder file of LTX-2.5"
        )
    try:
        # Explicit, because transformers otherwise asks on the terminal whether to run the folder's own code.
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a config.json of wrong types makes its classes raise
        raise ValueError(
            f"{path / 'config.json'}: expected the configuration of Gemma 3, found "
            f"{' '.join(str(error).split())[:300]}; download it again"
        ) from error
    if config.model_type not in ("gemma3", "gemma3_text"):
        raise ValueError(
            f"{path}: model_type is {config.model_type!r}, expected 'gemma3' or 'gemma3_text': LTX-2 and LTX-2.3 "
            "were trained with Gemma 3, LTX-2.5 with a fine-tuned Gemma 4 in one packed file; they cannot use features "
            "of another model"
        )
    return config


def load_text_encoder(
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.bfloat16
) -> TextEncoder:
    """Loads a text encoder from local files; nothing is downloaded.

    Args:
        path: a folder of Gemma 3 in the transformers layout (`config.json`, weights and tokenizer files; of the whole
            model or of its language model), or the packed text encoder file of LTX-2.5.
        device: destination; on `meta` a packed file is checked and not read.
        dtype: of its weights.

    Raises:
        ValueError: `path` is neither, or its weights do not fit its configuration.
    """
    path = Path(path)
    if path.is_file():
        packed = open_packed_gemma(path)
        model = load_packed_model(packed, device, dtype).requires_grad_(False).eval()
        tokenizer = load_packed_tokenizer(packed)
        return TextEncoder(model, tokenizer, most_tokens(tokenizer), packed.version, path)
    config = text_encoder_config(path)
    if config.model_type == "gemma3":
        # The vision tower of a multimodal folder is loaded with it and dropped.
        model = _from_folder(Gemma3Model, path, dtype=dtype).language_model
    else:
        model = _from_folder(Gemma3TextModel, path, dtype=dtype)
    tokenizer = _from_folder(AutoTokenizer, path)
    return TextEncoder(model.requires_grad_(False).eval().to(device), tokenizer, most_tokens(tokenizer))


def _from_folder(loader: Any, path: Path, **options: Any) -> Any:
    """Loads a part of a text encoder; files that are missing or damaged are a ValueError, whatever the library raises.

    `.bin` weights are pickles: transformers reads them with `weights_only`, which refuses code.
    """
    try:
        return loader.from_pretrained(path, local_files_only=True, trust_remote_code=False, **options)
    except torch.OutOfMemoryError:
        raise
    except (
        OSError,
        ValueError,
        RuntimeError,
        KeyError,
        TypeError,
        AttributeError,
        SafetensorError,
        UnpicklingError,
    ) as error:
        raise ValueError(
            f"{path}: expected a complete text encoder, found {type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}; download it again"
        ) from error


def check_text_encoder(checkpoint: CheckpointMetadata, text_encoder: TextEncoder) -> None:
    """Checks that a text encoder is the one that a checkpoint was trained with.

    Checkpoints of LTX-2.4 and later specify it (`gemma_source_checkpoint`); for earlier ones it is Gemma 3.

    Raises:
        ValueError: it is another one.
    """
    kind, version = text_encoder.model.config.model_type, text_encoder.version
    source = checkpoint.raw.get("gemma_source_checkpoint")
    if source is not None:
        wanted = _gemma_version(source)
        # An unknown version is refused, too: a stock Gemma 4 has the same shapes and would be used without an error.
        if wanted is None or wanted != version:
            raise ValueError(
                f"{checkpoint.path}: was trained with the text encoder {wanted or source!r}, found "
                f"{version or f'a {kind} without a version'!r}; use the packed file of the checkpoint's release, not a "
                "stock Gemma 4"
            )
        return
    if _version_numbers(checkpoint.model_version) >= (2, 4):
        raise ValueError(
            f"{checkpoint.path}: has version {checkpoint.model_version} and has no 'gemma_source_checkpoint' in its "
            "metadata, which specifies the text encoder since 2.4; use the official file"
        )
    if not kind.startswith("gemma3"):
        raise ValueError(
            f"{checkpoint.path}: was trained with Gemma 3 (version {checkpoint.model_version}), found a {kind}; use a "
            "folder of Gemma 3"
        )


def _gemma_version(source: str) -> str | None:
    try:
        return json.loads(source).get("gemma_version")
    except (ValueError, AttributeError):
        return None


def _version_numbers(version: str | None) -> tuple[int, ...]:
    """Parses the leading numbers of a version: `2.3.rc1` -> (2, 3); empty without a version."""
    numbers = []
    for part in (version or "").replace("-", ".").split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def text_feature_widths(config: dict[str, Any], encoder: PretrainedConfig) -> tuple[int, int]:
    """Returns the widths of the text features of the video and of the audio stream.

    Args:
        config: the metadata object `config` of a checkpoint, with the key `transformer`.
        encoder: from `text_encoder_config`.
    """
    language = getattr(encoder, "text_config", encoder)
    dimensions = {"hidden_size": language.hidden_size, "num_hidden_layers": language.num_hidden_layers}
    with torch.device("meta"):
        extractor = FeatureExtractor.from_config(config, dimensions)
    if not extractor.per_stream:
        return language.hidden_size, language.hidden_size
    return extractor.video_aggregate_embed.out_features, extractor.audio_aggregate_embed.out_features


def load_feature_extractor(
    path: str | Path,
    text_encoder: TextEncoder,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> FeatureExtractor:
    """Loads the projection `text_embedding_projection.*` of a checkpoint.

    Args:
        path: the file with the transformer.
        text_encoder: the encoder whose states are projected. A packed one also has the projection's weights.
        device: destination; `meta` checks the files and reads nothing.
        dtype: of its weights.

    Raises:
        ValueError: the projection is missing, or the checkpoint was trained with another encoder.
    """
    metadata = read_metadata(path)
    metadata.transformer_config()  # raises for a file without a transformer
    check_text_encoder(metadata, text_encoder)
    weights = metadata if text_encoder.projection_path is None else read_metadata(text_encoder.projection_path)
    with torch.device("meta"):
        extractor = FeatureExtractor.from_config(metadata.config, text_encoder.dimensions)
    load_module(extractor, weights, TEXT_PROJECTION, device=device, dtype=dtype)
    return extractor.requires_grad_(False).eval()


@torch.no_grad()
def quantize_text_encoder(encoder: TextEncoder, precision: TextPrecision, device: str | torch.device) -> TextEncoder:
    """Quantizes every linear layer of an encoder and moves it to a device, layer by layer.

    Embeddings and norms keep their dtype.

    Args:
        encoder: on the CPU; changed in place.
        precision: form of the weights; "full" only moves the encoder.
        device: destination. It never holds more than one layer in full precision.
    """
    if precision != "full":
        linears = [(name, layer) for name, layer in encoder.model.named_modules() if isinstance(layer, nn.Linear)]
        # One layer at a time: the encoder in full precision never is on the device.
        for name, layer in linears:
            encoder.model.set_submodule(name, QuantizedLinear.from_linear(layer.to(device), precision))
    encoder.model.to(device)
    return encoder


def encode_by_layers(encoder: TextEncoder, device: str | torch.device) -> TextEncoder:
    """Moves an encoder to a device, except for its layers, each of which is copied there while it runs.

    For a GPU that cannot hold the encoder: the results are the same, and the device holds one layer (0.5 GB of Gemma 3
    12B) and the embeddings (2 GB). Every batch copies all layers.

    Args:
        encoder: on the CPU; changed in place.
        device: destination.
    """
    layers = encoder.model.layers
    for child in encoder.model.children():
        if child is not layers:
            child.to(device)
    for layer in layers:
        host = [(tensor, tensor.data) for tensor in (*layer.parameters(), *layer.buffers())]

        # The host's tensors are kept rather than copied back: frozen weights do not change.
        def fetch(*_: Any, host: list[tuple[Tensor, Tensor]] = host) -> None:
            for tensor, data in host:
                tensor.data = data.to(device, copy=True)

        def free(*_: Any, host: list[tuple[Tensor, Tensor]] = host) -> None:
            for tensor, data in host:
                tensor.data = data

        layer.register_forward_pre_hook(fetch)
        layer.register_forward_hook(free)
    return encoder
