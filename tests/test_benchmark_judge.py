"""A benchmark's stages `judge` and `score` as commands against a real server: kills, faults, resuming, no network.

The server counts requests by their bodies. Which replies were on disk when a process died is read from the store.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml

from src.evaluate import main
from src.judges.base import Request as JudgeRequest
from src.judges.store import ReplyStore
from testing.files import read_jsonl
from testing.servers.scripted import Http, Request, Scripted, error, reply
from testing.verbs import refusal
from tests.benchmarks import NUM, captions_file, write_capmas

ROOT = Path(__file__).resolve().parents[1]
AT_ONCE = 3


def judges(request: Request) -> Http:
    """A judge that always has something to say, in the form that is asked for."""
    return reply(text_for(request.text), tokens=(100, 10))


def text_for(prompt: str) -> str:
    texts = {
        "candidate description": '{"score": 80, "reason": "r"}',
        "multiple-choice": "0. A\n1. I don't know",
        "atomic claims": "1. A claim.",
        "check claims": "1. True",
    }
    return next(text for words, text in texts.items() if words in prompt)


@pytest.fixture
def argv(tmp_path):
    """The arguments of a run against a server, with further settings."""
    write_capmas(tmp_path / "raw")
    captions = captions_file(tmp_path / "mine.jsonl")

    def of(server: Scripted, *more: str) -> list[str]:
        judge = ["model=some", f"base_url={server.url}", "key_env=null", "profile=plain"]
        judge += [f"limits.concurrency={AT_ONCE}", "limits.attempts=2", "limits.give_up_s=60"]
        settings = ["conf=eval/capmas", f"captions={captions}", "stages=[judge,score]"]
        settings += [f"judge.{setting}" for setting in judge]
        return [*settings, f"evaluate.data.folder={tmp_path}/raw", f"evaluate.out={tmp_path}/out", *more]

    return of


ONLY_CLAIR = ("evaluate.judges.coverage=null", "evaluate.judges.factuality=null")


def bodies(requests: list[Request]) -> Counter[str]:
    return Counter(json.dumps(request.body, sort_keys=True) for request in requests)


def stored(tmp_path: Path) -> list[dict]:
    return [line for line in read_jsonl(tmp_path / "out" / "replies.jsonl") if "reply" in line]


def scores(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "out" / "scores.json").read_text())["mine"]


def test_a_run_asks_each_question_once_and_scores_without_network(argv, tmp_path, capsys, monkeypatch):
    with Scripted(judges) as server:
        main(argv(server))
        asked = bodies(server.requests)
        assert asked.total() == len(asked) == 4 * NUM  # CLAIR, Coverage, and two of Factuality
        main(argv(server))  # nothing is left to ask
        assert len(server.requests) == 4 * NUM
        images = [body for body in map(json.loads, asked) if isinstance(body["messages"][-1]["content"], list)]
        assert len(images) == NUM
        url = images[0]["messages"][-1]["content"][0]["image_url"]["url"]
        assert url.startswith("data:image/jpeg;base64,/9j/")
        stats = scores(tmp_path)["stats"]
        assert stats["clair"] == {"mean": 0.8, "se": pytest.approx(0, abs=1e-9), "n": NUM}
        assert (stats["coverage"]["mean"], stats["coverage_abstained"]["mean"]) == (0.5, 0.5)
        assert (stats["factuality"]["mean"], stats["words"]["mean"]) == (1.0, 4.0)
        printed = capsys.readouterr().out
        assert "| mine   | 80.00 " in printed and f"CapMAS, {NUM} texts: mean ± standard error over texts; " in printed
        assert "times 100: clair, coverage, factuality and their parts, but not numbers of claims." in printed
        command = argv(server, "stages=[score]")
    files = {name: (tmp_path / "out" / name).read_bytes() for name in ("scores.json", "verdicts.jsonl", "table.md")}
    (tmp_path / "out" / "scores.json").unlink()
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a connection"))
    main(command)
    assert {name: (tmp_path / "out" / name).read_bytes() for name in files} == files


@pytest.mark.slow
@pytest.mark.dist
def test_a_kill_asks_no_stored_reply_again_and_counts_what_was_in_flight(argv, tmp_path):
    def slow_after_seven(request: Request) -> Http:
        answer = judges(request)
        answer.delay = 0.0 if request.number < 7 else 300.0
        return answer

    command = [sys.executable, "-m", "src.evaluate"]
    with Scripted(slow_after_seven) as server:
        process = subprocess.Popen([*command, *argv(server)], cwd=ROOT, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 240
        while server.active < AT_ONCE or len(stored(tmp_path)) < 7:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        with (tmp_path / "out" / "replies.jsonl").open("a") as stream:
            stream.write('{"reply": "abc", "te')  # as a kill within a write leaves it
        first, kept = bodies(server.requests), {line["reply"] for line in stored_whole(tmp_path)}
        server.script = judges
        server.requests.clear()
        done = subprocess.run([*command, *argv(server)], cwd=ROOT, capture_output=True, text=True, check=True)
        second = bodies(server.requests)
    assert len(kept) == 7 and first.total() == 7 + AT_ONCE
    assert f"{AT_ONCE} requests were in flight when an earlier run was killed" in done.stderr
    assert "dropped a partial last line" in done.stderr
    twice = (first & second).total()
    assert twice == AT_ONCE  # those in flight and no other
    assert (first | second).total() == len(first | second) == 4 * NUM
    assert kept < {line["reply"] for line in stored(tmp_path)}
    assert scores(tmp_path)["counts"]["clair"]["ok"] == NUM


def stored_whole(tmp_path: Path) -> list[dict]:
    lines = (tmp_path / "out" / "replies.jsonl").read_text().split("\n")[:-1]
    return [line for line in map(json.loads, lines) if "reply" in line]


def test_only_what_has_changed_is_asked(argv, tmp_path):
    with Scripted(judges) as server:
        main(argv(server))
        server.requests.clear()
        # 1. other words for one metric
        prompts = tmp_path / "prompts"
        prompts.mkdir()
        texts = yaml.safe_load((ROOT / "src/judges/prompts/clair.yaml").read_text())
        system = next(key for key in texts if key.startswith("score."))
        (prompts / "clair.yaml").write_text(yaml.safe_dump({**texts, system: f"Please. {texts[system]}"}))
        main(argv(server, f"evaluate.judges.clair.prompts={prompts}"))
        assert len(server.requests) == NUM and all("Please. " in request.text for request in server.requests)
        # 2. one other caption
        server.requests.clear()
        captions_file(tmp_path / "mine.jsonl", first="Something else is here.")
        main(argv(server))
        assert len(server.requests) == 3  # the reply about its claims is the same
        # 3. another setting of the judge: everything
        server.requests.clear()
        main(argv(server, "judge.seed=null", "judge.max_tokens=99", *ONLY_CLAIR))
        assert len(server.requests) == NUM


def test_replies_that_cannot_be_read_are_asked_again_and_counted(argv, tmp_path, capsys):
    bad = iter(['{"score": 0.85}', None, '{"score": 850}'])

    def some_bad(request: Request) -> Http:
        if "number 0" not in request.text:
            return judges(request)
        text = next(bad)
        return reply('{"score": 40, "reason": "r"}', finish="length") if text is None else reply(text)

    with Scripted(some_bad) as server:
        assert f"mine: clair: {1 / NUM:.1%} of the verdicts failed" in refusal(main, argv(server, *ONLY_CLAIR), capsys)
        main(argv(server, *ONLY_CLAIR, "evaluate.max_failed=0.5"))  # asks nothing more
        assert len(server.requests) == NUM + 2
    result = scores(tmp_path)
    assert result["stats"]["clair"]["n"] == NUM - 1
    assert result["stats"]["clair_worst"]["mean"] == pytest.approx(0.8 * (NUM - 1) / NUM)
    assert result["counts"]["clair"] == {"no_caption": 0, "ok": NUM + 1, "length": 1}


REFUSALS = {  # forms in which servers refuse, and what the store says
    "refusal": reply(None, refusal="I cannot help with that."),
    "content_filter": error(400, "The response was filtered: content_filter", code="content_filter"),
    "empty": reply(""),
}


@pytest.mark.parametrize("status", REFUSALS)
def test_a_refused_caption_fails_in_every_metric_and_is_not_asked_about_anew(argv, tmp_path, status):
    def refuse_the_first(request: Request) -> Http:
        return REFUSALS[status] if "number 0" in request.text else judges(request)

    with Scripted(refuse_the_first) as server:
        for _ in range(2):  # the second time asks nothing
            main(argv(server, "evaluate.max_failed=0.5"))
            asked = len(server.requests)
            assert asked == 4 * (NUM - 1) + 3 * 3  # three attempts at each of the three first questions about it
    result = scores(tmp_path)
    for name in ("clair", "coverage", "factuality"):
        assert result["counts"][name] == {"no_caption": 0, "ok": result["counts"][name]["ok"], status: 3}
        assert result["stats"][f"{name}_failed"]["mean"] == pytest.approx(1 / NUM)
        assert result["stats"][f"{name}_worst"]["mean"] == pytest.approx(result["stats"][name]["mean"] * (1 - 1 / NUM))


def test_a_budget_leaves_the_rest_open_for_the_next_run(argv, tmp_path, capsys):
    with Scripted(judges) as server:
        limits = ("judge.limits.max_requests=2", "evaluate.max_failed=0.9")
        main(argv(server, *ONLY_CLAIR, *limits))
        main(argv(server, *ONLY_CLAIR, *limits))  # the budget is that of both runs
        assert len(server.requests) == 2
        assert f"{NUM - 2} verdicts open (budget {NUM - 2})" in capsys.readouterr().out


def test_what_was_lost_in_flight_stays_on_the_bill(tmp_path):
    """Twice killed while the same request was in flight, and then answered."""
    most, reply = {"prompt_tokens": 9, "completion_tokens": 4}, {"usage": {"requests": 1, "prompt_tokens": 8}}
    for _ in range(2):
        with ReplyStore(tmp_path / "replies.jsonl") as store:
            store.begin("a", most)
    with ReplyStore(tmp_path / "replies.jsonl") as store:
        assert store.lost == {"a": most}
        store.begin("a", most)
        store.add("a", reply)
    store = ReplyStore(tmp_path / "replies.jsonl")
    assert not store.lost and set(store.replies) == {"a"}
    lost = {"lost_prompt_tokens": 18, "lost_completion_tokens": 8}
    assert store.usage == {"requests": 1, "prompt_tokens": 8, **lost}


KILLED = """
import os, signal, sys
from src.evaluate import main
replace, left = os.replace, int(sys.argv[1])
def replace_or_die(*names):
    global left
    left -= 1
    os.kill(os.getpid(), signal.SIGKILL) if left < 0 else replace(*names)
os.replace = replace_or_die
main(sys.argv[2:])
"""


@pytest.mark.slow
@pytest.mark.dist
def test_a_kill_while_scoring_leaves_whole_files_and_a_rerun_makes_the_same(argv, tmp_path):
    names = ("scores.json", "verdicts.jsonl", "items.jsonl", "table.md")
    with Scripted(judges) as server:
        main(argv(server))
        command, asked = argv(server, "stages=[score]"), len(server.requests)
        files = {name: (tmp_path / "out" / name).read_bytes() for name in names}
        for name in names:
            (tmp_path / "out" / name).unlink()
        for done in (0, 2):  # files that got their names before the kill
            killed = subprocess.run([sys.executable, "-c", KILLED, str(done), *command], cwd=ROOT, capture_output=True)
            assert killed.returncode == -signal.SIGKILL
            there = {
                name: (tmp_path / "out" / name).read_bytes() for name in names if (tmp_path / "out" / name).exists()
            }
            assert there == {name: files[name] for name in names[:done]}
        main(command)
        assert len(server.requests) == asked
    assert {name: (tmp_path / "out" / name).read_bytes() for name in names} == files


@pytest.mark.parametrize(
    ("model", "sent", "unsent"),
    [
        ("gpt-5.1", {"max_completion_tokens": 4096, "reasoning_effort": "low"}, ("temperature", "max_tokens")),
        ("gpt-4.1", {"max_completion_tokens": 4096, "temperature": 0.0, "seed": 3}, ("max_tokens", "reasoning_effort")),
        ("o4-mini", {"max_completion_tokens": 4096}, ("temperature", "max_tokens")),
    ],
)
def test_what_a_model_does_not_accept_is_not_sent_and_the_store_says_what_was(argv, tmp_path, model, sent, unsent):
    with Scripted(judges) as server:
        more = [f"judge.model={model}", "judge.profile=auto", "judge.effort=low", "judge.seed=3"]
        main(argv(server, *ONLY_CLAIR, *more))
    body = server.requests[0].body
    assert body.items() >= sent.items() and not body.keys() & set(unsent)
    assert body["response_format"]["json_schema"]["name"] == "score"
    for line in stored(tmp_path):
        assert line["parameters"] == {k: v for k, v in body.items() if k not in ("model", "messages")}
        assert re.fullmatch(r"20\d\d-\d\d-\d\dT[\d:]+\+00:00", line["at"]) and line["model"] == "served"


def test_a_dry_run_says_what_the_judge_would_take_and_sends_nothing(argv, tmp_path, capsys):
    prices = (
        "judge.limits.prices={target: src.chat.budget.Prices, input: 1000000.0, output: 0.0}"  # a dollar for a token
    )
    with Scripted(judges) as server:
        main(argv(server, "dry=true", "judge.key_env=NO_SUCH_KEY", prices))
        lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.strip().split("\n"))
        assert server.requests == [] and not (tmp_path / "out" / "replies.jsonl").exists()
        main(argv(server))
        asked = len(server.requests)
    assert asked == 4 * NUM and lines["in all"].startswith(f"{asked} requests, ")
    assert lines["clair"].startswith(f"{NUM} requests, ") and lines["factuality"].startswith(f"{2 * NUM} requests, ")
    tokens, dollars = re.search(r"([\d,]+) prompt tokens.*, ([\d.]+) dollars", lines["in all"]).groups()  # pyright: ignore[reportOptionalMemberAccess]
    assert float(dollars) == float(tokens.replace(",", "")) > 1000 * NUM  # an image each
    with Scripted(judges) as server:
        capsys.readouterr()
        main(argv(server, "dry=true"))
        assert "in all: 0 requests" in capsys.readouterr().out and server.requests == []


def test_the_spread_of_repeated_verdicts_is_reported(argv, tmp_path):
    """The judge says 80, then 60, then 70 of the same caption."""
    times: Counter[str] = Counter()

    def fickle(request: Request) -> Http:
        times[request.text] += 1
        return reply(f'{{"score": {(80, 60, 70)[times[request.text] - 1]}, "reason": "r"}}')

    several = ("judge.limits.concurrency=1", "evaluate.replicates.times=3", "evaluate.replicates.images=2")
    with Scripted(fickle) as server:
        main(argv(server, *ONLY_CLAIR, *several))
        assert len(server.requests) == NUM + 2 * 2
    stats = scores(tmp_path)["stats"]
    assert stats["clair"]["mean"] == pytest.approx(0.8)  # of the first time
    assert stats["clair_replicate_sd"] == {"mean": pytest.approx(0.1), "se": None, "n": 3}
    assert stats["clair_image_sd"]["mean"] == pytest.approx(0.1) and stats["clair_image_sd"]["n"] == 2


def test_further_fields_may_not_replace_the_model_or_the_messages(argv, capsys):
    with Scripted(judges) as server, pytest.raises(SystemExit):
        main(argv(server, "judge.extra={model: another}"))
    assert "extra: 'model' is not to be replaced" in capsys.readouterr().err and not server.requests


def test_an_image_is_hashed_anew_only_if_its_file_has_changed(tmp_path):
    file = tmp_path / "a.jpg"
    file.write_bytes(b"one")
    os.utime(file, ns=(0, 0))
    request = JudgeRequest(step="s", images=(file,))
    first = request.digest("m")
    file.write_bytes(b"two")
    os.utime(file, ns=(0, 0))  # as if it had not been written
    assert request.digest("m") == first
    os.utime(file, ns=(1, 1))
    assert request.digest("m") != first


def test_a_benchmark_without_a_judge_makes_its_folder(argv, tmp_path):
    with Scripted(judges) as server:
        main(argv(server, "judge=null", *ONLY_CLAIR, "evaluate.judges.clair=null", f"evaluate.out={tmp_path}/a/b"))
    assert {path.name for path in (tmp_path / "a" / "b").iterdir()} >= {"scores.json", "verdicts.jsonl", "table.md"}
    result = json.loads((tmp_path / "a" / "b" / "scores.json").read_text())["mine"]
    assert result["stats"]["words"]["n"] == NUM and result["judged"] is None


def test_missing_captions_are_an_error_before_a_judge_is_asked(argv, tmp_path, capsys):
    (tmp_path / "mine.jsonl").write_text("".join((tmp_path / "mine.jsonl").read_text().splitlines(keepends=True)[:-1]))
    with Scripted(judges) as server:
        settings = argv(server, "judge=null", *ONLY_CLAIR, "evaluate.judges.clair=null")
        message = f"mine: 1 captions of {NUM} are missing, aar_test_04604 among them; make them, or set evaluate.max_"
        assert message in refusal(main, settings, capsys)
        assert message in refusal(main, argv(server), capsys) and not server.requests  # before anything is paid for
        main([*settings, "evaluate.max_failed=0.2"])
        assert "; 1 missing" in capsys.readouterr().out
        assert "num must be at least 1, got 0" in refusal(main, [*settings, "evaluate.num=0"], capsys)
