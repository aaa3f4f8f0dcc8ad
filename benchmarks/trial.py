"""One scenario of benchmarks/faults.py: servers, the commands that are run, and what the records say in the end.

Trial(scenario, folder, num).run()      drafts -> `src.revise`, killed and repeated -> a row of figures
"""

from __future__ import annotations

import io
import json
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch
from PIL import Image

from src.distributed.parallel import Team
from src.experts.openai import BETWEEN
from src.io.shards import read_manifest
from src.rounds.drafts import draw_drafts
from src.text.tokenizer import Codec
from src.types import Batch, Draft
from testing.servers.real import free_port, haproxy, llmock, read_log, tell, tiny_vision_model, transformers_serve

ROOT = Path(__file__).parents[1]
BASE = ROOT / "assets" / "base"
TEXT = "A small red ring is in the upper left. A large blue square is in the upper right. Picture {number}."
GOOD = '{"right": false, "edits": [{"org": "red", "target": "blue", "reason": "colour"}]}'
AT_ONCE = 32
LIMITS = {"concurrency": AT_ONCE, "timeout_s": 2, "attempts": 20, "pause_after": 8, "pause_s": 0.3, "give_up_s": 60}
COMMANDS = 25  # a scenario that takes more is a bug
LONGEST_S = 180  # of one command
DICE = random.Random(0)


@dataclass(frozen=True)
class Scenario:
    """What goes wrong. script, options: of llmock; rules: of HAProxy; kills: what dies, after how many more answers.

    fault: name of the first item of the script, where llmock does not count it as a fault itself
    again: how often drafts that failed are asked about once more; real: `transformers serve` in place of llmock
    """

    name: str
    script: Sequence[dict[str, Any]] = ()
    fault: str = ""
    options: Sequence[str] = ()
    rules: str = ""
    kills: Sequence[tuple[str, int]] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    num: int | None = None
    again: int = 1
    real: bool = False


class Trial:
    """Runs a scenario over `num` drafts in `folder`."""

    def __init__(self, scenario: Scenario, folder: Path, num: int) -> None:
        self.scenario, self.folder, self.num = scenario, folder, num
        self.ports = {"server": free_port(), "proxy": free_port()}
        self.running: dict[str, ExitStack] = {}
        self.dead: Counter[str] = Counter()
        self.deaths: list[float] = []  # our own, seconds of `time.time`
        self.commands, self.model, self.url = 0, "gpt-4o-mini", ""

    def run(self) -> dict[str, Any]:
        """The figures: counts of records, the failures by reason, seconds."""
        write_drafts(self.folder / "drafts", self.num)
        if self.scenario.real:
            self.model = str(tiny_vision_model(self.folder / "model"))
        watch = Watch(self.folder / "round")
        try:
            for name in ("server", "proxy"):
                self.start(name)
            watch.start()
            began = time.monotonic()
            self.until_done(watch)
            seconds = round(time.monotonic() - began, 1)
            watch.end()
            return self.compared(watch) | {"commands": self.commands, "seconds": seconds}
        finally:
            watch.end()
            for server in self.running.values():
                server.close()

    def start(self, name: str) -> None:
        """Start the server or the proxy, at its port."""
        stack, port = ExitStack(), self.ports[name]
        self.running[name] = stack
        if name == "proxy":
            behind = f"http://127.0.0.1:{self.ports['server']}/v1"
            stack.enter_context(haproxy(self.folder, self.scenario.rules, to=behind, port=port))
        elif self.scenario.real:
            stack.enter_context(transformers_serve(self.folder / "log", port=port))
        else:
            self.url = stack.enter_context(llmock("--latency-ms", "20", *self.scenario.options, port=port))
            usual = {"type": "reply", "text": GOOD, "times": None}
            tell(self.url, "scenario", {"behaviors": [*self.scenario.script, usual]})

    def until_done(self, watch: Watch) -> None:
        """Repeat the command, and kill what the scenario says, until it ends well."""
        again, kills = 0, list(self.scenario.kills)
        while self.commands < COMMANDS:
            self.commands += 1
            if self.command(["again=true"] if again else [], kills, watch):
                continue
            if again == self.scenario.again or not read_manifest(self.folder / "round").get("again"):
                return
            again += 1
        told = (self.folder / "told").read_text()[-500:]
        sys.exit(f"{self.scenario.name}: not done after {COMMANDS} commands; the last one: {told}")

    def command(self, more: list[str], kills: list[tuple[str, int]], watch: Watch) -> int:
        """The exit code of one command; takes from `kills` those that came to pass."""
        given = {"base_url": f"http://127.0.0.1:{self.ports['proxy']}/v1", "key_env": "null", "model": self.model}
        given |= {"profile": "plain", "repair": 0, **{f"limits.{name}": value for name, value in LIMITS.items()}}
        expert = [f"expert.{name}={value}" for name, value in {**given, **self.scenario.settings}.items()]
        places = [f"drafts={self.folder}/drafts", f"out={self.folder}/round", f"tokenizer={BASE}"]
        command = [sys.executable, "-m", "src.revise", "conf=revise,expert/openai", *places, *expert, *more]
        with open(self.folder / "told", "ab") as stream:
            process = subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=stream)
        until, before = time.monotonic() + LONGEST_S, len(watch.lines)
        while process.poll() is None and time.monotonic() < until:
            if kills and len(watch.lines) - before > kills[0][1]:
                self.kill(kills.pop(0)[0], process)
                before = len(watch.lines)
            time.sleep(0.002)
        process.kill()
        return process.wait()

    def kill(self, what: str, process: subprocess.Popen) -> None:
        self.dead[what] += 1
        if what == "us":
            time.sleep(DICE.uniform(0, 0.1))
            process.send_signal(signal.SIGKILL)
            process.wait()
            time.sleep(0.1)  # `watch` sees the last lines
            self.deaths.append(time.time())
        else:
            self.running.pop(what).close()
            time.sleep(1.0)
            self.start(what)

    def compared(self, watch: Watch) -> dict[str, Any]:
        """The records of both servers against the journal."""
        passed, manifest = read_log(self.folder), read_manifest(self.folder / "round")
        own = not self.scenario.real and not self.dead["server"]  # the record of a server dies with it
        asked = [one for one in tell(self.url, "requests")["requests"] if one["method"] == "POST"] if own else []
        served = [one for one in passed if one.whole and one.status == 200]
        whole = Counter(one.draft for one in served)
        paid = Counter(number_of(one["body"]) for one in asked if one["status"] == 200) if own else whole
        kept, settled, twice = watch.found()
        late = [one for one in passed if one.began > settled.get(one.draft, float("inf"))]
        counts = manifest["counts"]
        return {
            "scenario": self.scenario.name,
            "drafts": self.num,
            "faults": self.faults(asked, [one.fault for one in passed]),
            "sent": len(passed),
            "reached": len(asked) if own else None,
            "counted": manifest["usage"].get("requests", 0),
            "paid": sum(paid.values()),
            "kept": sum(kept.values()),
            "broken": sum((paid - whole).values()),
            "lost": sum((whole - kept).values()),
            "lost_at_kills": self.lost_at_kills([one.began for one in served], watch),
            "doubled": len(late) + twice,
            "invented": sum((kept - paid).values()),  # in the journal, and in no record of a server
            "answered": counts["revised"],
            "failed": manifest["failures"],
            "missing": self.num - counts["revised"] - counts["failed"],
            "findings": [one["code"] for one in tell(self.url, "verdict")["findings"]] if own else [],
        }

    def lost_at_kills(self, served: list[float], watch: Watch) -> list[int]:
        """Of each of our lives but the last: replies handed over, less those that it kept. served: when asked for"""
        kept = [at for at, line in watch.lines for _ in replies_in(line)]
        lives = list(pairwise([0.0, *self.deaths]))
        return [sum(a < at < b for at in served) - sum(a < at < b for at in kept) for a, b in lives]

    def faults(self, asked: list[dict[str, Any]], broken: list[str]) -> dict[str, int]:
        """How many of which kind: by the record of llmock, by that of HAProxy, and kills."""
        found = Counter([*(one["fault"] or "" for one in asked), *broken])
        if self.scenario.fault and len(tell(self.url, "scenario")["pending"]) == 1:
            found[self.scenario.fault] = self.scenario.script[0]["times"]
        del found[""]
        return {**found, **{f"kill -9 of {name}": times for name, times in self.dead.items() if times}}


class Watch(Thread):
    """Notes when each line of a round's journal is first seen in the file. lines: (seconds of `time.time`, line)"""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.lines: list[tuple[float, dict[str, Any]]] = []
        self._folders = (folder.with_name(f".{folder.name}.partial"), folder)
        self._read, self._ended = 0, Event()

    def run(self) -> None:
        while not self._ended.wait(0.002):
            self._look()

    def end(self) -> None:
        if self.is_alive():
            self._ended.set()
            self.join()
        self._look()

    def found(self) -> tuple[Counter[str], dict[str, float], int]:
        """By draft: replies that are kept, and when it was settled; and how many drafts were settled twice."""
        kept: Counter[str] = Counter()
        settled: dict[str, float] = {}
        twice = 0
        for at, line in self.lines:
            kept[line["key"]] += len(replies_in(line))
            if "revision" in line or not line["failure"]["retry"]:
                twice += line["key"] in settled
                settled.setdefault(line["key"], at)
        return kept, settled, twice

    def _look(self) -> None:
        for folder in self._folders:
            try:
                with open(folder / "journal-rank-0000.jsonl", "rb") as stream:
                    stream.seek(self._read)
                    data = stream.read()
            except FileNotFoundError:
                continue
            at, whole = time.time(), data[: data.rfind(b"\n") + 1]
            self._read += len(whole)
            self.lines += [(at, json.loads(line)) for line in whole.splitlines()]
            return


def replies_in(line: Mapping[str, Any]) -> list[str]:
    """The replies that a line of the journal keeps."""
    answer = line.get("revision") or line["failure"]
    return answer["raw"].split(BETWEEN) if "seconds" in answer["usage"] else []


def write_drafts(folder: Path, num: int) -> None:
    """A folder as `src.draft` writes it, of drafts that are named by their numbers, as their texts are."""
    stream, codec = io.BytesIO(), Codec.load(BASE)
    Image.effect_noise((48, 48), 60).convert("RGB").save(stream, "PNG")
    image = stream.getvalue()

    def draft(batch: Batch, *, tokens_per_step: int) -> list[Draft]:
        texts = {key: TEXT.format(number=key) for key in batch.keys}
        given = {"prompt": "Describe.", "reference": "A ring.", "steps": tokens_per_step, "image": image}
        given |= {"sampler": {}, "fingerprint": "f", "seed": 0}
        return [Draft(key=key, text=text, token_ids=codec.encode(text)[0], **given) for key, text in texts.items()]

    def batch_of(keys: list[str]) -> Batch:
        empty = torch.zeros(len(keys), 1)
        return Batch({}, empty, empty, empty, empty, empty, keys=keys)

    batches = ((start, batch_of([str(n) for n in range(start, min(num, start + 50))])) for start in range(0, num, 50))
    common = {"tokenizer": codec.fingerprint, "settings": {"num": num}, "total": num, "team": Team()}
    for _ in draw_drafts(folder, batches, draft, tokens_per_step=[1], **common):
        pass


def number_of(body: Mapping[str, Any]) -> str:
    """The number of the draft that a request is about."""
    return re.findall(r"Picture (\d+)\.", json.dumps(body))[-1]
