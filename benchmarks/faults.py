"""Count what the expert loses and doubles when servers and processes fail, from the records of the servers.

    python -m benchmarks.faults --out results/expert         all scenarios, about ten minutes
    python -m benchmarks.faults --out faults --only kill 5   scenarios whose names start with one of these

`src.revise` runs as a user would start it, over the same drafts in every scenario, and is repeated until its round is
complete. Behind it are third-party servers (extra `experts-test`, and HAProxy): HAProxy logs every request that leaves
us and breaks some; llmock, or `transformers serve` with a tiny vision model, answers the others.

    sent     requests in HAProxy's log           reached  requests in llmock's log
    counted  requests in the round's manifest    paid     replies that llmock made, by its log
    kept     replies in the journal
    broken   paid, but by HAProxy's log not delivered whole: a fault, or our timeout
    lost     delivered whole, but not in the journal; in brackets, those in flight at each kill of us
    doubled  requests that HAProxy logged after an answer to the same draft was in the journal

Each draft names its number, which the three records are matched by. A line of the journal counts from the moment it is
seen in the file. Prints a table, and writes it to OUT/faults.md and OUT/faults.json.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.trial import AT_ONCE, GOOD, LIMITS, Scenario, Trial
from testing.servers.real import find, missing

COLUMNS = ["drafts", "sent", "reached", "counted", "paid", "kept", "broken", "lost", "doubled", "answered"]


def say(text: str, times: int, finish: str | None = None) -> dict[str, Any]:
    return {"type": "reply", "text": text, "finish_reason": finish, "times": times}


def fail(status: int, times: int, **more: Any) -> dict[str, Any]:
    return {"type": "fail", "status": status, "times": times, **more}


def rule(name: str, percent: int, actions: str, *, when: str = "request") -> str:
    """HAProxy rules that break `percent` of all requests. when: `response` acts after the server has answered"""
    free = "!{ var(txn.fault) -m found }" + (" METH_POST" if when == "request" else "")
    lines = [f"http-{when} set-var(txn.fault) str({name}) if {free} {{ rand(100) lt {percent} }}"]
    lines += [f"http-{when} {action} if {{ var(txn.fault) -m str {name} }}" for action in actions.split("; ")]
    return "".join(f"  {line}\n" for line in lines)


def answers(status: int, body: str, kind: str = "application/json") -> str:
    return f"return status {status} content-type {kind} string '{body}'"


LIMITED = answers(429, "slow down", "text/plain")
HALF, NO_CHOICES = answers(200, '{"choices": [{"mes'), answers(200, '{"choices": []}')
CUT = "set-header content-length 5000; set-header connection close"  # of a much shorter reply
MIX = (
    rule("429", 5, f"{LIMITED} hdr retry-after 0.2")
    + rule("502", 4, answers(502, "<html>bad gateway</html>", "text/html"))
    + rule("cut", 4, "reject")
    + rule("half-json", 4, HALF, when="response")
    + rule("truncated", 3, CUT, when="response")
)
RANDOM = ["--error-rate=429=0.05", "--error-rate=500=0.05"]
US = [("us", number) for number in (30, 0, 45, 1, 60)]
SMALL = {"limits.concurrency": 2, "limits.timeout_s": 60, "temperature": 1.0, "max_completion_tokens": 30}
SCENARIOS = [
    Scenario("no fault"),
    Scenario("429 with Retry-After", script=[fail(429, 60, retry_after=0.5)]),
    Scenario("429 without", rules=rule("429", 15, LIMITED)),
    Scenario("rate limiter, 1200 a minute", options=["--rpm", "1200"]),
    Scenario("500", options=["--error-rate=500=0.2"]),
    Scenario("408, 502, 503", options=[f"--error-rate={status}=0.07" for status in (408, 502, 503)]),
    Scenario("slow: 5 s, limit 2 s", script=[{"type": "delay", "seconds": 5, "times": 20}], fault="slow"),
    Scenario("connection cut", rules=rule("cut", 15, "reject")),
    Scenario("request swallowed", rules=rule("silence", 5, "silent-drop")),
    Scenario("reply swallowed", rules=rule("silence", 5, "silent-drop", when="response")),
    Scenario("reply truncated", rules=rule("truncated", 15, CUT, when="response")),
    Scenario("malformed JSON, 200", rules=rule("half-json", 15, HALF, when="response")),
    Scenario("empty choices, 200", rules=rule("no-choices", 15, NO_CHOICES, when="response")),
    Scenario("wrong schema", script=[say('{"wrong": 1}', 40)], fault="wrong schema"),
    Scenario("malformed text", script=[say("{'right': True,", 40)], fault="malformed text"),
    Scenario("empty content", script=[say("  ", 40)], fault="empty"),
    Scenario("finish_reason length", script=[say(GOOD[:20], 40, "length")], fault="length"),
    Scenario("content filter", script=[say("", 40, "content_filter")], fault="content filter"),
    Scenario("useless edits sent back", script=[say(GOOD.replace("red", "purple"), 40)], fault="useless edit",
             settings={"repair": 1}),
    Scenario("key revoked in the middle", script=[say(GOOD, 100), fail(401, 1)]),
    Scenario("all of it", options=RANDOM, rules=MIX),
    Scenario("kill -9 of the server", kills=[("server", 60), ("server", 60)]),
    Scenario("kill -9 of the proxy", kills=[("proxy", 60), ("proxy", 60)]),
    Scenario("kill -9 of us", kills=US, num=600),
    Scenario("kill -9 of us, all of it", options=RANDOM, rules=MIX, kills=US, num=600),
    Scenario("transformers serve", num=24, real=True, settings=SMALL),
    Scenario("transformers serve, kill -9 of us", num=24, real=True, settings=SMALL, kills=[("us", 4), ("us", 4)]),
]  # fmt: skip


def main() -> None:
    """Run the scenarios, print one line each, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--drafts", type=int, default=300)
    parser.add_argument("--only", nargs="*", default=[""], help="scenarios whose names start with one of these")
    options = parser.parse_args()
    if reason := missing("llmock", "fastapi", program="haproxy"):
        sys.exit(reason)
    options.out.mkdir(parents=True, exist_ok=True)
    about = {"limits": LIMITS, "versions": versions(), "cores": os.cpu_count()}
    head = ["scenario", "faults", *COLUMNS, "failed", "commands", "s"]
    lines, rows = [line_of(head), line_of(["---"] * len(head))], []
    sys.stdout.write("".join(lines))
    for scenario in SCENARIOS:
        if not scenario.name.startswith(tuple(options.only)):
            continue
        with tempfile.TemporaryDirectory() as folder:
            rows.append(Trial(scenario, Path(folder), scenario.num or options.drafts).run())
        lines.append(table_line(rows[-1]))
        sys.stdout.write(lines[-1])
        sys.stdout.flush()
        (options.out / "faults.md").write_text("".join(lines))
        (options.out / "faults.json").write_text(json.dumps({**about, "scenarios": rows}, indent=1) + "\n")
    if bad := [row["scenario"] for row in rows if is_bad(row)]:
        sys.exit(f"lost, doubled, invented or missing: {', '.join(bad)}")


def is_bad(row: Mapping[str, Any]) -> bool:
    """Whether more replies were lost than were in flight at our kills, or any was doubled, invented or missing."""
    in_flight = row["lost_at_kills"]
    errors = [row[name] for name in ("doubled", "invented", "missing")]
    return row["lost"] > sum(in_flight) or max(in_flight, default=0) > 2 * AT_ONCE or any(errors)


def table_line(row: Mapping[str, Any]) -> str:
    cells = dict(row)
    if in_flight := row["lost_at_kills"]:
        cells["lost"] = f"{row['lost']} ({', '.join(map(str, in_flight))})"
    values = ["-" if cells[name] is None else cells[name] for name in COLUMNS]
    return line_of(
        [
            row["scenario"],
            counts_text(row["faults"]),
            *values,
            counts_text(row["failed"]),
            row["commands"],
            row["seconds"],
        ]
    )


def counts_text(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "-"


def line_of(cells: list[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |\n"


def versions() -> dict[str, str]:
    """Versions of the servers, and of the SDK whose connections we use."""
    proxy = subprocess.run([str(find("haproxy")), "-v"], capture_output=True, text=True, check=True).stdout
    packages = {name: importlib.metadata.version(name) for name in ("llmock", "transformers", "openai")}
    return {"haproxy": proxy.split()[2], **packages, "python": sys.version.split()[0]}


if __name__ == "__main__":
    main()
