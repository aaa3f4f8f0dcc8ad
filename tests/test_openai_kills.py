"""A training with an expert behind a server, killed in every phase of a round: what its repetition asks, makes, trains.

The server numbers its replies. Which of them are in a journal when a rank has died, and which question was asked how
often, is compared by these numbers and by the texts of the requests.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from src.io.shards import read_manifest
from testing.scenes import BASE, write_scenes
from testing.servers.scripted import Http, Request, Scripted, reply
from tests.ranks import Done, Kill, Ranks
from tests.test_processes import NUM, common, rounds, same

pytestmark = [pytest.mark.dist, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
AT_ONCE = 4  # requests of both ranks together
SERVER = "import sys; sys.path.insert(0, {root!r}); import src.experts.openai; from tests.ranks import serve; serve()"

DRAFT = "src.rounds.drafts:Drafter.draw"
QUESTION = "src.chat.client:Client._send"
READ = "src.experts.openai:read_replies"
KEEP = "src.chat.journal:Journal.add_all"
STEP = "src.objectives.base:Objective.training_step"
SLOW = pytest.mark.slow


def corrects(request: Request) -> Http:
    """Another word for the first one that the draft holds once."""
    words = re.findall(r"[a-z]+", request.text.split("Draft:\n")[-1])
    once = [word for word in words if words.count(word) == 1 and word != "ring"]
    edits = [{"org": word, "target": "ring", "reason": "so it is"} for word in once[:1]]
    answer = {"right": not edits, "edits": edits, "number": request.number}
    return reply(json.dumps(answer), tokens=(500, 20), delay=0.02)


class Course:
    """Runs of one training against one server. `new`: the requests since they were last asked for."""

    def __init__(self, ranks: Ranks, server: Scripted, data: Path) -> None:
        self.ranks, self.server, self.data, self.seen = ranks, server, data, 0

    def train(self, folder: Path, *, kill: Sequence[Kill] = (), world: int = 2) -> Done:
        """Two rounds, at the start and after two steps; four steps."""
        loop = ["rounds=2", f"drafts_per_round={NUM}", "tokens_per_step=[16]", "per_shard=3"]
        expert = [f"base_url={self.server.url}", "key_env=null", "model=some", "repair=0"]
        expert += [f"limits.concurrency={AT_ONCE}", "limits.pause_s=0.1"]
        argv = [
            f"conf=stage2,expert/openai{',parallel/fsdp2' if world > 1 else ''}",
            f"run_dir={folder}/run",
            f"model.path={BASE}",
        ]
        argv += [*common(self.data), "trainer.max_steps=4", "data.epoch_batches=2", f"trainer.devices={world}"]
        argv += [f"callbacks.self_correction.{setting}" for setting in loop]
        argv += [f"expert.{setting}" for setting in expert]
        return self.ranks.run(argv, out=folder, kill=list(kill), world=world)

    def new(self) -> list[Request]:
        requests = self.server.requests[self.seen :]
        self.seen += len(requests)
        return requests


@pytest.fixture(scope="module")
def course(tmp_path_factory) -> Iterator[Course]:
    folder = tmp_path_factory.mktemp("data")
    write_scenes(folder / "scenes")
    with pytest.MonkeyPatch.context() as patch, Scripted(corrects) as server:
        patch.setattr("tests.ranks.SERVER", SERVER)  # to import the SDK takes as long as all the rest of a start
        with Ranks() as ranks:
            yield Course(ranks, server, folder / "scenes")


@pytest.fixture(scope="module")
def whole(course, tmp_path_factory) -> tuple[Path, Counter[str]]:
    """A run that nothing interrupts, and how often it asked what."""
    folder = tmp_path_factory.mktemp("whole")
    done = course.train(folder)
    assert done.codes == [0, 0], done.printed
    texts = Counter(request.text for request in course.new())
    assert texts.total() == 2 * NUM
    for number in (1, 2):
        assert read_manifest(folder / "run" / "rounds" / f"round-000{number}")["counts"]["written"] > 3
    return folder / "run", texts


def numbers(run_dir: Path) -> set[int]:
    """Of the replies that are in the journals of a run."""
    lines = [line for path in run_dir.rglob("journal-rank-*.jsonl") for line in path.read_text().split("\n")[:-1]]
    return {json.loads(json.loads(line)["revision"]["raw"])["number"] for line in lines}


@pytest.mark.parametrize(
    ("rank", "what", "number", "most"),
    [
        pytest.param(1, DRAFT, 1, AT_ONCE, marks=SLOW, id="drafting"),
        pytest.param(0, QUESTION, 3, AT_ONCE, marks=SLOW, id="before a request is sent"),
        pytest.param(1, READ, 2, AT_ONCE, marks=SLOW, id="a reply has come"),
        pytest.param(0, KEEP, 1, AT_ONCE, id="before the journal"),
        pytest.param(0, "src.rounds.round:write_shards", 0, 0, marks=SLOW, id="all answered"),
        pytest.param(0, "src.io.shards:write_shard", 1, 0, marks=SLOW, id="second shard of a round"),
        pytest.param(0, "src.io.shards:write_index", 0, 0, marks=SLOW, id="before the manifest"),
        pytest.param(0, "src.rounds.round:publish", 1, 0, marks=SLOW, id="before the rename, second round"),
        pytest.param(0, "src.rounds.round:read_round", 0, 0, marks=SLOW, id="after the rename"),
        pytest.param(1, STEP, 0, 0, marks=SLOW, id="first step"),
        pytest.param(0, STEP, 2, 0, marks=SLOW, id="first step after the second round"),
        pytest.param(1, READ, 8, AT_ONCE, marks=SLOW, id="a reply has come, second round"),
    ],
)
def test_a_kill_at_any_moment_asks_nothing_twice(course, whole, tmp_path, record_property, rank, what, number, most):
    """most: replies that may be lost; `record_property` tells what was (--junitxml)."""
    killed = course.train(tmp_path, kill=[(rank, what, number)])
    assert killed.codes[rank] == -9, killed.printed
    assert killed.codes[1 - rank] == 1, killed.printed
    first = course.new()
    kept = numbers(tmp_path / "run")
    unkept = Counter(request.text for request in first if request.number not in kept)
    done = course.train(tmp_path)
    assert done.codes == [0, 0], done.printed
    second = course.new()
    for name, count in {"asked": len(first), "kept": len(kept), "lost": unkept.total(), "again": len(second)}.items():
        record_property(name, count)
    texts = Counter(request.text for request in [*first, *second])
    assert texts - whole[1] == unkept  # sent once more: what is in no journal, and nothing else
    assert not whole[1] - texts
    assert unkept.total() <= most
    assert len(numbers(tmp_path / "run")) == 2 * NUM
    assert rounds(tmp_path / "run") == rounds(whole[0])
    assert same(whole[0], tmp_path / "run")
    assert not list((tmp_path / "run").rglob(".*.partial"))
    shutil.rmtree(tmp_path / "run")


@pytest.mark.slow
def test_another_number_of_ranks_asks_nothing_twice(course, whole, tmp_path) -> None:
    killed = course.train(tmp_path, kill=[(1, READ, 3)])
    assert killed.codes == [1, -9], killed.printed
    kept = numbers(tmp_path / "run")
    assert len(kept) >= 2
    course.new()
    done = course.train(tmp_path, world=1)
    assert done.codes == [0], done.printed
    assert len(course.new()) == 2 * NUM - len(kept)
    assert rounds(tmp_path / "run")["round-0001"] == rounds(whole[0])["round-0001"]
