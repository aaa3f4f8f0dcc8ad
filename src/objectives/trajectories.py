"""Stage II on the states that a draft passed through, in place of the finished draft. Ours, not from a paper.

Decoding asks a model about texts that are still partly masked; ReDiff's Stage II shows it finished drafts alone. Here a
draft of S steps, corrected by the expert, is shown after its step k = S - floor(t S):

    not yet unmasked after step k     the mask            -> cross-entropy with the corrected draft
    visible, in a corrected span      the wrong token     -> cross-entropy with the correction, as in Stage II
    visible, elsewhere                the draft's token   -> as in Stage II: none, or `keep`

The round keeps one number for each position, the step that unmasked it (`Draft.unmasked_at`).
"""

from __future__ import annotations

from typing import Any

from src.diffusion.corruption import Chain, Trajectory
from src.objectives.base import Setup
from src.objectives.refine import Refine


class Trajectories(Refine):
    """`Refine` with drafts taken back by `Trajectory`; other rows and all terms are as there.

    Masks of drafts and of Stage I data share the term `mask`. At the first batch with a draft of a round of an older
    version UserError is raised.
    """

    def __init__(self, setup: Setup, **refine: Any) -> None:
        super().__init__(setup, **refine)
        self.corruption = Chain(Trajectory(special=setup.special), self.corruption)
