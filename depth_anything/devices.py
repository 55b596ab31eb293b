"""Known accelerators and their dense bf16 peaks, by the name to type and by the name that CUDA reports."""

import difflib
import re
from dataclasses import dataclass

from depth_anything.errors import UserError


@dataclass(frozen=True)
class Device:
    """An accelerator.

    Attributes:
        name: The name to type.
        label: The name to print.
        peak_tflops: Dense bf16 matrix products with float32 accumulation, TFLOP/s; data sheets that print the figure
            with sparsity print twice this.
        cuda_name: Regular expression of the name that CUDA reports.
    """

    name: str
    label: str
    peak_tflops: float
    cuda_name: str


# A part of a card (MIG) and a card that is not here have no peak: a wrong peak is worse than none.
DEVICES = (
    # NVIDIA A100 datasheet (June 2021): BF16 Tensor Core 312 TFLOPS, 624 with sparsity; 40 and 80 GB alike.
    Device("a100", "A100", 312.0, r"\bA100\b"),
    # NVIDIA H100 datasheet (2023): SXM 1,979 TFLOPS with sparsity, PCIe 1,513.
    Device("h100", "H100 SXM", 989.0, r"\bH100\b.*\bHBM3\b"),
    Device("h100-pcie", "H100 PCIe", 756.0, r"\bH100 PCIe\b"),
    # NVIDIA H200 datasheet (2024): SXM 1,979 TFLOPS with sparsity; the compute of an H100 SXM.
    Device("h200", "H200 SXM", 989.0, r"\bH200\b"),
    # NVIDIA L40S datasheet (2023): 362.05 TFLOPS, 733 with sparsity.
    Device("l40s", "L40S", 362.0, r"\bL40S\b"),
    # NVIDIA L4 datasheet (2023): 242 TFLOPS with sparsity.
    Device("l4", "L4", 121.0, r"\bL4\b"),
    # NVIDIA DGX B200 datasheet (2024): 36 PFLOPS with sparsity for eight.
    Device("b200", "B200", 2250.0, r"\bB200\b"),
    # NVIDIA Ada GPU architecture whitepaper, appendix A: BF16 with FP32 accumulate 165.2 TFLOPS, 330.4 with sparsity.
    Device("rtx4090", "RTX 4090", 165.0, r"\bRTX 4090$"),
    # NVIDIA Ampere GA102 architecture whitepaper, table 3: BF16 with FP32 accumulate 71 TFLOPS, 142 with sparsity.
    Device("rtx3090", "RTX 3090", 71.0, r"\bRTX 3090$"),
)


def find_device(name: str) -> Device:
    """Return the device of a typed name; case, spaces, dashes and underscores do not matter.

    Example:
        >>> find_device("RTX 4090").peak_tflops
        165.0

    Raises:
        UserError: If the device is not known.
    """
    known = {_plain(device.name): device for device in DEVICES}
    if _plain(name) in known:
        return known[_plain(name)]
    closest = difflib.get_close_matches(_plain(name), known, 1, 0.5)
    names = ", ".join(device.name for device in DEVICES)
    raise UserError(
        f"no peak is known for the device {name!r}",
        f"type {known[closest[0]].name if closest else 'one that is known'} (known: {names}), or the peak of its data "
        "sheet as --peak-tflops N",
    )


# Of the dense bf16 peak, by the same sources: fp16 has the same, tf32 half of it (A100 156, H100 SXM 494.5, H100 PCIe
# 378, H200 494.5, L40S 183, L4 60, B200 1,125, RTX 4090 82.6, RTX 3090 35.6).
PRECISION_SHARES = {"bf16": 1.0, "fp16": 1.0, "tf32": 0.5}


def peak_tflops(cuda_name: str, precision: str = "bf16") -> float | None:
    """Return the dense peak of a card by the name that CUDA reports, TFLOP/s; None if it is not known.

    Args:
        cuda_name: As `torch.cuda.get_device_name`.
        precision: "bf16", "fp16" or "tf32" of the matrix products; they are added in float32.

    Example:
        >>> peak_tflops("NVIDIA A100-SXM4-80GB"), peak_tflops("NVIDIA A100-SXM4-40GB MIG 1g.5gb")
        (312.0, None)
        >>> peak_tflops("NVIDIA A100-SXM4-80GB", "tf32")
        156.0
    """
    if "MIG" in cuda_name.split():
        return None
    peak = next((d.peak_tflops for d in DEVICES if re.search(d.cuda_name, cuda_name)), None)
    return None if peak is None else peak * PRECISION_SHARES[precision]


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", name.lower())
