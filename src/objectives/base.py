"""What every objective shares: the training step, the reduction of losses, the optimizer, the logged numbers.

    batch -> micro-batches -> corrupt (no network) -> totals of the denominators -> losses, backward -> ... -> one step

The denominators are added over micro-batches before anything is divided, so the micro-batch size changes memory and
nothing else. A subclass fills the table (a corruption and its terms); one that needs more passes overrides `passes`.

Each pass is propagated back before the next one runs, so views and passes cost time and no memory: a pass ends at the
prefix, which adds up what all of them say of it and is propagated back last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from src.batch import Batch, Corrupted, Corruption, Kind, Loss, Prefix, SpecialIds
from src.diffusion import corruption
from src.diffusion.losses import Term, denominator, positions_of, term_loss
from src.diffusion.noise import Noise
from src.parallel import Sharding, average_gradients, is_sharded, summed, world

WRONG = (Kind.SYNTAX, Kind.HALLUCINATION, Kind.MISTAKE)


@dataclass(frozen=True, kw_only=True)
class Training:
    """AdamW and its schedule (linear warm-up, constant, decay to zero), and how a step is cut up.

    lr: peak learning rate; vision_lr: that of the vision tower (None: the same; 0: frozen)
    decay: `cosine` (from the end of the warm-up) or the share in 0..1 of the steps that decay linearly at the end
    views: noise draws per sample and step, which share one encoded prefix
    antithetic: spread the noise levels of a sample's views evenly (two views: t and t + 1/2, wrapped) instead of
        drawing each. Rows of a batch stay independent: noise belongs to a sample, whatever batch it is in
    micro_batch: rows in a forward pass (None: all); changes memory, not the result
    checkpointing: activations of the model's blocks: `none` keeps them for the backward pass, `full` computes them a
        second time, `selective` keeps only results of matrix products and attention
    sharding: how FSDP2 shares the model, where the trainer's strategy is `src.parallel.FSDP2`
    """

    lr: float
    vision_lr: float | None = None
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.0
    warmup_steps: int = 0
    decay: float | str = "cosine"
    clip_norm: float | None = 1.0
    views: int = 1
    antithetic: bool = False
    micro_batch: int | None = None
    checkpointing: str = "none"
    sharding: Sharding | None = None

    def __post_init__(self) -> None:
        least = {"lr": self.lr, "vision_lr": self.vision_lr, "weight_decay": self.weight_decay}
        least |= {"warmup_steps": self.warmup_steps, "clip_norm": self.clip_norm}
        for name, value in least.items():
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"objective.training.{name} must be a finite number of at least 0, got {value}")
        for name, value, otherwise in (("lr", self.lr, ""), ("clip_norm", self.clip_norm, " (null: no clipping)")):
            if value == 0:
                raise ValueError(f"objective.training.{name} must be more than 0{otherwise}, got {value}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"objective.training.betas must be at least 0 and less than 1, got {list(self.betas)}")
        if self.decay != "cosine" and not (isinstance(self.decay, int | float) and 0 <= self.decay <= 1):
            raise ValueError(f"decay must be 'cosine' or a share within 0..1, got {self.decay!r}")
        if self.antithetic and self.views < 2:
            raise ValueError("antithetic noise levels are those of one sample: they need views of at least 2")
        if self.views < 1 or (self.micro_batch is not None and self.micro_batch < 1):
            raise ValueError(f"views and micro_batch must be at least 1, got {self.views} and {self.micro_batch}")

    def factor(self, step: int, total: int) -> float:
        """The learning rate's factor at an optimizer step of `total`."""
        warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
        if self.decay == "cosine":
            done = (step - self.warmup_steps) / max(1, total - self.warmup_steps)
            return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, done))))
        length = float(self.decay) * total
        return warm * (min(1.0, (total - step) / length) if length else 1.0)


class Diverged(RuntimeError):
    """Training has left the numbers that it can compute with."""


class Objective(L.LightningModule):
    """Base of all objectives.

    backbone: a factory of the network; special: token ids; t_min: noise levels are uniform on [t_min, 1);
    seed: of the noise.
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
        self.backbone: Any = backbone()  # an nn.Module that obeys `src.batch.Backbone`
        if not terms:
            raise ValueError("the objective trains nothing: all coefficients are 0")
        if training.checkpointing != "none":
            self.backbone.checkpoint(training.checkpointing)
        if not 0 <= t_min < 1:
            raise ValueError(f"t_min must be at least 0 and less than 1, got {t_min}")
        self.special, self.options = special, training
        self.corruption, self.terms, self.t_min, self.seed = corruption, terms, t_min, seed
        self._counts: dict[str, Tensor] = {}  # hits and tries of what is logged as a share, since the last log

    def losses(self, batch: Batch, corrupted: list[Corrupted]) -> Iterator[dict[str, Loss]]:
        """The terms of one micro-batch, one dict for each pass; `corrupted` has one damaged response per view.

        WARN: propagate back what is yielded before asking for more. Once all are, this goes on through the prefix.
        """
        prefix = self.backbone.encode_prefix(batch.prefix)
        leaves = detached(prefix)
        for view, state in enumerate(corrupted):
            yield from self.passes(batch, leaves, state, self._noise(batch, f"{view}/passes"))
        propagate(prefix, leaves)

    def passes(self, batch: Batch, prefix: Prefix, state: Corrupted, noise: Noise) -> Iterator[dict[str, Loss]]:
        """The terms of each forward pass over one view. `noise`: for what the corruption could not know."""
        yield self.one_pass(batch, prefix, state, self.terms)

    def corrupt(self, batch: Batch) -> list[Corrupted]:
        """One damaged response per view; a pure function of seed, epoch, key and view."""
        return [self.damage(batch, view) for view in range(self.options.views)]

    def damage(self, batch: Batch, view: int) -> Corrupted:
        """The damaged response of one view."""
        noise = self._noise(batch, view)
        level = noise.level(self.t_min, device=batch.response.device)
        if self.options.antithetic:
            first = self._noise(batch, "levels").level(device=level.device)
            level = self.t_min + (1 - self.t_min) * ((first + view / self.options.views) % 1)
        return self.corruption(batch, corruption.start(batch, level), noise)

    def one_pass(self, batch: Batch, prefix: Prefix, state: Corrupted, terms: tuple[Term, ...]) -> dict[str, Loss]:
        """Run the network once and reduce each term. Logits only where a term looks."""
        where = positions_of(terms, state)  # (B, L)
        return self.reduce(self.logits(batch, prefix, state, where), where, state, terms)

    def logits(self, batch: Batch, prefix: Prefix, state: Corrupted, where: Tensor) -> Tensor:
        """(N, V) float32 at the true places of `where` (B, L)."""
        return self.backbone(prefix, state.tokens, attend=attended(batch), positions=where).float()

    def reduce(self, logits: Tensor, where: Tensor, state: Corrupted, terms: tuple[Term, ...]) -> dict[str, Loss]:
        """The terms of logits (N, V) at the true places of `where` (B, L), which covers what the terms look at."""
        cross_entropy = torch.zeros(where.shape, device=where.device, dtype=logits.dtype)
        cross_entropy[where] = F.cross_entropy(logits, state.target[where], reduction="none")
        self._count(logits, state, where, terms)
        return {term.name: term_loss(term, cross_entropy, state) for term in terms}

    def tally(self, name: str, hits: Tensor, tries: Tensor) -> None:
        """Add to a share that the next log shows as `<stage>/<name>`."""
        self._counts[name] = self._counts.get(name, 0) + torch.stack([hits.sum(), tries.sum()])

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        micro = [(part, self.corrupt(part)) for part in batch.split(self.options.micro_batch or len(batch))]
        totals = self._totals(micro)
        shared = _over_ranks(totals)
        optimizer, schedule = self._optimization()
        optimizer.zero_grad()
        found: list[dict[str, Loss]] = []
        with self._own_gradients():
            for rows, corrupted in micro:
                for losses in self.losses(rows, corrupted):
                    self.manual_backward(world() * self._weighted(_shares(losses, shared)))  # ranks are averaged
                    found.append(
                        {name: Loss(part.numerator.detach(), part.denominator) for name, part in losses.items()}
                    )
                    losses.clear()  # frees the pass before the next one runs
        average_gradients(self.parameters())
        sums = _summed(found)
        self._check_totals(totals, sums)
        norm = self._clip(batch)
        optimizer.step()
        schedule.step()
        self._log_losses("train", sums, shared, micro)
        self.log_dict({"train/grad_norm": norm, "train/lr": optimizer.param_groups[0]["lr"]})

    def configure_model(self) -> None:
        """Share the backbone among the ranks, where the strategy has a mesh for it (Lightning calls this)."""
        if self.device_mesh is not None and not is_sharded(self.backbone):
            (self.options.sharding or Sharding()).apply(self.backbone, self.device_mesh["data_parallel"])

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        micro = [(batch, self.corrupt(batch))]
        totals = self._totals(micro)
        sums = _summed(list(self.losses(*micro[0])))
        self._check_totals(totals, sums)
        self._log_losses("val", sums, _over_ranks(totals), micro)

    def make_optimizer(self) -> torch.optim.Optimizer:
        """AdamW over what is trained; freezes the rest."""
        groups = [{"params": list(parameters), "lr": lr} for parameters, lr in self._groups()]
        betas = (self.options.betas[0], self.options.betas[1])
        return torch.optim.AdamW(groups, betas=betas, weight_decay=self.options.weight_decay)

    def configure_optimizers(self) -> Any:
        options, optimizer = self.options, self.make_optimizer()
        total = self.trainer.max_steps
        if total < 1:
            raise ValueError(f"trainer.max_steps must be given: the schedule is defined on it, got {total}")
        if options.warmup_steps > total:
            raise ValueError(
                f"objective.training.warmup_steps={options.warmup_steps} is more than trainer.max_steps={total}"
            )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: options.factor(step, total))
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def _groups(self) -> Iterator[tuple[list[nn.Parameter], float]]:
        """(parameters, learning rate): everything but the vision tower, then the vision tower."""
        tower = [p for name, p in self.named_parameters() if "vision_tower" in name and p.requires_grad]
        known = {id(p) for p in tower}
        yield [p for p in self.parameters() if p.requires_grad and id(p) not in known], self.options.lr
        rate = self.options.lr if self.options.vision_lr is None else self.options.vision_lr
        if tower and rate:
            yield tower, rate
        else:
            for parameter in tower:
                parameter.requires_grad_(False)

    def _totals(self, micro: list[tuple[Batch, list[Corrupted]]]) -> dict[str, Tensor]:
        """Each term's denominator over the whole batch."""
        states = [state for _, corrupted in micro for state in corrupted]
        return {term.name: torch.stack([denominator(term, state) for state in states]).sum() for term in self.terms}

    def _own_gradients(self) -> AbstractContextManager:
        """Within it DDP leaves gradients alone: a step has several backward passes, and none meets all parameters."""
        model = self.trainer.model
        return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()

    def _check_totals(self, totals: dict[str, Tensor], sums: dict[str, Loss]) -> None:
        """Raise ValueError where a term divides by something else than was known before it ran."""
        given_sums = torch.stack([loss.denominator.to(totals[name].device) for name, loss in sums.items()])
        known = torch.stack([totals[name] for name in sums])
        for name, total, given in zip(sums, known.tolist(), given_sums.tolist(), strict=True):
            if given != total:
                raise ValueError(
                    f"term {name!r}: losses() returns the denominator {given}, but what the corruption has made of the "
                    f"batch gives {total}; for positions that come later take another reduce than 'tokens'"
                )

    def _weighted(self, values: dict[str, Tensor]) -> Tensor:
        """The sum of the terms that are there with their coefficients."""
        return torch.stack([term.coef * values[term.name] for term in self.terms if term.name in values]).sum()

    def _optimization(self) -> tuple[Any, Any]:
        """The optimizer and its schedule; Lightning's accessors return lists where there are several."""
        return self.optimizers(), self.lr_schedulers()

    def _clip(self, batch: Batch) -> Tensor:
        """Clip the global norm and return it. Raises Diverged where it is not finite: the step would be ruin."""
        limit = math.inf if self.options.clip_norm is None else self.options.clip_norm
        norm = torch.nn.utils.clip_grad_norm_(self.parameters(), limit)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if not norm.isfinite():
            keys = ", ".join(map(str, batch.keys[:8])) + (", ..." if len(batch) > 8 else "")
            raise Diverged(
                f"the gradients are not finite at step {self.trainer.global_step} (samples {keys}): "
                "lower objective.training.lr, or go back to an older checkpoint"
            )
        return norm

    def _noise(self, batch: Batch, draw: str | int) -> Noise:
        return Noise(batch.keys, seed=self.seed, epoch=batch.epoch, draw=draw)

    def _count(self, logits: Tensor, state: Corrupted, where: Tensor, terms: tuple[Term, ...]) -> None:
        """Add up how many tokens of each kind were right, where the terms look."""
        right = torch.zeros_like(where)
        right[where] = logits.detach().argmax(-1) == state.target[where]
        for kind in dict.fromkeys(kind for term in terms for kind in term.kinds):
            here = state.where(kind)
            self.tally(f"accuracy/{kind.name.lower()}", right & here, here)

    def _log_losses(
        self, stage: str, losses: dict[str, Loss], totals: dict[str, Tensor], micro: list[tuple[Batch, list[Corrupted]]]
    ) -> None:
        """Log the terms that the batch has positions for, and the sum of all; then what `_log_counts` does.

        All numbers are those of the whole batch, of all ranks.
        """
        rows = sum(len(part) for part, _ in micro)
        states = [state for _, corrupted in micro for state in corrupted]
        ran = [term for term in self.terms if term.name in losses]
        there = torch.stack([torch.stack([term.where(state).sum() for state in states]).sum() for term in ran])
        sums = torch.stack([losses[term.name].numerator.detach() for term in ran])
        there, sums = summed(torch.stack([there.to(sums), sums]))
        values = {term.name: value / totals[term.name].clamp(min=1) for term, value in zip(ran, sums, strict=True)}
        real = ((there > 0) | (sums != 0)).tolist()  # also of positions that came later
        shown = [term.name for term, some in zip(ran, real, strict=True) if some]
        self.log_dict({f"{stage}/{name}": values[name] for name in shown}, batch_size=rows)
        self.log(f"{stage}/loss", self._weighted(values), batch_size=rows, prog_bar=True)
        self._log_counts(stage, rows)

    def _log_counts(self, stage: str, rows: int) -> None:
        """Accuracy of each kind, P(keep | clean), P(fix | wrong) and other shares, over all passes of a step."""
        counts = summed(torch.stack(list(self._counts.values()))) if self._counts else torch.zeros(0)
        shares = dict(zip(self._counts, counts.tolist(), strict=True))
        self._counts.clear()
        accuracy = {kind: shares.get(f"accuracy/{kind.name.lower()}") for kind in Kind}
        if kept := accuracy[Kind.CLEAN]:
            shares["p_keep_clean"] = kept
        if wrong := [accuracy[kind] for kind in WRONG if accuracy[kind]]:
            shares["p_fix_wrong"] = [sum(column) for column in zip(*wrong, strict=True)]
        values = {f"{stage}/{name}": right / total for name, (right, total) in shares.items() if total}
        self.log_dict(values, batch_size=rows)


def detached(prefix: Prefix) -> Prefix:
    """The same prefix as the start of a graph of its own: backward passes end there and add up."""
    leaf = lambda tensor: tensor.detach().requires_grad_(tensor.requires_grad)  # noqa: E731
    cache = prefix.cache and [(leaf(keys), leaf(values)) for keys, values in prefix.cache]
    return Prefix(leaf(prefix.embeds), prefix.mask, cache, None if prefix.last is None else leaf(prefix.last))


def propagate(prefix: Prefix, leaves: Prefix) -> None:
    """Go on backward, through what encoded `prefix`, with the gradients that have gathered at its `leaves`."""
    pairs = [(a, b.grad) for a, b in zip(_tensors(prefix), _tensors(leaves), strict=True) if b.grad is not None]
    if pairs:
        tensors, gradients = zip(*pairs, strict=True)
        torch.autograd.backward(tensors, gradients)


def _tensors(prefix: Prefix) -> list[Tensor]:
    found = [prefix.embeds, prefix.last, *(tensor for pair in prefix.cache or () for tensor in pair)]
    return [tensor for tensor in found if tensor is not None]


def attended(batch: Batch) -> Tensor | None:
    """(B, L) attention mask of the response, or None when no row is padded."""
    return None if bool(batch.editable.all()) else batch.editable


def _over_ranks(totals: dict[str, Tensor]) -> dict[str, Tensor]:
    """The denominators over the batches of all ranks."""
    return dict(zip(totals, summed(torch.stack(list(totals.values()))), strict=True))


def _shares(losses: dict[str, Loss], totals: dict[str, Tensor]) -> dict[str, Tensor]:
    """What each term adds to the mean of the whole batch."""
    return {name: loss.numerator / totals[name].clamp(min=1) for name, loss in losses.items()}


def _summed(found: list[dict[str, Loss]]) -> dict[str, Loss]:
    """The losses of all passes and micro-batches."""
    names = dict.fromkeys(name for losses in found for name in losses)
    return {name: _add([losses[name] for losses in found if name in losses]) for name in names}


def _add(losses: list[Loss]) -> Loss:
    return Loss(sum(loss.numerator for loss in losses), sum(loss.denominator for loss in losses))  # type: ignore[arg-type]
