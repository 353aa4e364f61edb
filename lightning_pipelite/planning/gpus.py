"""GPUs whose speed is known well enough to estimate a step: makers' figures, and the share of them that is reached."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace

from lightning_pipelite.errors import ConfigurationError

GIB = 2**30
REACHED = {1: 0.53, 2: 0.607, 4: 0.67}
"""Share of the peak rate that training reaches, by element size in bytes; measured on one H100, assumed for all."""
REACHED_BANDWIDTH = 0.716
"""Share of the memory bandwidth that training reaches; measured on one H100, assumed for all."""
REACHED_LINK = 0.78
"""Share of the bandwidth between two GPUs that is reached."""


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        name: Common name.
        memory: Bytes that torch reports, which are fewer than advertised.
        tflops: Peak rate of dense bfloat16 matrix products with float32 accumulation, in 1e12 operations per second.
        fp8: The same in FP8; None if the tensor cores do not support it.
        fp32: The same in float32.
        bandwidth: Memory bandwidth, GB/s.
        link: Bandwidth to another GPU, GB/s one way: PCIe with 16 lanes, or NVLink.
    """

    name: str
    memory: int
    tflops: float
    fp8: float | None
    fp32: float
    bandwidth: float
    link: float

    def flops(self, width: int) -> float:
        """Return the operations per second that are reached, for an element size in bytes."""
        if width == 1 and self.fp8 is not None:
            return self.fp8 * 1e12 * REACHED[1]
        if width <= 2:  # without tensor cores for it, FP8 is first converted to bfloat16
            return self.tflops * 1e12 * REACHED[2]
        return self.fp32 * 1e12 * REACHED[4]

    @property
    def measured(self) -> bool:
        """Whether the rates that are reached were measured on it."""
        return self.name == "H100"

    @property
    def bytes_a_second(self) -> float:
        """Memory bandwidth that is reached, in bytes per second."""
        return self.bandwidth * 1e9 * REACHED_BANDWIDTH

    @property
    def link_a_second(self) -> float:
        """Bandwidth to another GPU that is reached, in bytes per second."""
        return self.link * 1e9 * REACHED_LINK


def _gib(size: float) -> int:
    return int(size * GIB)


# Sources, all without sparsity. "Peak BF16 (FP8) Tensor TFLOPS with FP32 Accumulate", dense of dense/sparse, in:
#   "NVIDIA Ampere GA102 GPU Architecture" V2, appendices A (GeForce RTX 3090: 71/142; 936 GB/s) and C (RTX A6000:
#       154.8/309.6; 768 GB/s);
#   "NVIDIA Ada GPU Architecture" v2.02, appendix A (GeForce RTX 4090: 165.2/330.4, FP8 330.3/660.6; 1008 GB/s);
#   "NVIDIA RTX Blackwell GPU Architecture", appendix A (GeForce RTX 5090: 209.5/419, FP8 419/838; 1792 GB/s).
# "Tensor Core" rows of the data sheets:
#   L40S: BFLOAT16 362.05 | 733*, FP8 733 | 1,466*; 864 GB/s; PCIe 4 x16, 64 GB/s both ways;
#   A100 80GB SXM: BFLOAT16 312 | 624*; 2,039 GB/s; NVLink 600 GB/s both ways;
#   H100 SXM and H200 SXM: BFLOAT16 1,979*, FP8 3,958*, halved here, as * means with sparsity; 3.35 and 4.8 TB/s;
#       NVLink 900 GB/s both ways.
# The figures are taken from quotations, not from NVIDIA's own files. No quotation names the table of the 3090's 71,
# but 82 SMs with 512 multiply-adds per clock at 1.695 GHz give it, at half rate for float32 accumulation.
# The memory is the smallest "total capacity" that torch was seen to report; recent drivers reserve more.
GPUS = {
    "3090": Gpu("RTX 3090", _gib(23.56), 71.0, None, 35.6, 936, 32),
    "4090": Gpu("RTX 4090", _gib(23.51), 165.2, 330.3, 82.6, 1008, 32),
    "5090": Gpu("RTX 5090", _gib(31.34), 209.5, 419.0, 104.8, 1792, 64),
    "a6000": Gpu("RTX A6000", _gib(47.40), 154.8, None, 38.7, 768, 32),
    "l40s": Gpu("L40S", _gib(44.39), 362.0, 733.0, 91.6, 864, 32),
    "a100": Gpu("A100", _gib(79.14), 312.0, None, 19.5, 2039, 300),
    "h100": Gpu("H100", _gib(79.10), 989.0, 1979.0, 67.0, 3350, 450),
    "h200": Gpu("H200", _gib(139.72), 989.0, 1979.0, 67.0, 4800, 450),
}
"""The GPUs by short name."""
REFERENCE = replace(GPUS["h100"], link=32)
"""The GPU that plans assume if none is named: an H100, whose rates were measured, but linked by PCIe."""


def gpu_named(name: str) -> Gpu:
    """Return a GPU by its name, such as ``4090``, ``RTX 4090`` or ``rtx-a6000``.

    Raises:
        ConfigurationError: If it is not in the table.
    """
    short = re.sub(r"nvidia|geforce|rtx|80gb|sxm\d?|[\s_-]", "", name.lower())
    if short in GPUS:
        return GPUS[short]
    near = difflib.get_close_matches(short, GPUS, 1)
    meant = f"did you mean {near[0]}? Choose one of" if near else "choose one of"
    raise ConfigurationError(f"device is {name!r}; {meant} {', '.join(GPUS)}, or leave it out and give --memory.")
