"""The memory that this process may still use. Main memory is limited by the machine, and by the control group of a container or service."""

import math
import re
from pathlib import Path

import psutil
import torch


def free_memory(device: str | torch.device = "cpu") -> float:
    """Return the bytes that are free for this process on a device: a CPU or a GPU."""
    if torch.device(device).type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return min(psutil.virtual_memory().available, control_group_memory())


def control_group_memory(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """Return the free bytes of the tightest control group (v1 or v2) of this process. The page cache counts as free."""
    left = [math.inf]
    for line in own.read_text().splitlines() if own.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top = root / controllers
        limit, used, cache = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            if controllers
            else ("memory.max", "memory.current", "inactive_file")
        )
        leaf = top / path.lstrip("/")
        for group in (group for group in (leaf, *leaf.parents) if group.is_relative_to(top)):
            files = group / limit, group / used, group / "memory.stat"
            if not all(file.is_file() for file in files) or not files[0].read_text().strip().isdigit():
                continue
            inactive = re.search(rf"^{cache} (\d+)$", files[2].read_text(), re.MULTILINE)
            left.append(float(files[0].read_text()) - float(files[1].read_text()) + float(inactive[1] if inactive else 0))
    return max(0.0, min(left))
