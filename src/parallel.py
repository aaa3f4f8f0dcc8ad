"""Who this process is among the processes of a run; one process alone is rank 0 of 1, without any set-up."""

from __future__ import annotations

import torch.distributed as dist


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if _distributed() else 0


def world() -> int:
    """The number of processes of the run."""
    return dist.get_world_size() if _distributed() else 1


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
