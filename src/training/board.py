"""What a run writes to TensorBoard, at a glance: its logger, and what each chart of the tab Custom Scalars means.

    Board(run_dir, settings=fixed_settings(cfg))      logger=... of the trainer
    tensorboard --logdir runs                         a run is named by its folder, as its event files lie in it

    scalars -> the rows of CHARTS that have one -> Custom Scalars      settings -> HParams, beside the last metrics
    all of CHARTS -> Text: about/charts

A resumed run adds an event file; what it writes once (texts, settings) stands in the first one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard.summary import hparams

EVENTS = "events.out.tfevents.*"  # files in the run's folder


class Chart(NamedTuple):
    """tags: a pattern for the names of its lines; meaning: in Markdown"""

    group: str
    title: str
    tags: str
    meaning: str


CHARTS = [
    Chart(*(cell.strip() for cell in line.split(" ; ")))
    for line in r"""
loss ; loss ; (train|val)/loss$ ; weighted sum of the terms: of training steps, and on validation data
loss ; training loss by kind ; train/loss/ ; each term before its coefficient: what is hard to learn
loss ; validation loss by kind ; val/loss/ ; the same on validation data; rising alone: overfitting
loss ; gradient norm ; train/(grad_norm|skipped) ; before clipping; steps that were skipped as it was not finite
loss ; learning rate ; train/lr$ ; of the step that is made next
accuracy ; training accuracy by kind ; train/accuracy/ ; share of the tokens of a kind that are predicted correctly
accuracy ; validation accuracy by kind ; val/accuracy/ ; the same on validation data
accuracy ; P(keep given clean), P(fix given wrong) ; (train|val)/p_(keep|fix)_ ; at all noise levels of training
by noise level ; P(fix given wrong) ; p_fix/ ; wrong tokens that a forward call corrects, with a share t masked
by noise level ; 1 - P(keep given clean) ; p_break/ ; true tokens that it changes; low is good, above all at t=0
by noise level ; hidden words ; hidden word/ ; share of hidden words of a scene that the model names
quality ; quality by tokens per step ; \w+/tokens_per_step= ; of captions (conf=NAME,quality); as a curve in Images
speed ; tokens per second ; perf/tokens_per_s$ ; response tokens, all ranks
speed ; data wait ; perf/data_wait ; share of the time between two steps; above 0.1 raise data.workers
speed ; memory, GiB ; perf/memory_gib ; peak of the GPU of rank 0, or of the process without one
speed ; MFU ; perf/mfu ; share of the peak of a known GPU that matrix products use
speed ; skipped samples ; data/skipped/ ; of damaged or missing data, by reason
online loop ; share of drafts that are right ; round/right_share ; without an edit by the expert; should rise
online loop ; edits by kind ; round/kinds/ ; placed edits of a round by kind of mistake
online loop ; yield ; round/yield ; share of the expert's edits that could be placed in the tokens
online loop ; P(fix), P(break) ; round/p_(fix|break) ; on the corrected drafts, before training on them
online loop ; rejected edits ; round/rejected/ ; by reason (`src/text/align.py`)
online loop ; failed drafts ; round/failures/ ; by reason; the next round asks again where it may help
online loop ; seconds of a round ; round/(seconds|waited_s) ; in all, and for the expert after the last draft was drawn
online loop ; latency of the expert, s ; round/latency/ ; percentiles of the time to an answer
online loop ; cost, dollars ; round/usage/cost ; of a round, if prices are set (docs/expert.md)
""".strip().splitlines()
]
ABOUT = """Charts are in the tab **Custom Scalars**, all single ones in Scalars. A point at step n is about the weights
after n steps; `train/*` is of the step that they make next. Samples are in Text and Images, settings in HParams.

"""


class Board(TensorBoardLogger):
    """settings: of HParams, nested"""

    def __init__(self, run_dir: str | Path, *, settings: Mapping[str, Any]) -> None:
        super().__init__(run_dir, name="", version="")
        self._settings = dict(flat(settings))
        self._tags: set[str] | None = None  # None: nothing is logged yet

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if self._tags is None:
            self._tags = earlier_tags(self.log_dir)
            if not self._tags:
                self.experiment.add_text("about/charts", ABOUT + about(), 0)
                self._write_hparams(start=True)
        metrics = {name: value for name, value in metrics.items() if name != "epoch"}  # Lightning adds it to all
        super().log_metrics(metrics, step)
        if new := metrics.keys() - self._tags:
            self._tags |= new
            self.experiment.add_custom_scalars(layout_of(self._tags))  # TensorBoard reads the last one

    @rank_zero_only
    def save(self) -> None:
        self.experiment.flush()  # without Lightning's file of settings: the run has its config

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if status == "success" and self._tags:
            self._write_hparams(start=False)
        super().finalize(status)

    def _write_hparams(self, *, start: bool) -> None:
        """The settings, or that the run is finished. Without a list of metrics TensorBoard offers every scalar."""
        _, settings, end = hparams(self._settings, {})
        self.experiment.file_writer.add_summary(settings if start else end)


def layout_of(tags: Iterable[str]) -> dict[str, dict[str, list]]:
    """The charts that have a line, as `SummaryWriter.add_custom_scalars` takes them."""
    tags, layout = list(tags), dict[str, dict[str, list]]()
    for chart in CHARTS:
        if any(re.match(chart.tags, tag) for tag in tags):
            layout.setdefault(chart.group, {})[chart.title] = ["Multiline", [chart.tags]]
    return layout


def about() -> str:
    """What the charts mean, a Markdown table."""
    rows = ["| group | chart | what it shows |", "|---|---|---|"]
    return "\n".join([*rows, *(f"| {chart.group} | {chart.title} | {chart.meaning} |" for chart in CHARTS)])


def earlier_tags(folder: str) -> set[str]:
    """Names of the scalars that the run has logged before it was resumed."""
    if not any(Path(folder).glob(EVENTS)):
        return set()
    guidance = dict.fromkeys(("scalars", "tensors", "images"), 1)
    return set(EventAccumulator(folder, size_guidance=guidance).Reload().Tags()["scalars"])


def flat(settings: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """(name, value) of nested settings: `optim.lr`; lists as text, without nulls."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield prefix + key, value if isinstance(value, bool | int | float | str) else str(value)
