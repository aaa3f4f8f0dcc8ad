"""Base class of all objectives: training step, loss reduction, optimizer, logging.

    batch -> micro-batches -> corrupt (no network) -> total denominators -> losses and backward per pass -> one step

Denominators are summed over all micro-batches before any division, so the micro-batch size affects only memory.
A subclass supplies a corruption and its loss terms; one with several forward passes overrides `passes`.

The backward of each pass runs before the next forward, so extra views and passes cost time but no memory. It stops at
the prefix, which accumulates the gradients of all passes; the backward through the prefix encoder runs last.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from src.diffusion import corruption
from src.diffusion.losses import Term, denominator, positions_of, term_loss
from src.diffusion.noise import Noise
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
from src.objectives.optim import Training
from src.types import Batch, Corrupted, Corruption, Kind, Loss, Prefix, SpecialIds

log = logging.getLogger(__name__)
WRONG = (Kind.SYNTAX, Kind.HALLUCINATION, Kind.MISTAKE)


class Diverged(UserError):
    """Raised after `max_skipped` consecutive steps with non-finite gradients."""


class Objective(L.LightningModule):
    """Base of all objectives.

    backbone: factory that builds the network. If it has a method `fill(network)`, the network is on the meta device,
        and `fill` loads the weights after allocation: each rank loads its own shard
    special: special token ids; t_min: noise levels are uniform on [t_min, 1); seed: seed of the noise

    Raises UserError if there are no terms or t_min is outside [0, 1).
    """

    def __init__(
        self,
        *,
        backbone: Callable[[], nn.Module],
        special: SpecialIds,
        training: Training,
        corruption: Corruption,
        terms: tuple[Term, ...],
        t_min: float,
        seed: int,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.backbone: Any = backbone()  # an nn.Module that implements `src.types.Backbone`
        self._fill: Callable[[nn.Module], None] | None = getattr(backbone, "fill", None)
        if not terms:
            raise UserError("the objective trains nothing: all coefficients are 0")
        if training.checkpointing != "none":
            self.backbone.checkpoint(training.checkpointing)
        if training.compile:
            self.backbone.compile_blocks()
        if not 0 <= t_min < 1:
            raise UserError(f"t_min must be at least 0 and less than 1, got {t_min}")
        self.special, self.options = special, training
        self.corruption, self.terms, self.t_min, self.seed = corruption, terms, t_min, seed
        self._counts: dict[str, Tensor] = {}  # (hits, tries) of each logged share since the last log
        self.num_skipped = self._consecutive_skips = 0  # steps with non-finite gradients

    def losses(self, batch: Batch, corrupted: list[Corrupted]) -> Iterator[dict[str, Loss]]:
        """Yield the losses of one micro-batch, one dict per pass; `corrupted` has one corrupted response per view.

        WARN: call backward on each dict before taking the next; exhausting the iterator runs the prefix's backward.
        """
        prefix = self.backbone.encode_prefix(batch.prefix)
        leaves = detached(prefix)
        for view, state in enumerate(corrupted):
            yield from self.passes(batch, leaves, state, self._noise(batch, f"{view}/passes"))
        propagate(prefix, leaves)

    def passes(self, batch: Batch, prefix: Prefix, state: Corrupted, noise: Noise) -> Iterator[dict[str, Loss]]:
        """Yield the losses of each forward pass over one view. noise: for draws that depend on the network's output."""
        yield self.one_pass(batch, prefix, state, self.terms)

    def corrupt(self, batch: Batch) -> list[Corrupted]:
        """One corrupted response per view; a pure function of seed, epoch, key and view."""
        return [self.corrupt_view(batch, view) for view in range(self.options.views)]

    def corrupt_view(self, batch: Batch, view: int) -> Corrupted:
        noise = self._noise(batch, view)
        level = noise.level(self.t_min, device=batch.response.device)
        if self.options.antithetic:
            offset = self._noise(batch, "levels").level(device=level.device)
            level = self.t_min + (1 - self.t_min) * ((offset + view / self.options.views) % 1)
        return self.corruption(batch, corruption.start(batch, level), noise)

    def one_pass(self, batch: Batch, prefix: Prefix, state: Corrupted, terms: tuple[Term, ...]) -> dict[str, Loss]:
        """Run the network once, with logits only at the positions of `terms`, and reduce each term."""
        where = positions_of(terms, state)  # (B, L)
        return self.reduce(self.logits(batch, prefix, state, where), where, state, terms)

    def logits(self, batch: Batch, prefix: Prefix, state: Corrupted, where: Tensor) -> Tensor:
        """(N, V) float32 at the true positions of `where` (B, L)."""
        return self.backbone(prefix, state.tokens, attend=attended(batch), positions=where).float()

    def reduce(self, logits: Tensor, where: Tensor, state: Corrupted, terms: tuple[Term, ...]) -> dict[str, Loss]:
        """Losses from logits (N, V) at the true positions of `where` (B, L), which must cover those of `terms`."""
        cross_entropy = torch.zeros(where.shape, device=where.device, dtype=logits.dtype)
        cross_entropy[where] = F.cross_entropy(logits, state.target[where], reduction="none")
        self._count(logits, state, where, terms)
        return {term.name: term_loss(term, cross_entropy, state) for term in terms}

    def tally(self, name: str, hits: Tensor, tries: Tensor) -> None:
        """Add to the counts of the share hits / tries, which the next log reports as `<stage>/<name>`."""
        self._counts[name] = self._counts.get(name, 0) + torch.stack([hits.sum(), tries.sum()])

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        micro_batches = [(rows, self.corrupt(rows)) for rows in batch.split(self.options.micro_batch or len(batch))]
        totals = self._totals(micro_batches)
        global_totals = _all_reduce(totals)
        optimizer, schedule = self._optimization()
        optimizer.zero_grad()
        passes: list[dict[str, Loss]] = []
        for rows, corrupted in micro_batches:
            for losses in self.losses(rows, corrupted):
                # gradients are averaged over ranks, but the denominators are already sums over ranks
                self.manual_backward(world_size() * self._weighted(_shares(losses, global_totals)))
                passes.append({name: Loss(loss.numerator.detach(), loss.denominator) for name, loss in losses.items()})
                losses.clear()  # frees the graph of this pass before the next forward
        average_gradients(self.parameters())
        sums = _summed(passes)
        self._check_totals(totals, sums)
        norm = self._clip()
        if not norm.isfinite():
            optimizer.zero_grad()
            self._skip(batch, sums)
            return
        self._consecutive_skips = 0
        optimizer.step()
        schedule.step()
        self._log_losses("train", sums, global_totals, micro_batches)
        self.log_dict({"train/grad_norm": norm, "train/lr": optimizer.param_groups[0]["lr"]})

    def configure_model(self) -> None:
        """Shard the backbone over the ranks if the strategy has a device mesh (called by Lightning).

        Raises UserError if the objective has parameters outside the backbone.
        """
        if self.device_mesh is None or is_sharded(self.backbone):
            return
        replicas, mesh = self.device_mesh["data_parallel"], self.device_mesh
        mesh = replicas if mesh.size() == replicas.size() else mesh
        (self.options.sharding or Sharding()).apply(self.backbone, mesh, precision=self.trainer.precision)
        if unsharded := [name for name, parameter in self.named_parameters() if not isinstance(parameter, DTensor)]:
            raise UserError(f"{', '.join(unsharded)}: outside the backbone, so not sharded; use parallel/ddp")
        if self._fill:
            self.backbone.to_empty(device=self.device)
            self._fill(self.backbone)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Align Lightning's log step with optimizer steps: it also counts skipped steps, and one extra on resuming."""
        self.trainer.fit_loop.epoch_loop._batches_that_stepped = self.trainer.global_step

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["num_skipped"] = self.num_skipped

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.num_skipped = checkpoint.get("num_skipped", 0)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        corrupted = self.corrupt(batch)
        micro_batches = [(batch, corrupted)]
        totals = self._totals(micro_batches)
        sums = _summed(list(self.losses(batch, corrupted)))
        self._check_totals(totals, sums)
        self._log_losses("val", sums, _all_reduce(totals), micro_batches)

    def make_optimizer(self) -> torch.optim.AdamW:
        """AdamW over the trainable parameters; freezes the vision tower if its learning rate is 0."""
        groups = [{"params": list(parameters), "lr": lr} for parameters, lr in self._groups()]
        betas = (self.options.betas[0], self.options.betas[1])
        return torch.optim.AdamW(groups, betas=betas, weight_decay=self.options.weight_decay)

    def configure_optimizers(self) -> Any:
        options, optimizer = self.options, self.make_optimizer()
        total = self.trainer.max_steps
        if total < 1:
            raise UserError(f"trainer.max_steps must be set, as the learning rate schedule depends on it, got {total}")
        if options.warmup_steps > total:
            raise UserError(
                f"objective.training.warmup_steps={options.warmup_steps} is more than trainer.max_steps={total}"
            )
        _init_state(optimizer)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: options.factor(step, total))
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def _groups(self) -> Iterator[tuple[list[nn.Parameter], float]]:
        """Yield (parameters, learning rate) of everything but the vision tower, then of the vision tower."""
        tower = [p for name, p in self.named_parameters() if "vision_tower" in name and p.requires_grad]
        tower_ids = {id(p) for p in tower}
        yield [p for p in self.parameters() if p.requires_grad and id(p) not in tower_ids], self.options.lr
        rate = self.options.lr if self.options.vision_lr is None else self.options.vision_lr
        if tower and rate:
            yield tower, rate
        else:
            for parameter in tower:
                parameter.requires_grad_(False)

    def _totals(self, micro_batches: list[tuple[Batch, list[Corrupted]]]) -> dict[str, Tensor]:
        """Each term's denominator over the whole batch of this rank."""
        states = [state for _, corrupted in micro_batches for state in corrupted]
        return {term.name: torch.stack([denominator(term, state) for state in states]).sum() for term in self.terms}

    def _check_totals(self, totals: dict[str, Tensor], sums: dict[str, Loss]) -> None:
        """Raises ValueError if a denominator of `losses` differs from the one computed before the forward calls."""
        actual = torch.stack([loss.denominator.to(totals[name].device) for name, loss in sums.items()])
        expected = torch.stack([totals[name] for name in sums])
        for name, total, value in zip(sums, expected.tolist(), actual.tolist(), strict=True):
            if value != total:
                raise ValueError(
                    f"term {name!r}: losses() returns the denominator {value}, but the corrupted batch gives {total}; "
                    "'tokens' cannot reduce a term whose positions are chosen after the corruption"
                )

    def _weighted(self, values: dict[str, Tensor]) -> Tensor:
        """Sum of the terms in `values`, each times its coefficient."""
        return torch.stack([term.coef * values[term.name] for term in self.terms if term.name in values]).sum()

    def _optimization(self) -> tuple[Any, Any]:
        """The optimizer and its schedule, untyped: Lightning's accessors return lists if there are several."""
        return self.optimizers(), self.lr_schedulers()

    def _clip(self) -> Tensor:
        """Clip the global gradient norm and return its value before clipping."""
        limit = math.inf if self.options.clip_norm is None else self.options.clip_norm
        return full_tensor(torch.nn.utils.clip_grad_norm_(self.parameters(), limit))

    def _skip(self, batch: Batch, sums: dict[str, Loss]) -> None:
        """Count a skipped step. Raises Diverged, on all ranks, after more than `max_skipped` consecutive ones."""
        self._counts.clear()
        self.num_skipped, self._consecutive_skips = self.num_skipped + 1, self._consecutive_skips + 1
        self.log("train/skipped", float(self.num_skipped))
        finite = all(bool(loss.numerator.isfinite()) for loss in sums.values())
        # of each rank, its keys if its loss is not finite
        suspects = gather([] if finite else [str(key) for key in batch.keys])
        keys = [key for part in suspects for key in part] or [str(key) for part in gather(batch.keys) for key in part]
        message = f"the gradients are not finite after step {self.trainer.global_step} (samples {_shortened(keys)})"
        if self._consecutive_skips > self.options.max_skipped:
            raise Diverged(
                f"{message}, {self._consecutive_skips} times in a row: lower objective.training.lr, or go back to an "
                "older checkpoint"
            )
        if rank() == 0:
            log.warning("%s: the step is skipped", message)

    def _noise(self, batch: Batch, draw: str | int) -> Noise:
        return Noise(batch.keys, seed=self.seed, epoch=batch.epoch, draw=draw)

    def _count(self, logits: Tensor, state: Corrupted, where: Tensor, terms: tuple[Term, ...]) -> None:
        """Count the correctly predicted tokens of each kind that the terms cover."""
        correct = torch.zeros_like(where)
        correct[where] = logits.detach().argmax(-1) == state.target[where]
        for kind in dict.fromkeys(kind for term in terms for kind in term.kinds):
            of_kind = state.where(kind)
            self.tally(f"accuracy/{kind.name.lower()}", correct & of_kind, of_kind)

    def _log_losses(
        self,
        stage: str,
        losses: dict[str, Loss],
        totals: dict[str, Tensor],
        micro_batches: list[tuple[Batch, list[Corrupted]]],
    ) -> None:
        """Log, over all ranks, the terms that have positions in the batch, their weighted sum, and the counts."""
        num_rows = sum(len(rows) for rows, _ in micro_batches)
        states = [state for _, corrupted in micro_batches for state in corrupted]
        terms = [term for term in self.terms if term.name in losses]
        num_positions = torch.stack(
            [torch.stack([term.where(state).sum() for state in states]).sum() for term in terms]
        )
        sums = torch.stack([losses[term.name].numerator.detach() for term in terms])
        num_positions, sums = all_reduce_sum(torch.stack([num_positions.to(sums), sums]))
        values = {term.name: value / totals[term.name].clamp(min=1) for term, value in zip(terms, sums, strict=True)}
        has_positions = ((num_positions > 0) | (sums != 0)).tolist()  # sums: for positions chosen after the corruption
        names = [term.name for term, shown in zip(terms, has_positions, strict=True) if shown]
        self.log_dict({f"{stage}/{name}": values[name] for name in names}, batch_size=num_rows)
        self.log(f"{stage}/loss", self._weighted(values), batch_size=num_rows, prog_bar=True)
        self._log_counts(stage, num_rows)

    def _log_counts(self, stage: str, num_rows: int) -> None:
        """Log the accuracy of each kind, P(keep | clean), P(fix | wrong) and other shares over all passes of a step."""
        counts = all_reduce_sum(torch.stack(list(self._counts.values()))) if self._counts else torch.zeros(0)
        shares = dict(zip(self._counts, counts.tolist(), strict=True))
        self._counts.clear()
        accuracy = {kind: shares.get(f"accuracy/{kind.name.lower()}") for kind in Kind}
        if kept := accuracy[Kind.CLEAN]:
            shares["p_keep_clean"] = kept
        if wrong := [accuracy[kind] for kind in WRONG if accuracy[kind]]:
            shares["p_fix_wrong"] = [sum(column) for column in zip(*wrong, strict=True)]
        values = {f"{stage}/{name}": hits / tries for name, (hits, tries) in shares.items() if tries}
        self.log_dict(values, batch_size=num_rows)


def _init_state(optimizer: torch.optim.AdamW) -> None:
    """Create the state of every parameter now: a checkpoint that lacks that of unused parameters cannot be loaded."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}


def _shortened(keys: list[str]) -> str:
    return ", ".join(keys[:8]) + (", ..." if len(keys) > 8 else "")


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


def attended(batch: Batch) -> Tensor | None:
    """Attention mask of the response, (B, L) bool, or None if no row is padded."""
    return None if bool(batch.editable.all()) else batch.editable


def _all_reduce(totals: dict[str, Tensor]) -> dict[str, Tensor]:
    """The denominators summed over all ranks."""
    return dict(zip(totals, all_reduce_sum(torch.stack(list(totals.values()))), strict=True))


def _shares(losses: dict[str, Loss], totals: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contribution of each term to its mean over the whole batch."""
    return {name: loss.numerator / totals[name].clamp(min=1) for name, loss in losses.items()}


def _summed(passes: list[dict[str, Loss]]) -> dict[str, Loss]:
    """Each term summed over all passes and micro-batches."""
    names = dict.fromkeys(name for losses in passes for name in losses)
    return {name: _add([losses[name] for losses in passes if name in losses]) for name in names}


def _add(losses: list[Loss]) -> Loss:
    return Loss(sum(loss.numerator for loss in losses), sum(loss.denominator for loss in losses))  # type: ignore[arg-type]
