"""Peak FLOP/s of GPUs by name. No torch."""

import re

# Dense bfloat16 peaks in FLOP/s with float32 accumulation, by a pattern of torch's device name;
# where a data sheet gives the figure with sparsity, half of it. The first pattern that is found
# counts: an H100 PCIe is also an H100.
PEAK_FLOPS = {
    # NVIDIA's data sheets: Blackwell (HGX B200, HGX B300, GB200, GB300 NVL72), Hopper, H20.
    "GB300": 2500e12, "GB200": 2500e12, "B300": 2250e12, "B200": 2250e12,
    "GH200": 989e12, "H200 NVL": 835e12, "H200": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989e12,
    "H800 PCIe": 756e12, "H800": 989e12, "H20": 148e12,
    # NVIDIA's data sheets of Ampere and Ada; the A10G's is AWS's own part.
    "A100": 312e12, "A800": 312e12, "A30": 165e12, "A40": 149.7e12, "A10G": 70e12, "A10": 125e12,
    "L40S": 362e12, "L40": 181e12, "L4": 121e12,
    # Workstations: data sheets of RTX A6000 and RTX 6000 Ada.
    "RTX 6000 Ada": 364e12, "RTX A6000": 155e12,
    # GeForce: appendices of the white papers of GB202, AD102 and GA102.
    "RTX 5090": 209.5e12, "RTX 4090": 165e12, "RTX 4080": 97.5e12, "RTX 3090 Ti": 80e12, "RTX 3090": 71e12,
    # AMD's data sheets. An MI250X shows as two devices of half its figure.
    "MI355X": 2500e12, "MI325X": 1307e12, "MI300X": 1307e12, "MI250X": 191.5e12,
}  # fmt: skip
# Parts that share a name with a faster one: laptops run at what their power limit allows, a MIG
# slice has a fraction of its GPU, and these are other chips.
OTHER_PARTS = r"Laptop|Notebook|Mobile|Max-Q|\bMIG\b|RTX \d+ (D|Super)\b"


def peak_flops(device_name: str) -> float | None:
    """Peak dense bfloat16 FLOP/s of a GPU by torch's name for it; None, and so no MFU, where it is
    unknown.
    """
    if re.search(OTHER_PARTS, device_name, re.IGNORECASE):
        return None
    return next((peak for part, peak in PEAK_FLOPS.items() if re.search(rf"\b{part}\b", device_name)), None)


def format_peak(device_name: str) -> str:
    """The peak that MFU is measured against, for the log."""
    peak = peak_flops(device_name)
    known = f"peak {peak / 1e12:,.1f} TFLOP/s, dense bfloat16" if peak else "peak FLOP/s unknown, so no mfu"
    return f"device {device_name}: {known}"
