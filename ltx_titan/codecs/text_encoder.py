"""Captions to text features: Gemma 3 through transformers, then the projection of the checkpoint.

Gemma runs as a bare language model. The states of all its layers are kept, L + 1 of them: the scaled token
embeddings, the outputs of all layers but the last, and the output of the last after the final norm. The checkpoint's
feature extractor projects them; what comes out is what datasets store, and the connectors turn it into a context
during training.

Captions are tokenised as they are: stripped, with a leading BOS, no template and no EOS, cut to 1024 tokens, padded
on the left. Padding takes no compute here: a real token's states do not depend on it, so Gemma runs on the longest
caption of the batch and the padded rows are zeros, which the feature extractor ignores.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    Gemma3Model,
    Gemma3TextModel,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from ltx_titan.codecs.single_file import load_strictly, open_single_file
from ltx_titan.model import FeatureExtractor

MAX_TOKENS = 1024


@dataclass(frozen=True)
class TextEncoder:
    """A loaded Gemma language model with its tokenizer.

    Attributes:
        model: the language model, without vision tower or head.
        tokenizer: its tokenizer.
        max_tokens: length that captions are cut and padded to.
    """

    model: Gemma3TextModel
    tokenizer: PreTrainedTokenizerBase
    max_tokens: int = MAX_TOKENS

    @property
    def dimensions(self) -> dict[str, int]:
        """What a feature extractor needs to know: `hidden_size` and `num_hidden_layers`."""
        config = self.model.config
        return {"hidden_size": config.hidden_size, "num_hidden_layers": config.num_hidden_layers}

    def tokenize(self, caption: str) -> list[int]:
        """Token ids of one caption, BOS first, at most `max_tokens`, not padded."""
        ids = self.tokenizer(caption.strip(), truncation=True, max_length=self.max_tokens)["input_ids"]
        bos = self.tokenizer.bos_token_id
        if bos is not None and ids[:1] != [bos]:
            ids = [bos, *ids]
        return ids[: self.max_tokens]

    @torch.no_grad()
    def encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Run Gemma on captions.

        Returns:
            Hidden states [B, S, D, L] of S = `max_tokens` positions, width D and L layers, in the model's dtype and
            zero where padded; and the mask [B, S], int64, 1 for real tokens, which stand at the end.
        """
        ids = [self.tokenize(caption) for caption in captions]
        longest = max(len(row) for row in ids)
        # Any id serves as padding: its position is masked and its states are overwritten.
        padded = torch.tensor([[row[0]] * (longest - len(row)) + row for row in ids])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids])
        padded, mask = padded.to(self.model.device), mask.to(self.model.device)
        output = self.model(input_ids=padded, attention_mask=mask, output_hidden_states=True, use_cache=False)
        states = torch.stack(output.hidden_states, dim=-1)
        states = states.masked_fill(mask[:, :, None, None] == 0, 0)
        before = self.max_tokens - longest
        hidden_states = torch.nn.functional.pad(states, (0, 0, 0, 0, before, 0))
        return hidden_states, torch.nn.functional.pad(mask, (before, 0))


def text_encoder_config(folder: str | Path) -> PretrainedConfig:
    """Read and check the configuration of a Gemma 3 folder, no weights.

    Raises:
        ValueError: the folder holds no Gemma 3 model.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder}: no config.json in it; expected a local folder of Gemma 3 as transformers saves it "
            "(the published one is google/gemma-3-12b-it-qat-q4_0-unquantized)"
        )
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if config.model_type not in ("gemma3", "gemma3_text"):
        raise ValueError(
            f"{folder}: model_type is {config.model_type!r}, expected 'gemma3' or 'gemma3_text': LTX-2 and LTX-2.3 "
            "were trained with Gemma 3, and features of another model mean nothing to them"
        )
    return config


def load_text_encoder(
    folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.bfloat16
) -> TextEncoder:
    """Load Gemma 3 from a local folder in the transformers layout; nothing is downloaded.

    Args:
        folder: with `config.json`, weights and tokenizer files; of the whole model or of its language model.
        device: where it runs.
        dtype: of its weights.

    Raises:
        ValueError: the folder holds no Gemma 3 model.
    """
    config = text_encoder_config(folder)
    if config.model_type == "gemma3":
        model = Gemma3Model.from_pretrained(folder, dtype=dtype, local_files_only=True).language_model
    else:
        model = Gemma3TextModel.from_pretrained(folder, dtype=dtype, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return TextEncoder(model.requires_grad_(False).eval().to(device), tokenizer)


def load_feature_extractor(
    path: str | Path,
    text_encoder: TextEncoder,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> FeatureExtractor:
    """Load the projection `text_embedding_projection.*` that goes with a transformer.

    Args:
        path: the single-file checkpoint.
        text_encoder: the encoder whose states it is to project; its sizes have to fit.
        device: where it runs.
        dtype: of its weights.

    Raises:
        ValueError: the file holds no projection, or one for another text encoder.
    """
    file = open_single_file(path)
    file.section("transformer", "transformer and no text projection")
    prefix = "text_embedding_projection."
    with torch.device("meta"):
        extractor = FeatureExtractor.from_config(file.config, text_encoder.dimensions)
    names = {name: prefix + name for name in extractor.state_dict()}
    load_strictly(extractor, file, names, covers=(prefix,), dtype=dtype, device=device)
    return extractor.requires_grad_(False).eval()
