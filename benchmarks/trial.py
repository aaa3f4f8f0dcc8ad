"""One scenario of benchmarks/faults.py: the servers, the commands, and a comparison of the records at the end.

Trial(scenario, folder, num).run()      drafts -> `src.revise`, killed and repeated -> a row of counts
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
from src.rounds.drafts import Drafter, draw_drafts
from src.text.tokenizer import Codec
from src.types import Batch, Draft
from testing.servers.real import free_port, haproxy, llmock, read_log, tell, tiny_vision_model, transformers_serve

ROOT = Path(__file__).parents[1]
BASE = ROOT / "assets" / "base"
TEXT = "A small red ring is in the upper left. A large blue square is in the upper right. Picture {number}."
GOOD = '{"right": false, "edits": [{"org": "red", "target": "blue", "reason": "colour"}]}'
AT_ONCE = 32
LIMITS = {"concurrency": AT_ONCE, "timeout_s": 2, "attempts": 20, "pause_after": 8, "pause_s": 0.3, "give_up_s": 60}
MAX_COMMANDS = 25  # a scenario that needs more has a bug
COMMAND_TIMEOUT_S = 180
DICE = random.Random(0)


@dataclass(frozen=True)
class Scenario:
    """The faults of one run.

    script, options: of llmock
    fault: name of the first item of the script, if llmock does not count it as a fault itself
    rules: of HAProxy
    kills: (process to kill, answers to wait for before), in order
    settings: of the expert
    num: drafts; None: as on the command line
    again: how often failed drafts are sent again
    real: `transformers serve` instead of llmock
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
    """Runs a scenario on `num` drafts in `folder`."""

    def __init__(self, scenario: Scenario, folder: Path, num: int) -> None:
        self.scenario, self.folder, self.num = scenario, folder, num
        self.ports = {"server": free_port(), "proxy": free_port()}
        self.running: dict[str, ExitStack] = {}
        self.num_kills: Counter[str] = Counter()
        self.own_kills: list[float] = []  # `time.time` of each kill of `src.revise`
        self.commands, self.model, self.url = 0, "gpt-4o-mini", ""

    def run(self) -> dict[str, Any]:
        """A row of the table: counts of the records, failures by reason, seconds."""
        write_drafts(self.folder / "drafts", self.num)
        if self.scenario.real:
            self.model = str(tiny_vision_model(self.folder / "model"))
        watch = Watch(self.folder / "round")
        try:
            for name in ("server", "proxy"):
                self.start(name)
            watch.start()
            began = time.monotonic()
            self.repeat_until_done(watch)
            seconds = round(time.monotonic() - began, 1)
            watch.end()
            return self.compare(watch) | {"commands": self.commands, "seconds": seconds}
        finally:
            watch.end()
            for server in self.running.values():
                server.close()

    def start(self, name: str) -> None:
        """Start the server or the proxy on its port."""
        stack, port = ExitStack(), self.ports[name]
        self.running[name] = stack
        if name == "proxy":
            server = f"http://127.0.0.1:{self.ports['server']}/v1"
            stack.enter_context(haproxy(self.folder, self.scenario.rules, to=server, port=port))
        elif self.scenario.real:
            stack.enter_context(transformers_serve(self.folder / "log", port=port))
        else:
            self.url = stack.enter_context(llmock("--latency-ms", "20", *self.scenario.options, port=port))
            default = {"type": "reply", "text": GOOD, "times": None}
            tell(self.url, "scenario", {"behaviors": [*self.scenario.script, default]})

    def repeat_until_done(self, watch: Watch) -> None:
        """Repeat the command, with the kills of the scenario, until it succeeds."""
        again, kills = 0, list(self.scenario.kills)
        while self.commands < MAX_COMMANDS:
            self.commands += 1
            if self.command(["again=true"] if again else [], kills, watch):
                continue
            if again == self.scenario.again or not read_manifest(self.folder / "round").get("again"):
                return
            again += 1
        output = (self.folder / "output").read_text()[-500:]
        sys.exit(f"{self.scenario.name}: not done after {MAX_COMMANDS} commands; the last one printed: {output}")

    def command(self, more: list[str], kills: list[tuple[str, int]], watch: Watch) -> int:
        """The exit code of one command. Removes the kills that it performs from `kills`."""
        settings = {"base_url": f"http://127.0.0.1:{self.ports['proxy']}/v1", "key_env": "null", "model": self.model}
        settings |= {"profile": "plain", "repair": 0, **{f"limits.{name}": value for name, value in LIMITS.items()}}
        expert = [f"expert.{name}={value}" for name, value in {**settings, **self.scenario.settings}.items()]
        paths = [f"drafts={self.folder}/drafts", f"out={self.folder}/round", f"tokenizer={BASE}"]
        command = [sys.executable, "-m", "src.revise", "conf=revise,expert/openai", *paths, *expert, *more]
        with open(self.folder / "output", "ab") as stream:
            process = subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=stream)
        deadline, before = time.monotonic() + COMMAND_TIMEOUT_S, len(watch.lines)
        while process.poll() is None and time.monotonic() < deadline:
            if kills and len(watch.lines) - before > kills[0][1]:
                self.kill(kills.pop(0)[0], process)
                before = len(watch.lines)
            time.sleep(0.002)
        process.kill()
        return process.wait()

    def kill(self, name: str, process: subprocess.Popen) -> None:
        """Kill `src.revise` (`us`), or kill and restart the server or the proxy."""
        self.num_kills[name] += 1
        if name == "us":
            time.sleep(DICE.uniform(0, 0.1))
            process.send_signal(signal.SIGKILL)
            process.wait()
            time.sleep(0.1)  # so that `watch` sees the last lines
            self.own_kills.append(time.time())
        else:
            self.running.pop(name).close()
            time.sleep(1.0)
            self.start(name)

    def compare(self, watch: Watch) -> dict[str, Any]:
        """Counts of both servers' records and of the journal, matched by draft."""
        logged, manifest = read_log(self.folder), read_manifest(self.folder / "round")
        has_record = not self.scenario.real and not self.num_kills["server"]  # a killed llmock loses its record
        requests = tell(self.url, "requests")["requests"] if has_record else []
        requests = [request for request in requests if request["method"] == "POST"]
        delivered = [entry for entry in logged if entry.whole and entry.status == 200]
        whole = Counter(entry.draft for entry in delivered)
        made = Counter(number_of(request["body"]) for request in requests if request["status"] == 200)
        paid = made if has_record else whole
        kept, settled, twice = watch.summary()
        late = [entry for entry in logged if entry.began > settled.get(entry.draft, float("inf"))]
        counts = manifest["counts"]
        return {
            "scenario": self.scenario.name,
            "drafts": self.num,
            "faults": self.count_faults(requests, [entry.fault for entry in logged]),
            "sent": len(logged),
            "reached": len(requests) if has_record else None,
            "counted": manifest["usage"].get("requests", 0),
            "paid": sum(paid.values()),
            "kept": sum(kept.values()),
            "broken": sum((paid - whole).values()),
            "lost": sum((whole - kept).values()),
            "lost_at_kills": self.lost_at_kills([entry.began for entry in delivered], watch),
            "doubled": len(late) + twice,
            "invented": sum((kept - paid).values()),  # in the journal, but in no record of a server
            "answered": counts["revised"],
            "failed": manifest["failures"],
            "missing": self.num - counts["revised"] - counts["failed"],
            "findings": [finding["code"] for finding in tell(self.url, "verdict")["findings"]] if has_record else [],
        }

    def lost_at_kills(self, began: list[float], watch: Watch) -> list[int]:
        """Replies delivered minus replies kept, between kills of us. began: request times of the delivered replies"""
        kept = [at for at, line in watch.lines for _ in replies_in(line)]
        return [
            sum(start < at < end for at in began) - sum(start < at < end for at in kept)
            for start, end in pairwise([0.0, *self.own_kills])
        ]

    def count_faults(self, requests: list[dict[str, Any]], proxy_faults: list[str]) -> dict[str, int]:
        """Number of faults by kind: in llmock's record, in HAProxy's log, and kills."""
        counts = Counter([*(request["fault"] or "" for request in requests), *proxy_faults])
        if self.scenario.fault and len(tell(self.url, "scenario")["pending"]) == 1:
            counts[self.scenario.fault] = self.scenario.script[0]["times"]
        del counts[""]
        return {**counts, **{f"kill -9 of {name}": times for name, times in self.num_kills.items() if times}}


class Watch(Thread):
    """Records when each line of a round's journal is first seen in the file. lines: (`time.time`, line)"""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.lines: list[tuple[float, dict[str, Any]]] = []
        self._folders = (folder.with_name(f".{folder.name}.partial"), folder)
        self._offset, self._ended = 0, Event()

    def run(self) -> None:
        while not self._ended.wait(0.002):
            self._read_new_lines()

    def end(self) -> None:
        if self.is_alive():
            self._ended.set()
            self.join()
        self._read_new_lines()

    def summary(self) -> tuple[Counter[str], dict[str, float], int]:
        """Replies kept and time of the final answer, both by draft; and the number of repeated final answers."""
        kept: Counter[str] = Counter()
        settled: dict[str, float] = {}
        twice = 0
        for at, line in self.lines:
            kept[line["key"]] += len(replies_in(line))
            if "revision" in line or not line["failure"]["retry"]:
                twice += line["key"] in settled
                settled.setdefault(line["key"], at)
        return kept, settled, twice

    def _read_new_lines(self) -> None:
        for folder in self._folders:
            try:
                with open(folder / "journal-rank-0000.jsonl", "rb") as stream:
                    stream.seek(self._offset)
                    data = stream.read()
            except FileNotFoundError:
                continue
            at, whole = time.time(), data[: data.rfind(b"\n") + 1]
            self._offset += len(whole)
            self.lines += [(at, json.loads(line)) for line in whole.splitlines()]
            return


def replies_in(line: Mapping[str, Any]) -> list[str]:
    """The replies in a line of the journal."""
    answer = line.get("revision") or line["failure"]
    return answer["raw"].split(BETWEEN) if "seconds" in answer["usage"] else []


def write_drafts(folder: Path, num: int) -> None:
    """Write a folder like `src.draft`, with drafts whose keys and texts are their numbers."""
    stream, codec = io.BytesIO(), Codec.load(BASE)
    Image.effect_noise((48, 48), 60).convert("RGB").save(stream, "PNG")
    image = stream.getvalue()

    class Numbers(Drafter):
        settings = {"num": num}  # noqa: RUF012

        def draw(self, batch: Batch, *, tokens_per_step: int) -> list[Draft]:
            texts = {key: TEXT.format(number=key) for key in batch.keys}
            fields = {"prompt": "Describe.", "reference": "A ring.", "steps": tokens_per_step, "image": image}
            fields |= {"sampler": {}, "fingerprint": "f", "seed": 0}
            return [Draft(key=key, text=text, token_ids=codec.encode(text)[0], **fields) for key, text in texts.items()]

    def batch_of(keys: list[str]) -> Batch:
        empty = torch.zeros(len(keys), 1)
        return Batch({}, empty, empty, empty, empty, empty, keys=keys)

    batches = ((start, batch_of([str(n) for n in range(start, min(num, start + 50))])) for start in range(0, num, 50))
    common: dict[str, Any] = {"backbone": None, "model": "f", "sampler": None, "data": {}, "round_number": 1, "seed": 0}
    drafter = Numbers(codec=codec, tokens_per_step=[1], num=num, **common)
    for _ in draw_drafts(folder, batches, drafter, team=Team()):
        pass


def number_of(body: Mapping[str, Any]) -> str:
    """The number of the draft that a request is about."""
    return re.findall(r"Picture (\d+)\.", json.dumps(body))[-1]
