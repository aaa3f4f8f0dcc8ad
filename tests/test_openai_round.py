"""A round by the `revise` verb with the expert of an OpenAI-compatible server: what it costs, what a stop keeps."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import src.draft
import src.revise
import src.train
from src.io.shards import read_manifest
from src.scenes.graph import COLOURS
from testing.files import read_jsonl
from testing.scenes import BASE, write_scenes
from testing.servers.scripted import Http, Request, Scripted, error, reply
from testing.verbs import refusal
from tests.test_rounds import digests, journaled

NUM = 12


@pytest.fixture(scope="module")
def drafts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("drafts")
    write_scenes(folder / "data", num_train=NUM, num_val=1, num_test=1)
    src.draft.main(["conf=draft", f"model.path={BASE}", f"data.path={folder}/data", f"out={folder}/drafts",
                    "tokens_per_step=[16]", "data.batch_size=4"])  # fmt: skip
    return folder / "drafts"


def corrects(request: Request) -> Http:
    """Another colour for the first one that the draft names once."""
    draft = request.text.split("Draft:\n")[-1]
    edits = []
    for word in [word for word in COLOURS if len(re.findall(rf"\b{word}\b", draft)) == 1][:1]:
        other = next(colour for colour in COLOURS if colour != word)
        edits = [{"org": word, "target": other, "kind": "attribute", "reason": "colour"}]
    return reply(json.dumps({"right": not edits, "edits": edits}), tokens=(500, 20))


def revise(drafts: Path, out: Path, server: Scripted, *more: str) -> None:
    expert = [f"expert.base_url={server.url}", "expert.key_env=null", "expert.model=some", "expert.repair=0"]
    prices = "expert.limits.prices={target: src.chat.budget.Prices, input: 1000, output: 1000}"
    expert += [prices, "expert.limits.attempts=2"]
    folders = [f"drafts={drafts}", f"out={out}", f"tokenizer={BASE}"]
    src.revise.main(["conf=revise,expert/openai", *folders, *expert, *more])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("expert.extra={n: 8, max_completion_tokens: 60000}", "extra must not hold max_completion_tokens, n"),
        ("expert.limits.requests_per_minute=.nan", "limits.requests_per_minute must be above 0"),
        ("expert.base_url=127.0.0.1:8000/v1", "base_url must begin with http:// or https://"),
        ("expert.base_url=http://user:word@host/v1", "without a password"),
        ("expert.key_env=NO_KEY", "the environment variable NO_KEY holds no key"),
        ("expert.key_env=BAD_KEY", "the environment variable BAD_KEY holds no key, or one with blanks"),
        ("deadline_minutes=.nan", "deadline must be above 0"),
        ("per_shard=0", "per_shard must be above 0"),
        ("requests=a results=b", "give one of them"),
    ],
)
def test_wrong_settings_are_refused_before_a_request(drafts, tmp_path, capsys, monkeypatch, setting, message):
    monkeypatch.setenv("BAD_KEY", "sk-secret\n")
    with Scripted(corrects) as server, pytest.raises(SystemExit) as ended:
        revise(drafts, tmp_path / "round", server, *([setting] if "{" in setting else setting.split(" ")))
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert "secret" not in printed
    assert ":word" not in printed
    assert not server.requests


def test_a_dry_run_prints_the_cost_and_needs_no_key(drafts, tmp_path, capsys):
    with Scripted(corrects) as server:
        revise(drafts, tmp_path / "round", server, "dry=true", "expert.key_env=NO_KEY")
        assert not server.requests
    printed = capsys.readouterr().out
    pattern = rf"{NUM} drafts: {NUM} requests, ([\d,]+) prompt tokens, 1,800 completion tokens, ([\d.]+) dollars"
    numbers = re.match(pattern, printed)
    assert numbers, printed
    prompts = int(numbers[1].replace(",", ""))
    assert float(numbers[2]) == pytest.approx((prompts + 1800) / 1000, abs=0.01)
    assert NUM * 500 < prompts < NUM * 3000
    assert not (tmp_path / "round").exists()


def test_nothing_that_sends_no_request_needs_a_key(drafts, tmp_path, monkeypatch, capsys):
    """Neither with the key's variable in the configuration, nor with that of the class."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    base = [f"drafts={drafts}", f"out={tmp_path / 'round'}", f"tokenizer={BASE}"]
    own = "expert={target: src.experts.openai.OpenAIExpert, model: o4-mini}"
    for expert in (["conf=revise,expert/openai"], ["conf=revise", own]):
        for way in ("dry=true", f"requests={tmp_path / 'requests.jsonl'}"):
            src.revise.main([*expert, *base, way])
            assert f"{NUM} requests" in capsys.readouterr().out
        assert "OPENAI_API_KEY holds no key" in refusal(src.revise.main, [*expert, *base], capsys)


def test_a_round_counts_what_it_took(drafts, tmp_path, capsys):
    with Scripted(corrects) as server:
        revise(drafts, tmp_path / "round", server)
    manifest = read_manifest(tmp_path / "round")
    assert manifest["usage"]["requests"] == len(server.requests) == NUM
    assert manifest["usage"]["prompt_tokens"] == 500 * NUM
    assert manifest["usage"]["cost"] == pytest.approx(0.52 * NUM)
    assert 0 < manifest["latency"]["p50"] <= manifest["latency"]["p99"]
    assert manifest["counts"]["written"] == manifest["counts"]["edits"] == manifest["usage"]["proposed"] >= 2
    assert manifest["kinds"] == {"attribute": manifest["counts"]["edits"]}
    assert f"kinds of mistakes: attribute {manifest['counts']['edits']}\n" in capsys.readouterr().out
    assert manifest["waited"] >= 0


def test_what_was_spent_before_a_stop_counts(drafts, tmp_path, capsys):
    """The account is empty in the middle; the same command goes on, within the limit of both."""

    def until_empty(request: Request) -> Http:
        return corrects(request) if request.number < 5 else error(402, "no money")

    one = ["expert.limits.concurrency=1", "expert.limits.max_requests=9"]
    with Scripted(until_empty) as server, pytest.raises(SystemExit):
        revise(drafts, tmp_path / "round", server, *one)
    assert "the account is empty" in capsys.readouterr().err
    with Scripted(corrects) as server:
        revise(drafts, tmp_path / "round", server, *one)
    assert len(server.requests) == 4  # 9 in all
    manifest = read_manifest(tmp_path / "round")
    assert manifest["failures"] == {"budget": NUM - 9}
    assert manifest["usage"]["requests"] == 9
    keys = journaled(tmp_path / "round")
    assert len([key for key in set(keys) if key]) == NUM


def test_a_finished_round_can_be_asked_again_where_that_helps(drafts, tmp_path, capsys):
    with Scripted(corrects) as server:
        revise(drafts, tmp_path / "whole", server)
        revise(drafts, tmp_path / "round", server, "expert.limits.max_requests=5")
        assert f"again=true asks about {NUM - 5} of them once more (budget {NUM - 5})" in capsys.readouterr().out
        before = len(server.requests)
        revise(drafts, tmp_path / "round", server)  # finished is finished
        assert len(server.requests) == before
        revise(drafts, tmp_path / "round", server, "again=true")
        assert len(server.requests) == before + NUM - 5
        revise(drafts, tmp_path / "round", server, "again=true")
        assert len(server.requests) == before + NUM - 5
    assert digests(tmp_path / "round") == digests(tmp_path / "whole")


def test_kept_replies_can_be_read_again_without_a_call(drafts, tmp_path, capsys):
    """The replies in the journal are changed, as if an earlier version had read them otherwise."""
    out = tmp_path / "round"
    with Scripted(corrects) as server:
        revise(drafts, tmp_path / "whole", server)
        revise(drafts, out, server)
        count, (journal,) = len(server.requests), out.glob("journal*")
        lines = read_jsonl(journal)
        for line in lines:
            if line["revision"]["edits"]:
                line["revision"]["edits"][0]["target"] = "nothing"
        revision = lines[0].pop("revision")
        revision.pop("edits")
        lines[0]["failure"] = {**revision, "reason": "malformed", "retry": True}
        journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
        revise(drafts, out, server, "reread=true")
        assert len(server.requests) == count
    assert digests(out) == digests(tmp_path / "whole")


def test_by_file_is_the_same_round(drafts, tmp_path, capsys):
    """The lines go to a server that answers them as it would one by one, in another order, but for two."""
    with Scripted(corrects) as server:
        revise(drafts, tmp_path / "whole", server)
        bodies = [request.body for request in server.requests]
        revise(drafts, tmp_path / "round", server, f"requests={tmp_path}/requests.jsonl", "expert.key_env=NO_KEY")
        lines = read_jsonl(tmp_path / "requests.jsonl")
        assert sorted(json.dumps(line["body"]) for line in lines) == sorted(map(json.dumps, bodies))
        results = []
        for line in reversed(lines):
            body = json.loads(corrects(Request(0, "", {}, line["body"], 0.0)).body)
            results.append(
                {"custom_id": line["custom_id"], "response": {"status_code": 200, "body": body}, "error": None}
            )
        results[3] |= {"response": None, "error": {"code": "batch_expired", "message": "too late"}}
        results[4]["response"] = {"status_code": 500, "body": {"error": {"message": "no"}}}
        results.append({**results[0], "custom_id": "somebody else's"})
        (tmp_path / "results.jsonl").write_text("".join(json.dumps(result) + "\n" for result in results))
        del server.requests[:]
        with_results = f"results={tmp_path}/results.jsonl"
        revise(drafts, tmp_path / "part", server, with_results)
        assert not server.requests
        printed = capsys.readouterr().out
        assert f"results.jsonl: {NUM - 2} answered, 2 failed, 1 unknown" in printed
        part = read_manifest(tmp_path / "part")
        assert part["failures"] == {"not_processed": 1, "status_500": 1}
        assert part["usage"]["prompt_tokens"] == 500 * (NUM - 2)
        with pytest.raises(SystemExit):
            revise(drafts, tmp_path / "part", server, f"requests={tmp_path}/more.jsonl")
        revise(drafts, tmp_path / "part", server, f"requests={tmp_path}/more.jsonl", "again=true")
        assert len((tmp_path / "more.jsonl").read_text().splitlines()) == 2
        (tmp_path / "results.jsonl").write_text('{"id": 3}\n')
        with pytest.raises(SystemExit):
            revise(drafts, tmp_path / "none", server, with_results)
        assert "results.jsonl: line 1 is not a batch result" in capsys.readouterr().err


def training(drafts: Path, run_dir: Path, server: Scripted) -> list[str]:
    """Two rounds of six drafts, two steps after each."""
    data = [f"data.path={drafts.parent}/data", f"tokenizer={BASE}", f"model.path={BASE}", "data.batch_size=4"]
    quick = ["callbacks.samples=null", "callbacks.progress=null", "callbacks.throughput=null", "data.workers=0"]
    rounds = [
        f"callbacks.self_correction.{name}" for name in ("rounds=2", "drafts_per_round=6", "tokens_per_step=[16]")
    ]
    steps = ["trainer.max_steps=4", "data.epoch_batches=2", "optim.warmup_steps=1", "trainer.devices=1"]
    steps += ["trainer.accelerator=cpu", "trainer.limit_val_batches=0", "callbacks.self_correction.allow_empty=true"]
    expert = [f"expert.base_url={server.url}", "expert.key_env=null", "expert.model=some", "expert.repair=0"]
    conf = "conf=stage2,expert/openai"
    return [conf, f"run_dir={run_dir}", *data, *quick, *rounds, *steps, *expert, "expert.limits.concurrency=2"]


def test_an_expert_that_refuses_in_a_training_loses_nothing(drafts, tmp_path, capsys):
    """In the second round: one line, and the answers are kept."""
    folder = tmp_path / "run"
    requests = []

    def until_empty(request: Request) -> Http:
        requests.append(request)
        return error(402, "no money") if len(requests) > 10 else corrects(request)

    with Scripted(until_empty) as server, pytest.raises(SystemExit) as ended:
        src.train.main(training(drafts, folder, server))
    assert ended.value.code == 2
    assert "error: the account is empty" in capsys.readouterr().err
    (journal,) = (folder / "rounds" / ".round-0002.partial").glob("journal*")
    answered = len(journal.read_text().splitlines())
    assert answered >= 2
    with Scripted(corrects) as server:
        src.train.main(training(drafts, folder, server))
        assert len(server.requests) == 6 - answered


def test_a_training_does_not_wait_longer_than_its_deadline_and_asks_again_later(drafts, tmp_path):
    """Two at once, a second a reply: the first round has a few of its six drafts, the second takes the others up."""
    slow = lambda request: replace(corrects(request), delay=1.0 if request.number < 4 else 0.0)  # noqa: E731
    folder = tmp_path / "run"
    with Scripted(slow) as server:
        argv = [*training(drafts, folder, server), "callbacks.self_correction.deadline_minutes=0.02"]
        src.train.main([*argv, "callbacks.self_correction.train_from=start"])
        requests = len(server.requests)
    first, second = (read_manifest(folder / "rounds" / f"round-000{number}") for number in (1, 2))
    late = first["failures"]["deadline"]
    assert 0 < late < 6
    assert second["counts"]["late"] == late
    assert second["counts"]["revised"] + second["counts"]["failed"] == 6 + late
    assert requests == first["usage"]["requests"] + second["usage"]["requests"]
    events = EventAccumulator(str(folder)).Reload()
    tags = {"round/late", "round/failures/deadline", "round/waited_s", "round/yield", "round/usage/requests"}
    assert tags <= set(events.Tags()["scalars"])
    assert [event.value for event in events.Scalars("round/late")] == [0, late]
