"""One thread for tensors, in the tests and in all processes that they start.

The tensors are so small that more threads only cost time, and a process that is forked (as tests with a kill do) while
its parent has worker threads waits for them for ever.
"""

import os

import torch

os.environ["OMP_NUM_THREADS"] = "1"  # for the processes
torch.set_num_threads(1)
