"""What hostile servers, settings and disks do to a round: each is one error, or counted, and nothing paid is lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import src.revise
from src.chat.journal import Journal
from src.experts.reply import MOST_EDITS, read_reply
from src.io.shards import read_manifest
from src.types import Failure, Revision
from testing.servers.scripted import Http, Request, Scripted, completion, error, reply
from tests.test_openai_round import BASE, NUM, corrects, drafts, revise  # noqa: F401
from tests.test_rounds import a_draft, digests


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("expert.extra={max_completion_tokens: 60000}", "extra must not hold max_completion_tokens"),
        ("expert.extra={n: 8, messages: []}", "extra must not hold messages, n"),
        ("expert.limits.requests_per_minute=.nan", "limits.requests_per_minute must be above 0"),
        ("expert.base_url=127.0.0.1:8000/v1", "base_url must begin with http:// or https://"),
        ("expert.base_url=http://user:word@host/v1", "without a password"),
        ("expert.key_env=NO_KEY", "the environment variable NO_KEY holds no key"),
        ("expert.key_env=BAD_KEY", "the environment variable BAD_KEY holds no key, or one with blanks"),
        ("deadline_minutes=.nan", "deadline_minutes must be a number above 0"),
        ("deadline_minutes=a", "deadline_minutes must be a number above 0"),
        ("per_shard=0", "per_shard must be at least 1"),
        ("requests=a results=b", "give one of them"),
    ],
)
def test_settings_are_refused_before_anything_is_asked(
    drafts,  # noqa: F811
    tmp_path,
    capsys,
    monkeypatch,
    setting: str,
    told: str,
) -> None:
    monkeypatch.setenv("BAD_KEY", "sk-secret\n")
    with Scripted(corrects) as server, pytest.raises(SystemExit) as ended:
        revise(drafts, tmp_path / "round", server, *([setting] if "{" in setting else setting.split(" ")))
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert told in message
    assert "secret" not in message
    assert ":word" not in message
    assert not server.requests


def test_usage_that_no_reply_has_counts_as_none(drafts, tmp_path) -> None:  # noqa: F811
    def vast(request: Request) -> Http:
        body = completion('{"right": true, "edits": []}')
        body["usage"] = {"prompt_tokens": 10**400, "completion_tokens": 5}
        return Http(200, json.dumps(body).encode())

    with Scripted(vast) as server:
        revise(drafts, tmp_path / "round", server)
        assert len(server.requests) == NUM
    manifest = read_manifest(tmp_path / "round")
    assert manifest["counts"]["right"] == NUM
    assert manifest["usage"]["prompt_tokens"] < 10**6


def test_a_flood_of_edits_is_cut() -> None:
    edits = [{"org": f"a{n}", "target": "b"} for n in range(3000)]
    found, malformed_items = read_reply(json.dumps({"right": False, "edits": edits}))
    assert len(found) == MOST_EDITS
    assert malformed_items == len(edits) - MOST_EDITS


def test_a_key_that_a_server_echoes_is_in_no_file(drafts, tmp_path, monkeypatch) -> None:  # noqa: F811
    key = "sk-very-secret-0123456789"
    monkeypatch.setenv("ECHO_KEY", key)
    with Scripted(lambda request: reply(f"I was asked with {request.headers['authorization']}.")) as server:
        revise(drafts, tmp_path / "round", server, "expert.key_env=ECHO_KEY")
    assert read_manifest(tmp_path / "round")["failures"] == {"malformed": NUM}
    for file in (tmp_path / "round").iterdir():
        assert key.encode() not in file.read_bytes()


def test_a_request_that_no_server_understood_yet_is_asked_again(drafts, tmp_path, capsys) -> None:  # noqa: F811
    with Scripted(lambda request: error(400, "what?")) as server, pytest.raises(SystemExit):
        revise(drafts, tmp_path / "round", server)
    assert "every request is rejected" in capsys.readouterr().err
    with Scripted(corrects) as server:
        revise(drafts, tmp_path / "round", server)
    assert read_manifest(tmp_path / "round")["counts"]["revised"] == NUM


def test_a_round_of_another_expert_is_not_read_again(drafts, tmp_path, capsys) -> None:  # noqa: F811
    out = tmp_path / "round"
    with Scripted(corrects) as server:
        revise(drafts, out, server)
        before = digests(out)
        for way in ("reread=true", "again=true"):
            with pytest.raises(SystemExit):
                revise(drafts, out, server, way, "expert.model=other")
            assert "is a round made with another expert" in capsys.readouterr().err
            with pytest.raises(SystemExit):
                revise(drafts, tmp_path / "none", server, way)
            assert "there is no round" in capsys.readouterr().err
    assert digests(out) == before


def test_what_a_full_disk_took_half_of_is_not_in_the_way(tmp_path: Path) -> None:
    """Half a line is written, then nothing; the next answers find room again, in the same process."""
    room: list[int | None] = [2]

    class Narrow:
        """The file, of a disk with room for two lines and a half."""

        def __init__(self, stream) -> None:
            self.stream = stream

        def write(self, data) -> int:
            if room[0]:
                room[0] -= 1
                return self.stream.write(data)
            if room[0] == 0:
                room[0] = None
                return self.stream.write(data[: len(data) // 2])
            raise OSError(28, "No space left on device")

        def fileno(self) -> int:
            return self.stream.fileno()

        def close(self) -> None:
            self.stream.close()

    with Journal(tmp_path / "j", expert="e") as journal:
        journal._stream = Narrow(journal._stream)  # type: ignore[assignment]
        journal.add_all([(a_draft("a"), Revision(()))])
        journal.add_all([(a_draft("b"), Revision(()))])
        with pytest.raises(OSError, match="No space"):
            journal.add_all([(a_draft("c"), Revision(()))])
        room[0] = 100
        journal.add_all([(a_draft("d"), Failure("refused"))])
    with Journal(tmp_path / "j", expert="e") as journal:
        assert [journal.answer(a_draft(key)) is not None for key in "abcd"] == [True, True, False, True]
    assert len((tmp_path / "j").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    "line", ["[" * 100_000 + "]" * 100_000, "", '{"custom_id": "x", "response": {"status_code": []}}']
)
def test_results_of_any_kind_are_told_or_counted(drafts, tmp_path, capsys, line: str) -> None:  # noqa: F811
    (tmp_path / "results.jsonl").write_text(f"{line}\n")
    command = ["conf=revise,expert/openai", f"drafts={drafts}", f"out={tmp_path}/round", f"tokenizer={BASE}"]
    command += ["expert.key_env=null", f"results={tmp_path}/results.jsonl"]
    if line.startswith("["):
        with pytest.raises(SystemExit):
            src.revise.main(command)
        assert "line 1 is not a batch result" in capsys.readouterr().err
    else:
        src.revise.main(command)
        assert read_manifest(tmp_path / "round")["counts"]["unanswered"] == NUM
