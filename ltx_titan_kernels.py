"""Makes the folder `kernels/` importable as `ltx_titan_kernels` in a plain checkout; an installation maps it itself.

The folder cannot carry that name's obvious form: a top-level package called `kernels` would shadow the public one that
transformers looks for. A module with a `__path__` is a package, so this file is all that is needed.
"""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parent / "kernels")]
