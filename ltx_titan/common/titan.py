"""The only module that imports torchtitan, so that replacing or upgrading it concerns one file.

It is imported where it is called: torchtitan takes seconds to import, and a CPU has no peak. `docs/architecture.md`
lists what is taken and why each other part is not.
"""

import logging

# Devices in torchtitan's table. For any other it returns an A100's figure: a wrong MFU is worse than none.
_KNOWN_DEVICES = ("A100", "H100", "H200", "H20", "B200", "MI250X", "MI300X", "MI325X", "MI355X", "l40s")


def peak_flops(device_name: str | None) -> float | None:
    """Dense bfloat16 FLOP/s from the data sheet of this machine's GPU; None on a CPU or for an unknown GPU.

    Args:
        device_name: as returned by `torch.cuda.get_device_name`; None for a CPU. torchtitan tells the variants of an
            H100 (SXM, PCIe, NVL) apart by `lspci`, so the answer is right only for a GPU of this machine.
    """
    if device_name is None or not any(known in device_name for known in _KNOWN_DEVICES):
        return None
    from torchtitan.tools.utils import get_peak_flops

    # Containers often lack `lspci`; torchtitan then warns on every rank and uses the name, which is fine.
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        return get_peak_flops(device_name)
    finally:
        logging.disable(before)
