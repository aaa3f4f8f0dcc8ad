"""Request rate and CPU time of the expert's client against a local server: >= 50 requests/s on one core is enough.

    python -m benchmarks.expert                       50 ms per reply, 64 requests at once, 2 % refused with 429
    python -m benchmarks.expert --requests 3000 --refused 0

The server is a process of its own. Each draft names its number, which the reply must contain, so a lost, doubled or
swapped answer is an error. One thread does all the client's work, so the inverse of its CPU time per draft bounds the
rate; unlike the rate it hardly depends on other load of the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import multiprocessing
import re
import sys
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from random import Random

from PIL import Image

from src.chat.limits import Limits
from src.experts.openai import OpenAIExpert
from src.text.tokenizer import Codec
from src.types import Draft, Failure
from testing.servers.scripted import Http, Request, Scripted, error, reply

TEXT = "A small red ring is in the upper left. A large blue square is in the upper right. Picture {number}."


def main() -> None:
    """Print the rate, the CPU time per draft and the number of refusals."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"requests": 2000, "at-once": 64}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in {"latency": 0.05, "refused": 0.02, "retry-after": 0.2}.items():
        parser.add_argument(f"--{name}", type=float, default=default)
    options = parser.parse_args()
    codec = Codec.train([TEXT.format(number=number) for number in range(100)], vocab_size=400, alphabet="bytes")
    drafts = make_drafts(codec, options.requests)
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs, options))
    server.start()
    limits = Limits(concurrency=options.at_once, attempts=8)
    expert = OpenAIExpert(codec=codec, model="m", base_url=ours.recv(), key_env=None, profile="vllm", limits=limits)

    async def ask() -> dict[str, list[str]]:
        numbers: dict[str, list[str]] = {}
        async for key, answer in expert.revise(drafts):
            reasons = [] if isinstance(answer, Failure) else [edit.reason for edit in answer.edits]
            numbers.setdefault(key, []).extend(reasons)
        return numbers

    began, cpu_began = time.perf_counter(), time.process_time()
    answers = asyncio.run(ask())
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    ours.send("stop")
    answered, refused = ours.recv()
    server.join()
    wrong = [draft.key for draft in drafts if answers[draft.key] != [number_of(draft.text)]]
    doubled = [number for number, count in answered.items() if count > 1]
    if wrong or doubled or len(answered) != len(drafts):
        sys.exit(f"{len(wrong)} answers lost, doubled or swapped, {len(doubled)} drafts answered twice")
    sys.stdout.write(
        f"{len(drafts)} drafts, {options.at_once} at once, {options.latency * 1e3:.0f} ms a reply: "
        f"{len(drafts) / seconds:.0f}/s, {cpu_seconds / len(drafts) * 1e3:.2f} ms CPU a draft, {refused} refused, "
        "0 lost, 0 doubled\n"
    )


def serve(pipe: Connection, options: argparse.Namespace) -> None:
    """The server process: sends its address, and at the end its answers per draft and its number of refusals."""
    random, counts = Random(0), {"answered": Counter(), "refused": 0}
    with Scripted(partial(script, random, counts, options)) as server:
        pipe.send(server.url)
        pipe.recv()
    pipe.send((counts["answered"], counts["refused"]))


def script(random: Random, counts: dict, options: argparse.Namespace, request: Request) -> Http:
    """A 429, or a reply with one edit whose reason is the number of the draft."""
    if random.random() < options.refused:
        counts["refused"] += 1
        return replace(error(429, retry_after=str(options.retry_after)), delay=options.latency)
    number = number_of(request.text)
    counts["answered"][number] += 1
    edit = {"org": "small", "target": "large", "reason": number}
    return reply(json.dumps({"right": False, "edits": [edit]}), delay=options.latency)


def number_of(text: str) -> str:
    return re.findall(r"Picture (\d+)\.", text)[-1]


def make_drafts(codec: Codec, count: int) -> list[Draft]:
    stream = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(stream, "PNG")
    texts = [TEXT.format(number=number) for number in range(count)]
    common = {"steps": 8, "reference": TEXT, "sampler": {}, "fingerprint": "f", "seed": 0, "image": stream.getvalue()}
    return [
        Draft(key=f"k{n}", prompt="Describe the picture.", text=text, token_ids=codec.encode(text)[0], **common)
        for n, text in enumerate(texts)
    ]


if __name__ == "__main__":
    main()
