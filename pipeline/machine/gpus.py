"""Peak FLOP/s of GPUs by name. No torch."""

import re

# Dense bfloat16 peaks in FLOP/s from the vendors' data sheets, by a part of torch's device name.
# Longer names come first: an H100 PCIe is also an H100.
PEAK_FLOPS = {
    "GH200": 989e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "B200": 2250e12,
    "A100": 312e12, "A10G": 70e12, "L40S": 362e12, "L4": 121e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip


def peak_flops(device_name: str) -> float | None:
    """Peak dense bfloat16 FLOP/s of a GPU by torch's name for it; None, and so no MFU, where it is
    unknown.
    """
    return next((peak for part, peak in PEAK_FLOPS.items() if re.search(rf"\b{part}\b", device_name)), None)
