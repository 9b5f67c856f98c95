"""What is known about the GPUs that the kernels are written for."""

from __future__ import annotations

from dataclasses import dataclass

_KIB = 1024


@dataclass(frozen=True)
class Device:
    """One GPU of an architecture.

    Limits are those of the CUDA programming guide's table of compute capabilities; processors, clock (Hz) and bandwidth
    (bytes a second) those of the product's data sheet.
    """

    name: str
    architecture: int
    processors: int
    shared_block: int  # the most shared memory of a block
    shared_processor: int
    threads_processor: int
    clock: float
    bandwidth: float

    @property
    def capability(self) -> tuple[int, int]:
        return divmod(self.architecture, 10)


DEVICES = {
    device.architecture: device
    for device in (
        Device("T4", 75, 40, 64 * _KIB, 64 * _KIB, 1024, 1.59e9, 0.32e12),
        Device("A100 40GB", 80, 108, 163 * _KIB, 164 * _KIB, 2048, 1.41e9, 1.555e12),
        Device("A10", 86, 72, 99 * _KIB, 100 * _KIB, 1536, 1.695e9, 0.6e12),
        Device("L4", 89, 58, 99 * _KIB, 100 * _KIB, 1536, 2.04e9, 0.3e12),
        Device("H100 SXM", 90, 132, 227 * _KIB, 228 * _KIB, 2048, 1.755e9, 3.35e12),
        Device("B200", 100, 148, 227 * _KIB, 228 * _KIB, 2048, 1.965e9, 8.0e12),
        Device("RTX 5090", 120, 170, 99 * _KIB, 100 * _KIB, 1536, 2.407e9, 1.792e12),
    )
}
