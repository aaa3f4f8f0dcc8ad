"""Request rate of the expert's client against a local server, beside the usual way to send many requests at once.

    python -m benchmarks.expert                       50 ms per reply, 64 requests at once, 2 % refused with 429
    python -m benchmarks.expert --requests 3000 --refused 0

The server is a process of its own, so two cores are needed. The ideal rate is (requests at once) / latency. Printed are
the rate of the whole run, whose end waits for the last refused requests, and that of the middle nine tenths of the
answers. The baseline is the `openai` client as its README shows it: `asyncio.gather`, a semaphore and the SDK's own
retries. Both sides send the same drafts with the same image, in turn. Each draft names its number, which the reply must
contain, so a lost, doubled or swapped answer is an error. The CPU time per request is printed too: one thread does all
the work, so its inverse bounds the rate, and unlike the rate it hardly depends on other load of the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import io
import json
import multiprocessing
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from random import Random

import openai
from PIL import Image

from src.chat.limits import Limits
from src.experts.openai import OpenAIExpert
from src.experts.prompt import Words, first, show
from src.text.tokenizer import Codec
from src.types import Draft, Failure
from testing.servers.scripted import Http, Request, Scripted, error, reply

TEXT = "A small red ring is in the upper left. A large blue square is in the upper right. Picture {number}."
ATTEMPTS = 8  # per request, on both sides


def main() -> None:
    """Print the rates of both sides and their ratio to the ideal rate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"requests": 12_000, "at-once": 64, "runs": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in {"latency": 0.05, "refused": 0.02, "retry-after": 0.2}.items():
        parser.add_argument(f"--{name}", type=float, default=default)
    options = parser.parse_args()
    drafts, ideal = make_drafts(options.requests), options.at_once / options.latency
    sys.stdout.write(
        f"{options.requests} drafts, {options.at_once} at once, {options.latency * 1e3:.0f} ms, "
        f"{options.refused:.0%} refused; ideal {ideal:.0f}/s\n"
    )
    ratios: dict[str, list[float]] = {}
    for number in range(options.runs + 1):
        for side, send in SIDES.items():
            batch = drafts if number else drafts[:1000]  # the first pair warms up
            rate, middle, summary = measure(send, batch, options, seed=number)
            if number:
                ratios.setdefault(f"{side}, whole", []).append(rate / ideal)
                ratios.setdefault(f"{side}, middle", []).append(middle / ideal)
                shares = f"{rate / ideal:6.1%} of the ideal rate, middle {middle / ideal:6.1%}"
                sys.stdout.write(f"{side:<9} {rate:6.0f}/s  {shares}   {summary}\n")
    for side, values in ratios.items():
        sys.stdout.write(f"{side:<17} median {statistics.median(values):.1%}, min {min(values):.1%}\n")


def measure(send, drafts: Sequence[Draft], options: argparse.Namespace, *, seed: int) -> tuple[float, float, str]:
    """(answers per second, the same for the middle nine tenths, a summary), against a new server."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=serve, args=(theirs, options.latency, options.refused, options.retry_after, seed))
    server.start()
    try:
        url = ours.recv()
        began, cpu_began = time.perf_counter(), time.process_time()
        times: list[float] = []
        answers = asyncio.run(send(url, drafts, options.at_once, times))
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
        ours.send("stop")
        answered, refused = ours.recv()
    finally:
        server.join()
    wrong = [draft.key for draft in drafts if answers[draft.key] != [number_of(draft.text)]]
    doubled = [number for number, count in answered.items() if count > 1]
    if wrong or doubled or len(answered) != len(drafts):
        sys.exit(
            f"{send.__name__}: {len(wrong)} answers lost, doubled or swapped, {len(doubled)} drafts answered twice"
        )
    summary = f"{cpu_seconds / len(drafts) * 1e3:.2f} ms CPU a draft, {refused} refused, 0 lost, 0 doubled"
    first, last = len(times) // 20, len(times) * 19 // 20
    return len(drafts) / seconds, (last - first) / (times[last] - times[first]), summary


async def by_expert(url: str, drafts: Sequence[Draft], at_once: int, times: list[float]) -> dict[str, list[str]]:
    """Draft numbers in the answers of our expert, by key. Appends the arrival time of each answer to `times`."""
    limits = Limits(concurrency=at_once, attempts=ATTEMPTS)
    expert = OpenAIExpert(
        codec=CODEC, model="m", base_url=url, key_env=None, profile="vllm", max_completion_tokens=500, limits=limits
    )
    numbers: dict[str, list[str]] = {}
    async for key, answer in expert.revise(drafts):
        reasons = [] if isinstance(answer, Failure) else [edit.reason for edit in answer.edits]
        numbers.setdefault(key, []).extend(reasons)
        times.append(time.perf_counter())
    return numbers


async def by_gather(url: str, drafts: Sequence[Draft], at_once: int, times: list[float]) -> dict[str, list[str]]:
    """The same from the baseline, which sends the same messages and only parses the reply as JSON."""
    semaphore, numbers = asyncio.Semaphore(at_once), {}
    async with openai.AsyncOpenAI(api_key="none", base_url=url, max_retries=ATTEMPTS) as client:

        async def request(draft: Draft) -> None:
            async with semaphore:
                messages = first(WORDS, draft, picture=show(draft.image, 1024), detail=None)
                completion = await client.chat.completions.create(model="m", messages=messages, max_tokens=500)
            edits = json.loads(completion.choices[0].message.content or "")["edits"]
            numbers.setdefault(draft.key, []).extend(edit["reason"] for edit in edits)
            times.append(time.perf_counter())

        await asyncio.gather(*map(request, drafts))
    return numbers


def serve(pipe: Connection, latency: float, refused: float, retry_after: float, seed: int) -> None:
    """The server process: sends its address, and at the end its answers per draft and its number of refusals."""
    gc.freeze()  # shorter pauses of the collector, which would count as ours
    random, counts = Random(seed), {"answered": Counter(), "refused": 0}
    with Scripted(partial(script, random, counts, latency, refused, retry_after)) as server:
        pipe.send(server.url)
        pipe.recv()
    pipe.send((counts["answered"], counts["refused"]))


def script(random: Random, counts: dict, latency: float, refused: float, retry_after: float, request: Request) -> Http:
    """A 429, or a reply with one edit whose reason is the number of the draft."""
    if random.random() < refused:
        counts["refused"] += 1
        return replace(error(429, retry_after=str(retry_after)), delay=latency)
    number = number_of(request.text)
    counts["answered"][number] += 1
    edit = {"org": "small", "target": "large", "reason": number}
    return reply(json.dumps({"right": False, "edits": [edit]}), delay=latency)


def number_of(text: str) -> str:
    return re.findall(r"Picture (\d+)\.", text)[-1]


def make_drafts(count: int) -> list[Draft]:
    stream = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(stream, "PNG")
    texts = [TEXT.format(number=number) for number in range(count)]
    common = {"steps": 8, "reference": TEXT, "sampler": {}, "fingerprint": "f", "seed": 0, "image": stream.getvalue()}
    return [
        Draft(key=f"k{n}", prompt="Describe the picture.", text=text, token_ids=CODEC.encode(text)[0], **common)
        for n, text in enumerate(texts)
    ]


CODEC = Codec.train([TEXT.format(number=number) for number in range(100)], vocab_size=400, alphabet="bytes")
WORDS = Words.load()
SIDES = {"ours": by_expert, "baseline": by_gather}

if __name__ == "__main__":
    main()
