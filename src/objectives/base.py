"""Base class of all objectives: the loss of a step, the optimizer step, logging.

    batch -> micro-batches -> corrupt (no network) -> total denominators -> `backward`: loss and gradients -> one step

`Objective.backward` is the whole loss, top to bottom. Denominators are summed over all micro-batches and ranks before
any division, so neither changes the result. An objective supplies a corruption and its loss terms; one with a second
forward pass also supplies that pass's terms and its input (`second_input`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from src.diffusion import corruption
from src.diffusion.losses import Term, denominator, editable, positions_of, shares_of, term_sum
from src.diffusion.noise import Noise
from src.distributed.checkpoints import keep_trained
from src.distributed.parallel import (
    Sharding,
    all_reduce_sum,
    average_gradients,
    full_tensor,
    gather,
    is_sharded,
    rank,
    world_size,
)
from src.io.errors import UserError
from src.objectives.optim import Optim, init_state, step_seed
from src.types import Batch, Corrupted, Corruption, Kind, Prefix, SpecialIds

log = logging.getLogger(__name__)


class Diverged(UserError):
    """Raised after `max_skipped` consecutive steps with non-finite gradients."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What every objective is built from.

    backbone: factory that builds the network. If it has a method `fill(network)`, the network is on the meta device,
        and `fill` loads the weights after allocation: each rank loads its own shard
    special: special token ids; optim: optimizer and execution of a step; seed: of the noise
    """

    backbone: Callable[[], nn.Module]
    special: SpecialIds
    optim: Optim
    seed: int = 0


class Objective(L.LightningModule):
    """Base of all objectives.

    corruption: makes the input of the first pass; terms: the losses of that pass
    second_terms: the losses of a second pass, whose input `second_input` derives from the logits of the first
    t_min, t_max: noise levels are uniform on [t_min, t_max)

    Raises UserError if there are no terms, two of one name, 0 <= t_min < t_max <= 1 does not hold, or a term of the
    second pass has reduce=tokens: its positions are not known when the denominators are computed.
    """

    def __init__(
        self,
        setup: Setup,
        *,
        corruption: Corruption,
        terms: tuple[Term, ...],
        second_terms: tuple[Term, ...] = (),
        t_min: float,
        t_max: float = 1.0,
    ) -> None:
        super().__init__()
        if not terms and not second_terms:
            raise UserError("the objective trains nothing: all coefficients are 0")
        if any(term.reduce == "tokens" for term in second_terms):
            raise UserError("reduce=tokens cannot be used by a second pass, use 'batch_tokens' or 'answer_len'")
        if len({term.name for term in (*terms, *second_terms)}) < len((*terms, *second_terms)):
            raise UserError(f"each term needs a name of its own, got {[t.name for t in (*terms, *second_terms)]}")
        if not 0 <= t_min < t_max <= 1:
            raise UserError(f"0 <= t_min < t_max <= 1 must hold, got t_min={t_min} and t_max={t_max}")
        self.automatic_optimization = False
        self.backbone: Any = setup.backbone()  # an nn.Module that implements `src.types.Backbone`
        self._fill: Callable[[nn.Module], None] | None = getattr(setup.backbone, "fill", None)
        self.special, self.optim, self.seed = setup.special, setup.optim, setup.seed
        self.corruption, self.first_terms, self.second_terms = corruption, terms, second_terms
        self.t_min, self.t_max, self.terms = t_min, t_max, (*terms, *second_terms)
        if self.optim.checkpointing != "none":
            self.backbone.checkpoint(self.optim.checkpointing)
        if self.optim.compile:
            self.backbone.compile_blocks()
        if getattr(self.backbone, "lora", None):
            keep_trained(self)
        self._counts: dict[str, Tensor] = {}  # (hits, tries) of each logged share since the last log
        self.num_skipped = self._consecutive_skips = 0  # steps with non-finite gradients

    # What an objective may override

    def positions(self, terms: tuple[Term, ...], state: Corrupted) -> Tensor:
        """(B, L) bool: positions whose logits the first pass computes; at least those of its terms.

        The second pass computes those of all positions but the frozen ones, which are the same in both passes.
        """
        return positions_of(terms, state)

    def levels(self, quantile: Tensor) -> Tensor:
        """(B,) noise levels, from their quantiles (B,) on [0, 1), which `Optim` may spread evenly."""
        return self.t_min + (self.t_max - self.t_min) * quantile

    def second_input(
        self, batch: Batch, state: Corrupted, where: Tensor, logits: Tensor, noise: Noise
    ) -> Corrupted | None:
        """Input of the second pass over a view; None: no second pass in this step.

        logits: (N, V) of the first pass at the true positions of `where` (B, L), without gradient
        """
        return None

    def corrupt(self, batch: Batch) -> list[Corrupted]:
        """One corrupted response per view; a pure function of seed, pass, key and view."""
        views = []
        for view in range(self.optim.views):
            noise = self.noise(batch, view)
            of_level = self.noise(batch, "levels") if self.optim.antithetic else noise
            level = of_level.level(device=batch.response.device)  # (B,), on [0, 1)
            if self.optim.strata and batch.order:
                strata = torch.tensor(batch.order).to(level.device, non_blocking=True) % self.optim.strata
                level = (level + strata) / self.optim.strata
            if self.optim.antithetic:
                level = (level + view / self.optim.views) % 1
            state = self.corruption(batch, corruption.start(batch, self.levels(level)), noise)
            if not self.optim.filler_loss:
                filler = ~corruption.text_positions(batch.response, self.special.eot)
                state.kind = state.kind.masked_fill(filler, int(Kind.FROZEN))
            views.append(state)
        return views

    # The loss

    def forward_backward(self, batch: Batch, views: list[Corrupted], totals: dict[str, Tensor]) -> dict[str, Tensor]:
        """Forward and backward of one micro-batch. Returns each term's sum before the division, without gradient.

        views: corrupted responses, see `corrupt`; totals: see `denominators`

        The backward of each pass runs before the next forward, so views and passes cost time but no memory. Without
        gradients (validation) there is no backward.
        """
        sums: dict[str, Tensor] = {}
        # 1. Encode all that precedes the response, once for all passes. The passes see detached copies, the leaves, in
        #    which their gradients accumulate.
        prefix = self.backbone.encode_prefix(batch.prefix)
        leaves = detached(prefix)
        # 2. Where the passes need logits. The host waits for the device once, to learn how many positions these are.
        wheres = [(self.positions(self.first_terms, state), editable(state)) for state in views]  # (B, L) each
        counts = [where.sum() for pair in wheres for where in pair]
        unpadded, *numbers = torch.stack([batch.editable.all(), *counts]).tolist()
        attend = None if unpadded else batch.editable
        for view, state in enumerate(views):
            noise = self.noise(batch, f"{view}/passes")
            for second, terms in enumerate((self.first_terms, self.second_terms)):
                if state is None:
                    break
                where = wheres[view][second]
                at = torch.nonzero_static(where, size=numbers[2 * view + second]).unbind(1)  # (N,) rows, (N,) columns
                logits = self.backbone(leaves, state.tokens, attend=attend, positions=at).float()  # (N, V)
                # 3. Cross-entropy with the correct tokens, 0 elsewhere.
                cross_entropy = torch.zeros(where.shape, device=where.device, dtype=logits.dtype)
                cross_entropy[at] = F.cross_entropy(logits, state.target[at], reduction="none")
                # 4. Each term: weighted by 1 or 1/t, summed over its positions, divided by the total denominator.
                losses = {term.name: term_sum(term, cross_entropy, state) for term in terms}
                loss = self.weighted({name: value / totals[name] for name, value in losses.items()})
                # 5. Count correct predictions; the logits may give the input of a second pass.
                self._count(logits.detach(), state, at, terms)
                state = None if second else self.second_input(batch, state, where, logits.detach(), noise)
                del logits, cross_entropy
                # 6. Backward down to the leaves. Gradients are averaged over the ranks, but the denominators are
                #    already sums over the ranks.
                if torch.is_grad_enabled():
                    (world_size() * loss).backward()
                sums |= {name: sums.get(name, 0) + value.detach() for name, value in losses.items()}
                del loss, losses  # frees the graph of this pass before the next forward
        # 7. Backward through the prefix encoder, from the gradients of all passes.
        propagate(prefix, leaves)
        return sums

    def denominators(self, micro_batches: list[tuple[Batch, list[Corrupted]]]) -> dict[str, Tensor]:
        """Each term's denominator, over all micro-batches, views and ranks; at least 1."""
        states = [state for _, views in micro_batches for state in views]
        totals = [torch.stack([denominator(term, state) for state in states]).sum() for term in self.terms]
        totals = all_reduce_sum(torch.stack(totals)).clamp(min=1)
        return {term.name: total for term, total in zip(self.terms, totals, strict=True)}

    def weighted(self, values: dict[str, Tensor]) -> Tensor:
        """Sum of the terms in `values`, each times its coefficient."""
        return torch.stack([term.coef * values[term.name] for term in self.terms if term.name in values]).sum()

    def tally(self, name: str, hits: Tensor, tries: Tensor) -> None:
        """Add to the counts of the share hits / tries, which the next log reports as `<stage>/<name>`."""
        self._counts[name] = self._counts.get(name, 0) + torch.stack([hits.sum(), tries.sum()])

    # The step

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        micro_batches = [(rows, self.corrupt(rows)) for rows in batch.split(self.optim.micro_batch or len(batch))]
        totals = self.denominators(micro_batches)
        torch.manual_seed(step_seed(self.seed, self.global_step, rank()))  # of dropout, if resumed too
        optimizer, schedule = self._optimization()
        optimizer.zero_grad()
        sums = _summed([self.forward_backward(rows, views, totals) for rows, views in micro_batches])
        average_gradients(self.parameters())
        # The host waits for the device once more, for all that it logs or decides.
        device_norm = self._clip().double()[None]
        norm, *logged = torch.cat([device_norm, self._logged(sums, totals, micro_batches)]).tolist()
        if not math.isfinite(norm):
            optimizer.zero_grad()
            self._skip(batch, sums)
            return
        self._consecutive_skips = 0
        rate = float(optimizer.param_groups[0]["lr"])  # of this step: the schedule then sets that of the next one
        torch.manual_seed(step_seed(self.seed, self.global_step, -1))  # of rounding: equal on all ranks
        optimizer.step()
        schedule.step()
        self._log("train", logged, list(sums), micro_batches)
        self._log_values("train", {"grad_norm": norm, "lr": rate})

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        micro_batches = [(batch, self.corrupt(batch))]
        totals = self.denominators(micro_batches)
        sums = self.forward_backward(*micro_batches[0], totals)
        self._log("val", self._logged(sums, totals, micro_batches).tolist(), list(sums), micro_batches)

    def configure_model(self) -> None:
        """Shard the backbone over the ranks if the strategy has a device mesh (called by Lightning).

        Raises UserError if the objective has parameters outside the backbone.
        """
        if self.device_mesh is None or is_sharded(self.backbone):
            return
        if (self.optim.states, self.optim.rounding) != ("full", "nearest"):
            raise UserError("optim.states=8bit and rounding=stochastic are for one process, or parallel/ddp")
        replicas, mesh = self.device_mesh["data_parallel"], self.device_mesh
        mesh = replicas if mesh.size() == replicas.size() else mesh
        (self.optim.sharding or Sharding()).apply(self.backbone, mesh, precision=self.trainer.precision)
        if unsharded := [name for name, parameter in self.named_parameters() if not isinstance(parameter, DTensor)]:
            raise UserError(f"{', '.join(unsharded)}: outside the backbone, so not sharded; use parallel/ddp")
        if self._fill:
            self.backbone.to_empty(device=self.device)
            self._fill(self.backbone)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Align Lightning's log step with optimizer steps: it also counts skipped steps, and one extra on resuming."""
        self._log_at_global_step()

    def on_validation_start(self) -> None:
        """Log validation at the number of steps that the weights have taken; Lightning would log it one too early."""
        self._log_at_global_step()

    def _log_at_global_step(self) -> None:
        self.trainer.fit_loop.epoch_loop._batches_that_stepped = self.trainer.global_step

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["num_skipped"] = self.num_skipped

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.num_skipped = checkpoint.get("num_skipped", 0)

    def make_optimizer(self) -> torch.optim.Optimizer:
        """AdamW over the trainable parameters; freezes the vision tower if its learning rate is 0."""
        return self.optim.optimizer([{"params": list(group), "lr": lr} for group, lr in self._groups()])

    def configure_optimizers(self) -> Any:
        optim, optimizer = self.optim, self.make_optimizer()
        total = self.trainer.max_steps
        if total < 1:
            raise UserError(f"trainer.max_steps must be set, as the learning rate schedule depends on it, got {total}")
        init_state(optimizer)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: optim.factor(step, total))
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def _groups(self) -> Iterator[tuple[list[nn.Parameter], float]]:
        """Yield (parameters, learning rate) of everything but the vision tower, then of the vision tower."""
        tower = [p for name, p in self.named_parameters() if "vision_tower" in name and p.requires_grad]
        tower_ids = {id(p) for p in tower}
        yield [p for p in self.parameters() if p.requires_grad and id(p) not in tower_ids], self.optim.lr
        rate = self.optim.lr if self.optim.vision_lr is None else self.optim.vision_lr
        if tower and rate:
            yield tower, rate
        else:
            for parameter in tower:
                parameter.requires_grad_(False)

    def _optimization(self) -> tuple[Any, Any]:
        """The optimizer and its schedule, untyped: Lightning's accessors return lists if there are several."""
        return self.optimizers(), self.lr_schedulers()

    def _clip(self) -> Tensor:
        """Clip the global gradient norm and return its value before clipping."""
        limit = math.inf if self.optim.clip_norm is None else self.optim.clip_norm
        return full_tensor(torch.nn.utils.clip_grad_norm_(self.parameters(), limit))

    def _skip(self, batch: Batch, sums: dict[str, Tensor]) -> None:
        """Count a skipped step. Raises Diverged, on all ranks, after more than `max_skipped` consecutive ones."""
        self._counts.clear()
        self.num_skipped, self._consecutive_skips = self.num_skipped + 1, self._consecutive_skips + 1
        self.log("train/skipped", float(self.num_skipped))
        finite = all(bool(value.isfinite()) for value in sums.values())
        # of each rank, its keys if its loss is not finite
        suspects = gather([] if finite else [str(key) for key in batch.keys])
        keys = [key for part in suspects for key in part] or [str(key) for part in gather(batch.keys) for key in part]
        message = f"the gradients are not finite after step {self.trainer.global_step} (samples {', '.join(keys[:8])}"
        message += ", ...)" if len(keys) > 8 else ")"
        if self._consecutive_skips > self.optim.max_skipped:
            advice = "lower optim.lr, or go back to an older checkpoint"
            raise Diverged(f"{message}, {self._consecutive_skips} times in a row: {advice}")
        if rank() == 0:
            log.warning("%s: the step is skipped", message)

    def noise(self, batch: Batch, draw: str | int) -> Noise:
        """The random numbers of a draw (a name, or a view) for each row: a function of seed, pass, key and draw."""
        return Noise(batch.keys, seed=self.seed, passes=batch.passes, draw=draw)

    def _count(self, logits: Tensor, state: Corrupted, at: tuple[Tensor, ...], terms: tuple[Term, ...]) -> None:
        """Count the correctly predicted tokens of each kind that the terms cover."""
        correct = torch.zeros_like(state.tokens, dtype=torch.bool)
        correct[at] = self.special.argmax(logits) == state.target[at]
        for kind in dict.fromkeys(kind for term in terms for kind in term.kinds):
            of_kind = state.where(kind)
            self.tally(f"accuracy/{kind.name.lower()}", correct & of_kind, of_kind)

    def _logged(
        self, sums: dict[str, Tensor], totals: dict[str, Tensor], micro_batches: list[tuple[Batch, list[Corrupted]]]
    ) -> Tensor:
        """(3 T + 2 C,) float64, of the T terms in `sums` and the C counts: their denominators; over all ranks, their
        positions in the batch and their sums; and (hits, tries) of each count."""
        states = [state for _, corrupted in micro_batches for state in corrupted]
        terms = [term for term in self.terms if term.name in sums]
        positions = [torch.stack([term.where(state).sum() for state in states]).sum() for term in terms]
        values = [*positions, *(sums[term.name] for term in terms), *(n for c in self._counts.values() for n in c)]
        shared = all_reduce_sum(torch.stack([value.double() for value in values]))
        return torch.cat([torch.stack([totals[term.name].double() for term in terms]), shared])

    def _log(
        self, stage: str, logged: list[float], names: list[str], micro_batches: list[tuple[Batch, list[Corrupted]]]
    ) -> None:
        """Log, of `_logged`, the terms that have positions in the batch, their weighted sum, and the counts."""
        terms = [term for term in self.terms if term.name in names]
        size = len(terms)
        totals, positions, sums = (logged[i * size : (i + 1) * size] for i in range(3))
        losses = {term.name: value / total for term, value, total in zip(terms, sums, totals, strict=True)}
        # sums: for positions chosen after the corruption
        shown = [t.name for t, number, value in zip(terms, positions, sums, strict=True) if number > 0 or value != 0]
        hits, tries = logged[3 * size :: 2], logged[3 * size + 1 :: 2]
        shares = shares_of(dict(zip(self._counts, zip(hits, tries, strict=True), strict=True)))
        self._counts.clear()
        num_rows = sum(len(rows) for rows, _ in micro_batches)
        loss = sum(term.coef * losses[term.name] for term in terms)
        self._log_values(stage, {"loss": loss}, batch_size=num_rows, prog_bar=True)
        self._log_values(stage, {f"loss/{name}": losses[name] for name in shown} | shares, batch_size=num_rows)

    def _log_values(self, stage: str, values: dict[str, float], **options: Any) -> None:
        # NOTE: Lightning would copy numbers to the device, one by one
        self.log_dict({f"{stage}/{name}": torch.tensor(value) for name, value in values.items()}, **options)


def detached(prefix: Prefix) -> Prefix:
    """The prefix with detached leaf tensors, which accumulate the gradients of all passes."""
    leaf = lambda tensor: tensor.detach().requires_grad_(tensor.requires_grad)  # noqa: E731
    cache = prefix.cache and [(leaf(keys), leaf(values)) for keys, values in prefix.cache]
    return Prefix(leaf(prefix.embeds), prefix.mask, cache, None if prefix.last is None else leaf(prefix.last))


def propagate(prefix: Prefix, leaves: Prefix) -> None:
    """Run the backward of `prefix` from the gradients accumulated in its `leaves`."""
    pairs = [(a, b.grad) for a, b in zip(_tensors(prefix), _tensors(leaves), strict=True) if b.grad is not None]
    if pairs:
        tensors, gradients = zip(*pairs, strict=True)
        torch.autograd.backward(tensors, gradients)


def _tensors(prefix: Prefix) -> list[Tensor]:
    tensors = [prefix.embeds, prefix.last, *(tensor for pair in prefix.cache or () for tensor in pair)]
    return [tensor for tensor in tensors if tensor is not None]


def _summed(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Each term summed over the micro-batches."""
    return {name: sum(part[name] for part in parts) for name in parts[0]}  # type: ignore[misc]
