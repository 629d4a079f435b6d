"""A block whose audio runs on a stream of its own, beside the video: a trial for `bench block --providers beside`.

A kernel over 126 audio tokens takes a few microseconds and occupies a few multiprocessors, and a compiled block runs
these kernels and the video's one after the other. Here a block is compiled in five parts, and a CUDA graph may run
those of audio at the same time. The provider `parts` runs the five parts on one stream, as a control.

    main stream    attend video | cross-modal attention | feed forward video
    side stream    attend audio |                       | feed forward audio

Autograd runs the backward pass of each part on the stream of its forward pass, and orders them. The price is that a
part saves its inputs: two video tensors more.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from ltx_titan.model.block import AVTransformerBlock, StreamInputs, Update
from ltx_titan.model.ops import rows_of
from ltx_titan.model.perturbations import KeepMasks


class _Part(nn.Module):
    def __init__(self, block: AVTransformerBlock) -> None:
        super().__init__()
        self.block = block


class _AttendVideo(_Part):
    def forward(self, x: Tensor, inputs: StreamInputs, keep: Tensor | None) -> tuple[Tensor, Update]:
        b = self.block
        rows, prompt = rows_of(b.scale_shift_table, inputs.modulation), b.prompt_scale_shift_table
        return b._attend(x, rows, inputs, b.attn1, b.attn2, prompt, keep)


class _AttendAudio(_Part):
    def forward(self, x: Tensor, inputs: StreamInputs, keep: Tensor | None) -> tuple[Tensor, Update]:
        b = self.block
        rows, prompt = rows_of(b.audio_scale_shift_table, inputs.modulation), b.audio_prompt_scale_shift_table
        return b._attend(x, rows, inputs, b.audio_attn1, b.audio_attn2, prompt, keep)


class _CrossAttend(_Part):
    def forward(
        self,
        video: Tensor,
        audio: Tensor,
        video_update: Update,
        audio_update: Update,
        video_inputs: StreamInputs,
        audio_inputs: StreamInputs,
        keep: KeepMasks,
    ) -> tuple[Tensor, Tensor, Update | None, Update | None]:
        return self.block._cross_attend(
            video, audio, video_update, audio_update, video_inputs, audio_inputs, keep, True, True
        )


class _FeedForwardVideo(_Part):
    def forward(self, x: Tensor, update: Update, inputs: StreamInputs) -> Tensor:
        rows = rows_of(self.block.scale_shift_table, inputs.modulation)
        return self.block._feed_forward(x, update, rows, inputs.index, self.block.ff)


class _FeedForwardAudio(_Part):
    def forward(self, x: Tensor, update: Update, inputs: StreamInputs) -> Tensor:
        rows = rows_of(self.block.audio_scale_shift_table, inputs.modulation)
        return self.block._feed_forward(x, update, rows, inputs.index, self.block.audio_ff)


class BesideBlock(nn.Module):
    """A block with both streams enabled and modulated text; its audio runs on `side`, or among the video if None."""

    def __init__(self, block: AVTransformerBlock, side: torch.cuda.Stream | None) -> None:
        super().__init__()
        self.side = side
        self.attend_video, self.attend_audio = _AttendVideo(block), _AttendAudio(block)
        self.cross_attend = _CrossAttend(block)
        self.feed_forward_video, self.feed_forward_audio = _FeedForwardVideo(block), _FeedForwardAudio(block)

    def forward(
        self,
        video: Tensor,
        audio: Tensor,
        video_inputs: StreamInputs,
        audio_inputs: StreamInputs,
        keep: KeepMasks,
        *unused: bool,
    ) -> tuple[Tensor, Tensor]:
        """As `AVTransformerBlock.forward`."""
        self._fork()
        with self._beside():
            audio, audio_update = self.attend_audio(audio, audio_inputs, keep.audio_self)
        video, video_update = self.attend_video(video, video_inputs, keep.video_self)
        self._join()
        video, audio, video_update, audio_update = self.cross_attend(
            video, audio, video_update, audio_update, video_inputs, audio_inputs, keep
        )
        self._fork()
        with self._beside():
            audio = self.feed_forward_audio(audio, audio_update, audio_inputs)
        video = self.feed_forward_video(video, video_update, video_inputs)
        self._join()
        return video, audio

    # The allocator reuses memory in the order of the stream that it was allocated on. In the forward pass, what one
    # stream made and the other read is freed after the two have joined, and allocated again after the next fork; in the
    # backward pass autograd orders the streams, and tells the allocator which gradients cross.
    def _fork(self) -> None:
        if self.side is not None:
            self.side.wait_stream(torch.cuda.current_stream())

    def _join(self) -> None:
        if self.side is not None:
            torch.cuda.current_stream().wait_stream(self.side)

    def _beside(self) -> AbstractContextManager:
        return nullcontext() if self.side is None else torch.cuda.stream(self.side)


def split_blocks(blocks: nn.ModuleList, device: torch.device, *, audio_beside: bool) -> list[nn.Module]:
    """Replaces blocks by ones in parts, whose audio may run beside their video; returns the parts, to be compiled."""
    # High priority: a short kernel that waits for a free multiprocessor goes before the long ones' next blocks.
    side = torch.cuda.Stream(device, priority=-1) if audio_beside and device.type == "cuda" else None
    parts: list[nn.Module] = []
    for number, block in enumerate(blocks):
        assert isinstance(block, AVTransformerBlock) and block.text_modulation, "a block of LTX-2.3 or later"
        beside = BesideBlock(block, side)
        parts += beside.children()
        blocks[number] = beside
    return parts
