"""What is summed over micro-batches and steps until the next log line, without the host waiting for the device."""

import torch
from torch import Tensor

from ltx_titan.conditioning import Loss, ModelInputs

# Lower ends of the noise levels that losses are also reported for.
_SIGMA_BUCKETS = (0.0, 0.25, 0.5, 0.75)


class Sums:
    """What is summed over micro-batches and steps until the next log line; tensors stay on the device."""

    def __init__(self, device: torch.device) -> None:
        self.loss = torch.zeros(3, device=device)
        """Total, video, audio; means over the global batch, added over steps."""
        self.buckets = torch.zeros(2, 2, len(_SIGMA_BUCKETS), device=device)
        """Per stream (video, audio): losses of the samples in each bucket, and their number."""
        self.edges = torch.tensor(_SIGMA_BUCKETS[1:], device=device)
        self.flops = 0.0
        self.tokens = 0
        self.steps = 0

    @torch.no_grad()
    def add(self, total: Tensor, loss: Loss, inputs: ModelInputs, share: float) -> None:
        """Adds one micro-batch: weighted loss of each sample [B], its parts, and what one sample counts."""
        for place, values in enumerate((total, loss.video, loss.audio)):
            if values is not None:
                self.loss[place] += values.sum() * share
        for place, (values, stream) in enumerate(((loss.video, inputs.video), (loss.audio, inputs.audio))):
            if values is not None:
                bucket = torch.bucketize(stream.sigma, self.edges, right=True)
                self.buckets[place, 0].index_add_(0, bucket, values)
                self.buckets[place, 1].index_add_(0, bucket, torch.ones_like(values))


def bucket_means(flat: list[float]) -> dict[str, float]:
    """Mean loss of each stream and range of noise levels that had samples, by TensorBoard tag."""
    width = len(_SIGMA_BUCKETS)
    means = {}
    for stream in range(2):
        for bucket, low in enumerate(_SIGMA_BUCKETS):
            total, count = (flat[(stream * 2 + row) * width + bucket] for row in range(2))
            if count:
                means[f"loss/{('video', 'audio')[stream]}_sigma_{low:.2f}-{low + 0.25:.2f}"] = total / count
    return means
