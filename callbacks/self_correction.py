"""The online loop: before training and between epochs, the model drafts and an expert revises.

    callbacks: {self_correction: {target: callbacks.self_correction.SelfCorrection, rounds: 2, ...}}

    checkpoint -> datamodule.draft_dataloader(round, num) -> run_round (src/rounds/round.py) -> rounds/round-0001
               -> datamodule.add_round -> the next epoch trains on it

The number of epochs alone determines which rounds are due, so a resumed run makes up for missing ones, in the hook that
Lightning calls first: `on_train_start`, or `on_train_epoch_end` again if it resumes at the end of an epoch. A round
leaves the random state of training unchanged.

Needs a datamodule with `draft_settings`, `draft_dataloader`, `add_round` and `round_dataloader`, as
`datamodules.captions.ShardData` has them, `Trainer(reload_dataloaders_every_n_epochs=1)`, and `max_epochs=-1` if
`max_steps` is set: Lightning counts an epoch twice when it resumes at its end.

Each rank drafts for its own images and asks about its own drafts, and holds the whole model in memory during the round
(`src.distributed.parallel.gathered`). Drafts and rounds equal those of a single process.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities.seed import isolate_rng

from callbacks.checkpoint import save_as_last, write_atomically
from callbacks.ema import ema_of, weights_for
from src.cli.signals import Stop
from src.distributed.checkpoints import is_intact, remove
from src.distributed.parallel import Team, all_reduce_sum, gathered
from src.io.errors import UserError
from src.io.words import counted
from src.metrics.fixing import count_fixes
from src.models.hf.folder import fingerprint
from src.models.inference import evaluating
from src.rounds.drafts import Drafter, DraftSampler, cap_num_drafts
from src.rounds.round import EmptyRound, RoundOptions, charge, read_round, reopen, run_round, update_manifest
from src.rounds.stats import summary, yields
from src.text.tokenizer import Codec
from src.types import Expert, FailedRound, Round

logger = logging.getLogger(__name__)
NUM_FIX_BATCHES = 8  # batches of a finished round on which P(fix) and P(break) are measured
FIX_RATES = "one_look"  # their key in the manifest


class SelfCorrection(L.Callback):
    """Makes `rounds` rounds of `drafts_per_round` drafts each, at most one draft per training image.

    at_start: the first round comes before the first epoch; the others follow every `every_n_epochs` epochs
    tokens_per_step: speeds at which drafts are drawn; the samples of a round are split among them
    per_shard: samples in each shard of a round
    allow_empty: continue if no draft of a round was corrected; otherwise `EmptyRound` is raised
    patience_minutes: give up on an expert that has not answered for this long
    deadline_minutes: how long to wait for the expert after all drafts are drawn (None: until it has answered all); the
                      next round asks again about unanswered drafts and those with a temporary failure
    train_from: `newest` continues with the current weights; `start` restores, after each round but the first, the
                weights before the first round and trains them on all rounds. The current weights draft either way
    stop: signals interrupt a round at once; the same command continues it
    """

    def __init__(
        self,
        *,
        expert: Expert,
        sampler: DraftSampler,
        codec: Codec,
        run_dir: str | Path,
        tokens_per_step: Sequence[int],
        drafts_per_round: int,
        rounds: int = 1,
        every_n_epochs: int = 1,
        at_start: bool = True,
        per_shard: int = 512,
        allow_empty: bool = False,
        patience_minutes: float = 60.0,
        deadline_minutes: float | None = None,
        train_from: str = "newest",
        seed: int = 0,
        stop: Stop | None = None,
    ) -> None:
        super().__init__()
        if train_from not in ("newest", "start"):
            raise UserError(f"train_from must be newest or start, got {train_from!r}")
        numbers = {"drafts_per_round": drafts_per_round, "rounds": rounds, "every_n_epochs": every_n_epochs}
        numbers |= {"patience_minutes": patience_minutes, "deadline_minutes": deadline_minutes, "per_shard": per_shard}
        for name, number in numbers.items():
            if number is not None and not number > 0:
                raise UserError(f"{name} must be more than 0, got {number}")
        if expert is None:
            raise UserError("no expert is given: set expert=scenes, expert=reference or expert=openai")
        if not tokens_per_step:
            raise UserError("tokens_per_step must name at least one speed, got an empty list")
        for speed in tokens_per_step:
            sampler.with_steps(tokens_per_step=speed)  # a wrong value fails here, not at the first round
        self.expert, self.sampler, self.codec, self.run_dir = expert, sampler, codec, Path(run_dir)
        self.tokens_per_step, self.drafts_per_round = list(tokens_per_step), drafts_per_round
        self.rounds, self.every_n_epochs, self.at_start = rounds, every_n_epochs, at_start
        self.per_shard, self.allow_empty, self.seed = per_shard, allow_empty, seed
        self.patience, self.stop = 60 * patience_minutes, stop or Stop()
        self.deadline = None if deadline_minutes is None else 60 * deadline_minutes
        self.train_from = train_from
        self.num_done = 0
        self.saved_for = 0  # round before which the newest checkpoint was saved

    def state_dict(self) -> dict[str, Any]:
        return {"num_done": self.num_done, "saved_for": self.saved_for}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.num_done, self.saved_for = state_dict["num_done"], state_dict["saved_for"]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        reload_every = vars(trainer)["reload_dataloaders_every_n_epochs"]
        if reload_every != 1:
            raise UserError(f"online rounds need Trainer(reload_dataloaders_every_n_epochs=1), got {reload_every}")
        write_atomically(trainer)
        self._team = Team()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        count = _datamodule(trainer).draft_settings()["data_count"]
        name = "callbacks.self_correction.drafts_per_round"
        self.drafts_per_round = cap_num_drafts(self.drafts_per_round, count, name=name)
        for number in range(1, self.num_done + 1):  # before Lightning requests the first loader
            finished_round = read_round(self._folder(number))
            charge(self.expert, finished_round.manifest.get("usage", {}), self._team)
            self._add_to_training(trainer, finished_round)

        if self.train_from == "start" and 0 < self.num_done < self.rounds and not is_intact(self._checkpoint(1)):
            raise FailedRound(
                f"{self._checkpoint(1)} is missing or damaged, but train_from=start needs it for the next round; "
                "set resume=false to start over"
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if getattr(_datamodule(trainer), "epoch_batches", None):  # otherwise each round changes the length of an epoch
            self.check_length(
                max_epochs=trainer.max_epochs, max_steps=trainer.max_steps, steps=int(trainer.num_training_batches)
            )
        due = self._num_due(trainer.current_epoch)
        if self.num_done >= due:
            return
        while self.num_done < due:
            self._run(trainer, pl_module)
        with isolate_rng():
            # Lightning has already built the loader of this epoch, without the new round
            trainer.fit_loop._last_train_dl_reload_epoch = float("-inf")
            trainer.fit_loop.setup_data()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        epochs = trainer.max_epochs not in (None, -1) and trainer.current_epoch + 1 >= trainer.max_epochs
        steps = trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps
        is_last = epochs or steps or trainer.should_stop
        if self._num_due(trainer.current_epoch + 1) > self.num_done and not is_last:
            self._run(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.num_done < self.rounds and self._team.is_rank0:
            logger.warning("training ended after %d of %d rounds", self.num_done, self.rounds)

    def check_length(self, *, max_epochs: int | None, max_steps: int, steps: int) -> None:
        """Raise UserError if training ends before the last round is due. steps: optimizer steps in an epoch."""
        epochs = (self.rounds - self.at_start) * self.every_n_epochs  # before the last round
        if max_epochs is not None and 0 <= max_epochs <= epochs:
            raise UserError(
                f"rounds={self.rounds} needs more than {counted(epochs, 'epoch')}, but "
                f"max_epochs={max_epochs}; raise trainer.max_epochs, or lower rounds"
            )
        if max_steps != -1 and epochs * steps >= max_steps:
            longest = max_steps // (epochs + 1)  # steps in an epoch with which all rounds fit
            shorter_epochs = f"set data.epoch_batches={longest}, or " if longest else ""
            raise UserError(
                f"rounds={self.rounds} needs more than {counted(epochs, 'epoch')} of "
                f"{counted(steps, 'step')}, but max_steps={max_steps}; {shorter_epochs}lower rounds"
            )

    def _num_due(self, epochs: int) -> int:
        """Rounds that must be done after `epochs` epochs."""
        return min(self.rounds, self.at_start + epochs // self.every_n_epochs)

    def _folder(self, number: int) -> Path:
        return self.run_dir / "rounds" / f"round-{number:04d}"

    def _checkpoint(self, number: int) -> Path:
        return self.run_dir / "checkpoints" / f"pre-round-{number:04d}.ckpt"

    def _run(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        number = self.num_done + 1

        # 1. Save a checkpoint in place of the one before the previous round. Lightning would save only after this hook,
        #    so a kill during the round would repeat steps of the epoch. A run that has resumed from this checkpoint
        #    does not save it again: it would count the epoch twice.
        if self.saved_for < number:
            self.saved_for = number
            path = self._checkpoint(number)
            save_as_last(trainer, path)
            if trainer.is_global_zero:
                needed = {path, self._checkpoint(1)} if self.train_from == "start" else {path}
                for older in set(path.parent.glob("pre-round-*.ckpt")) - needed:
                    remove(older)

        # 2. Draft, ask the expert, and write the round.
        start = time.perf_counter()
        averaged = weights_for(trainer, "draft")  # outermost: a signal must not interrupt its return to raw weights
        with averaged, self.stop.at_once(), isolate_rng(), evaluating(pl_module):
            finished_round = self._round(number, _datamodule(trainer), pl_module)
        if self._team.is_rank0:
            logger.info("%s: %s", finished_round.path, summary(finished_round.manifest))

        # 3. Train on it.
        self._add_to_training(trainer, finished_round)
        self.num_done = number
        if number > 1 and self.train_from == "start":
            self._restore_start(trainer)
            if self._team.is_rank0:
                logger.info("training continues from the weights before the first round")
        metrics = round_metrics(finished_round.manifest) | {"round/seconds": time.perf_counter() - start}
        for log in trainer.loggers:
            log.log_metrics(metrics, step=trainer.global_step)

    def _round(self, number: int, datamodule: Any, pl_module: L.LightningModule) -> Round:
        """Make a round; its manifest then also has P(fix) and P(break) of the model that drafted it."""
        backbone: Any = pl_module.backbone
        drafter = Drafter(
            backbone=backbone,
            model=fingerprint(backbone),  # NOTE: before `gathered`, inside which a sharded model would hang
            sampler=self.sampler,
            codec=self.codec,
            tokens_per_step=self.tokens_per_step,
            num=self.drafts_per_round,
            round_number=number,
            seed=self.seed + number,
            data=datamodule.draft_settings(),
            device=pl_module.device,
        )
        options = RoundOptions(
            expert=self.expert,
            codec=self.codec,
            per_shard=self.per_shard,
            patience=self.patience,
            deadline=self.deadline,
            team=self._team,
        )
        batches = datamodule.draft_dataloader(number, self.drafts_per_round)
        previous = self._folder(number - 1) if number > 1 else None
        with gathered(backbone):
            finished_round = run_round(self._folder(number), batches, drafter, options=options, late=previous)
            if FIX_RATES in finished_round.manifest:  # measured by an earlier run that was killed right after
                return finished_round
            rates = {}
            if finished_round.manifest["counts"]["written"]:  # P(fix) and P(break) of one forward call on corrections
                corrected = islice(datamodule.round_dataloader(finished_round.path), NUM_FIX_BATCHES)
                counts = count_fixes(backbone, corrected, special=self.codec.special, device=pl_module.device)
                fixed, fix_tries, broken, break_tries = all_reduce_sum(counts).tolist()
                rates |= {"p_fix": fixed / fix_tries} if fix_tries else {}
                rates |= {"p_break": broken / break_tries} if break_tries else {}
        self._team.on_rank0(lambda: update_manifest(finished_round.path, {FIX_RATES: rates}))
        return read_round(finished_round.path)

    def _add_to_training(self, trainer: L.Trainer, finished_round: Round) -> None:
        """Add a round to the training data. Raises EmptyRound if it has no sample, unless `allow_empty`."""
        path = finished_round.path
        if finished_round.manifest["counts"]["written"]:
            _datamodule(trainer).add_round(path)
            return
        message = f"{path} has no corrected draft to train on ({summary(finished_round.manifest)})"
        if not self.allow_empty:
            self._team.on_rank0(lambda: reopen(path))  # the same command then asks again where that may help
            raise EmptyRound(
                f"{message}; check the expert, or set callbacks.self_correction.allow_empty=true to continue without it"
            )
        if self._team.is_rank0:
            logger.warning("%s; training continues without it", message)

    def _restore_start(self, trainer: L.Trainer) -> None:
        """Restore weights, their average and optimizer state from before the first round; keep the learning rate."""
        rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in trainer.optimizers]
        for optimizer in trainer.optimizers:
            for state in optimizer.state.values():  # a checkpoint from before the first step may hold no state
                for value in state.values():
                    value.zero_()
        checkpoint = trainer.strategy.load_checkpoint(self._checkpoint(1), weights_only=True)
        trainer.strategy.load_model_state_dict(checkpoint, strict=True)
        trainer.strategy.load_optimizer_state_dict(checkpoint)
        for optimizer, group_rates in zip(trainer.optimizers, rates, strict=True):
            for group, rate in zip(optimizer.param_groups, group_rates, strict=True):
                group["lr"] = rate
        if ema := ema_of(trainer):
            ema.on_load_checkpoint(trainer, trainer.lightning_module, checkpoint)


def round_metrics(manifest: dict[str, Any]) -> dict[str, float]:
    """Metrics of a round for the logger.

    waited_s: seconds for the expert after the last draft was drawn; overhead: the same as a share of the drawing time
    """
    counts, drawing = manifest["counts"], manifest["drawing"]
    revised = max(1, counts["revised"])
    metrics = {
        "drafted": counts["drafted"],
        "right_share": counts["right"] / revised,
        "edits_per_draft": counts["edits"] / revised,
        "written": counts["written"],
        "late": counts.get("late", 0),
        "waited_s": manifest.get("waited", 0.0),
        **yields(manifest),
        **manifest.get(FIX_RATES, {}),
    }
    for kind in ("kinds", "rejected", "failures", "usage", "latency"):
        metrics |= {f"{kind}/{reason}": count for reason, count in manifest.get(kind, {}).items()}
    if drawing["seconds"]:
        metrics["drafts_per_s"] = drawing["drawn"] / drawing["seconds"]
        if drawing["drawn"] == counts["drafted"]:  # no chunk is from an earlier, killed run, which is not timed
            metrics["overhead"] = metrics["waited_s"] / drawing["seconds"]
    return {f"round/{name}": value for name, value in metrics.items()}


def _datamodule(trainer: L.Trainer) -> Any:
    return getattr(trainer, "datamodule", None)
