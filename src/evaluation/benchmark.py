"""A benchmark of the papers, in three stages that are resumed separately.

    python -m src.evaluate conf=eval/capmas captions=mine.jsonl
    python -m src.evaluate conf=eval/capmas "models={stage2: runs/stage2/model}" evaluate.out=runs/capmas
    python -m src.evaluate conf=eval/capmas "captions={ours: a.jsonl, lavida: b.json}" stages=[score]

    generate   models x tokens/step -> captions/NAME-N.jsonl      `src.generation.run`, a line per caption
    judge      captions -> requests -> replies.jsonl              the only stage with network; each reply is kept
    score      captions, replies.jsonl -> scores.json, verdicts.jsonl, items.jsonl, table.md     pure: the same bytes

Captions of any system enter beside those of our models. Only what has changed is asked again: a reply is found by a
hash of its request, which holds caption, prompt, image, model and settings (`src/judges/store.py`). From the files of
`score` `conf=eval/report` makes tables, plots and a page (`src/evaluation/paper_tables.py`).
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from torchmetrics import Metric

from src.cli.config import load_config
from src.evaluation.benchmarks import BenchmarkData
from src.evaluation.calibration import calibration_text
from src.evaluation.captions import System, read_marks
from src.evaluation.results import without_nan
from src.evaluation.scores import Replicates, Score, check_protocols, score_system, table_text
from src.generation.run import TEXTS, respond
from src.io.errors import UserError
from src.io.files import read_json, write_bytes, write_json
from src.io.lock import locked
from src.io.progress import Bar
from src.io.words import counted
from src.judges.base import Item, Judge
from src.judges.reader import Conversation, Reader
from src.judges.store import ReplyStore
from src.metrics.judged import MAX_FAILED

Stage = Literal["generate", "judge", "score"]
logger = logging.getLogger(__name__)


class Benchmark:
    """The arguments: conf/eval/capmas.yaml.

    captions: a file, or files by name of the system; models: folders by name, captioned at each of `tokens_per_step`
    generate: settings of conf/generate.yaml for all models
    judges: by name, null for none; metrics: that need no judge; num: only the first images, for a trial
    also: scores.json of other runs, whose rows join the table; old: verdicts.jsonl of the judge to compare with
    dry: only say what the stage `judge` would take
    """

    def __init__(
        self,
        *,
        data: BenchmarkData,
        judges: Mapping[str, Judge | None],
        metrics: Sequence[Metric],
        judge: Reader | None,
        out: str,
        captions: str | Mapping[str, str] | None = None,
        models: Mapping[str, str | None] | None = None,
        tokens_per_step: Sequence[int] = (1, 2, 4, 8),
        generate: Mapping[str, Any] | None = None,
        stages: Sequence[str] = get_args(Stage),
        num: int | None = None,
        max_failed: float = MAX_FAILED,
        replicates: Replicates | None = None,
        also: Sequence[str] = (),
        old: str | None = None,
        dry: bool = False,
    ) -> None:
        if unknown := [stage for stage in stages if stage not in get_args(Stage)]:
            raise UserError(f"stages: there is no {unknown[0]!r}; a list of {', '.join(get_args(Stage))}")
        self.judges = {name: one for name, one in judges.items() if one}
        if self.judges and judge is None and {"judge", "score"} & set(stages):
            raise UserError("these metrics need a judge: name one, as in judge.model=gpt-4.1-2025-04-14")
        self.data, self.metrics, self.judge = data, list(metrics), judge
        self.out, self.num, self.max_failed, self.stages = Path(out), num, max_failed, stages
        self.also, self.old, self.dry, self.replicates = also, old, dry, replicates or Replicates()
        files = {Path(captions).stem: captions} if isinstance(captions, str) else captions or {}
        self.files = {name: Path(file) for name, file in files.items()}
        self.models = {name: folder for name, folder in (models or {}).items() if folder is not None}
        self.runs = {f"{name}-{n}": (folder, n) for name, folder in self.models.items() for n in tokens_per_step}
        self.generate = dict(generate or {})
        if num is not None and num < 1:
            raise UserError(f"num must be at least 1, got {num}")
        if both := self.files.keys() & self.runs.keys():
            raise UserError(f"captions and models: both have the name {min(both)!r}; rename one")
        if not self.files and not self.runs:
            raise UserError("nothing to evaluate: give captions=FILE, or models='{NAME: FOLDER}'")

    def run(self) -> str:
        """The stages that are asked for, in their order. Returns what to print."""
        with locked(self.out):
            items = self.data.items()[: self.num]
            if "generate" in self.stages and not self.dry:
                self.write_captions(items)
            systems = self.read_systems(items)
            store_path, printed = self.out / "replies.jsonl", list[str]()
            if self.dry:
                if not (self.judge and self.judges):
                    raise UserError("dry=true is about a judge, and this benchmark has none")
                return self.judge.estimate(self.conversations(systems), ReplyStore(store_path))
            if "judge" in self.stages and self.judge and self.judges:
                with ReplyStore(store_path) as store:
                    printed.append(self.ask(systems, store))
            if "score" in self.stages:
                printed.append(self.score(items, systems, ReplyStore(store_path)))
            return "\n".join([*printed, f"all files are in {self.out}"])

    def write_captions(self, items: Sequence[Item]) -> None:
        """Stage `generate`: the captions of our models, in files that a second call continues."""
        images = {item.key: item.image for item in items if item.image}
        prompts = {item.key: item.extra["prompt"] for item in items if "prompt" in item.extra}
        for name, (folder, speed) in self.runs.items():
            settings = {"model.path": folder, "images": str(self.data.folder), "tokens_per_step": speed}
            settings |= {**self.generate, "out": str(self._file(name))}
            texts = {key: value if key in TEXTS else json.dumps(value) for key, value in settings.items()}
            cfg = load_config(["conf=generate", *(f"{key}={text}" for key, text in texts.items())], texts=TEXTS)
            respond(cfg, images=images, prompts=prompts)

    def read_systems(self, items: Sequence[Item]) -> dict[str, System]:
        files = {**self.files, **{name: self._file(name) for name in self.runs}}
        if missing := [file for name, file in files.items() if name in self.runs and not file.exists()]:
            raise UserError(f"there is no {missing[0]}: run the stage generate first")
        systems = {name: System.read(file, items) for name, file in files.items()}
        for name, system in systems.items():
            missing = [item.key for item in system.items if item.caption is None]
            if len(missing) > self.max_failed * len(items):  # before anyone is asked about the others
                share = math.ceil(100 * len(missing) / len(items)) / 100
                raise UserError(
                    f"{name}: {len(missing)} captions of {len(items)} are missing, {missing[0]} among them; make them, "
                    f"or set evaluate.max_failed={share:g} and report it"
                )
        return systems

    def conversations(self, systems: Mapping[str, System]) -> list[Conversation]:
        """All that the judges have to hold."""
        pairs = ((system, judge) for system in systems.values() for judge in self.judges.values())
        return [one for system, judge in pairs for one in self.replicates.conversations(system.items, judge)]

    def ask(self, systems: Mapping[str, System], store: ReplyStore) -> str:
        """Stage `judge`: ask for the replies that the store lacks. Returns what came of it."""
        assert self.judge
        if store.lost:
            logger.warning(
                "%s in flight when an earlier run was killed: asked again, and perhaps billed twice",
                counted(len(store.lost), "request was", "requests were"),
            )
        conversations = self.conversations(systems)
        open_ones = [one for one in conversations if self.judge.replay(one, store).verdict is None]
        before, num_done = len(store.replies), len(conversations) - len(open_ones)
        with Bar(total=len(conversations), initial=num_done, unit="verdict", desc="judge") as bar:
            unfinished = self.judge.ask(open_ones, store, on_done=bar.update)
        text = f"judge: {counted(len(store.replies) - before, 'reply', 'replies')} added to {store.path}"
        if cost := store.usage["cost"]:
            text += f", {cost:.2f} dollars so far"
        if unfinished:
            reasons = ", ".join(f"{reason} {count}" for reason, count in unfinished.most_common())
            text += f"\n{counted(unfinished.total(), 'verdict')} open ({reasons}): the same command asks again"
        return text

    def score(self, items: Sequence[Item], systems: Mapping[str, System], store: ReplyStore) -> str:
        """Stage `score`: write scores.json, verdicts.jsonl, items.jsonl and table.md. Returns the table."""
        # 1. What all systems share.
        protocol: dict[str, Any] = {
            "benchmark": type(self.data).__name__,
            "images": [len(items), self.data.digest],
            "judge": self.judge.settings if self.judge and self.judges else None,
            "metrics": {name: judge.settings for name, judge in self.judges.items()}
            | {type(metric).__name__: metric.settings for metric in self.metrics if hasattr(metric, "settings")},
        }
        # 2. Each system by itself.
        scores: dict[str, Score] = {}
        verdicts: list[dict[str, Any]] = []
        for name, system in systems.items():
            try:
                scores[name], lines = score_system(
                    system.items,
                    self.judges,
                    self.metrics,
                    self.judge,
                    store,
                    max_failed=self.max_failed,
                    replicates=self.replicates,
                )
            except UserError as error:
                raise UserError(f"{name}: {error}") from error
            captions = system.captions
            scores[name] |= {
                "protocol": {**protocol, **captions.settings, "served": scores[name]["served"]},
                "captions": {
                    "sha256": captions.sha256,
                    "missing": sum(item.caption is None for item in system.items),
                    "empty": sum(item.caption == "" for item in system.items),
                    "other_images": system.others,
                    "cleaned": captions.cleaned,
                },
                "speed": system.speed,
            }
            verdicts += [{"system": name, **line} for line in lines]
        # 3. Files, and the table together with other runs.
        scores = without_nan(scores)
        self.out.mkdir(parents=True, exist_ok=True)
        write_json(self.out / "scores.json", scores)
        self._write_lines("verdicts.jsonl", verdicts)
        self._write_lines("items.jsonl", item_lines(items, systems))
        for other in self.also:
            more: dict[str, Any] = read_json(Path(other))
            scores |= {name if name not in scores else f"{name} ({other})": row for name, row in more.items()}
        check_protocols(scores)
        table = table_text(scores)
        write_bytes(self.out / "table.md", table.encode())
        judged = [line for line in verdicts if line["metric"] in self.judges]
        return table if self.old is None else f"{table}\n{calibration_text(Path(self.old), judged)}"

    def _write_lines(self, name: str, lines: Iterable[dict[str, Any]]) -> None:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_bytes(self.out / name, text.encode())

    def _file(self, name: str) -> Path:
        return self.out / "captions" / f"{name}.jsonl"


def item_lines(items: Sequence[Item], systems: Mapping[str, System]) -> Iterator[dict[str, Any]]:
    """A line for each image: its file, its references, and by system the caption and the marks of rewritten tokens."""
    marks = {name: read_marks(system) for name, system in systems.items()}
    for number, item in enumerate(items):
        captions = {name: system.items[number].caption for name, system in systems.items()}
        edits = {name: of_item for name in systems if (of_item := marks[name].get(item.key))}
        image = None if item.image is None else str(item.image.absolute())
        yield {"key": item.key, "image": image, "references": item.references, "captions": captions, "edits": edits}
