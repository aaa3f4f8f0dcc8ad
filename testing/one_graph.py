"""The loss of a step as one graph with one backward pass, the reference of `Objective.forward_backward`."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from src.diffusion.losses import editable, term_sum
from src.objectives.base import Objective
from src.types import Batch


def one_graph(objective: Objective, batch: Batch) -> None:
    """Accumulate the gradients of a step."""
    views = objective.corrupt(batch)
    totals = objective.denominators([(batch, views)])
    prefix = objective.backbone.encode_prefix(batch.prefix)
    losses = []
    for view, first in enumerate(views):
        state, noise = first, objective.noise(batch, f"{view}/passes")
        for terms in (objective.first_terms, objective.second_terms):
            if state is None:
                break
            where = editable(state) if terms is objective.second_terms else objective.positions(terms, state)
            logits = objective.backbone(prefix, state.tokens, attend=batch.editable, positions=where).float()
            values = torch.zeros(where.shape, device=where.device)
            values[where] = F.cross_entropy(logits, state.target[where], reduction="none")
            losses += [term.coef * term_sum(term, values, state) / totals[term.name] for term in terms]
            is_first = terms is objective.first_terms
            state = objective.second_input(batch, state, where, logits.detach(), noise) if is_first else None
    torch.stack(losses).sum().backward()
