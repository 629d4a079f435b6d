"""What prepared data is: samples and their shapes, rates, lengths and text, what is missing, and what is broken."""

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ltx_titan.data import read_sample
from ltx_titan.tools.files import SOUND_SUFFIXES  # noqa: F401
from ltx_titan.tools.sheet import Entry
