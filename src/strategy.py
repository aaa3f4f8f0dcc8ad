"""Lightning's strategy for FSDP2, as this project uses it: all processes share one copy of the model.

    trainer:
      strategy: {target: src.strategy.FSDP2}

What is sharded, and how, is `src.parallel.Sharding` (objective.training.sharding).
"""

from __future__ import annotations

from datetime import timedelta

from lightning.pytorch.strategies import ModelParallelStrategy


class FSDP2(ModelParallelStrategy):
    """`ModelParallelStrategy` with data parallelism only, over the devices of all nodes.

    timeout_minutes: how long a rank waits for the others before the job fails
    """

    def __init__(self, *, timeout_minutes: float = 30.0) -> None:
        super().__init__(tensor_parallel_size=1, timeout=timedelta(minutes=timeout_minutes))

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()
