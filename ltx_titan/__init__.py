"""Fine-tuning of the LTX-2 family of audio-video diffusion transformers, the TorchTitan way."""

import sys
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path

__version__ = "0.1.0"

# The Triton operations are in the folder `kernels/` and are imported as `ltx_titan_kernels`: a top-level package called
# `kernels` would shadow the public one that transformers looks for. An installation maps the name; in a plain checkout
# this does.
_KERNELS = Path(__file__).resolve().parent.parent / "kernels"
if "ltx_titan_kernels" not in sys.modules and (_KERNELS / "rms_norm_modulate.py").is_file():
    _spec = ModuleSpec("ltx_titan_kernels", loader=None, is_package=True)
    _spec.submodule_search_locations = [str(_KERNELS)]
    sys.modules["ltx_titan_kernels"] = module_from_spec(_spec)
