"""Memory of a process, read from Linux's /proc."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path


def memory_field(name: str, pid: int | str = "self") -> int:
    """Bytes of a field of /proc/PID/status: VmRSS is the resident size, VmHWM its peak."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/{pid}/status has no {name}: this benchmark needs Linux")


class PeakMemory:
    """The peak of this process's memory from `start` on, minus what it held then."""

    held: int | None = None

    def start(self) -> None:
        """Return free memory to the system, then reset the peak."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        self.held = memory_field("VmRSS")

    def growth(self) -> int:
        """Bytes."""
        assert self.held is not None, "start() was never called"
        return memory_field("VmHWM") - self.held
