"""Passwords and signatures in URLs and commands: they open the door, and are shown and handed on nowhere."""

from __future__ import annotations

import logging
import re
from threading import Thread

import pytest

from datamodules.shards import Reader
from datamodules.stream import Stream, read_index
from src.io.errors import UserError
from src.io.remote import Cache, redact
from tests.test_reading import read_all
from tests.test_remote import Server, server  # noqa: F401  (a fixture)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:hunter2@host:80/data/a.tar", "http://***:***@host:80/data/a.tar"),
        ("cannot open 'https://me:hun/ter2@host/a?b=c' now", "cannot open 'https://***:***@host/a?b=***' now"),
        ("https://ghp_hunter2@host/a", "https://***@host/a"),
        ("https://host/a?X-Amz-Signature=hunter2&part=1", "https://host/a?X-Amz-Signature=***&part=***"),
        ("https://host/a?hunter2", "https://host/a?***"),
        ("https://me:$SECRET@host/a?sig=$SIG", "https://me:$SECRET@host/a?sig=$SIG"),
        ("pipe:curl -u me:hunter2 https://host/{}", "pipe:curl ***"),
        ("pipe:TOKEN=hunter2 aws s3 cp s3://b/{} -", "pipe: ***"),
        ("hf://datasets/me/scenes@main/train", "hf://datasets/me/scenes@main/train"),
        ("s3://bucket/data/train-000000.tar, why?", "s3://bucket/data/train-000000.tar, why?"),
    ],
)
def test_secrets_are_cut_out_of_texts(text: str, shown: str) -> None:
    assert redact(text) == shown


@pytest.mark.parametrize("address", ["http://me:hunter2@{}/train", "http://{}/train?sig=hunter2", "http://hunter2@{}"])
def test_a_secret_in_a_url_would_be_stored_with_the_run_and_is_refused(server, address) -> None:  # noqa: F811
    with pytest.raises(UserError, match="put it into an environment variable") as refusal:
        read_index(address.format(server.url.removeprefix("http://")))
    assert "hunter2" not in str(refusal.value)


def test_secrets_of_the_environment_open_the_door_and_are_shown_nowhere(server, tmp_path, monkeypatch, caplog) -> None:  # noqa: F811
    server.authorization = "Basic bWU6aHVudC8yQA=="  # me:hunt/2@, as curl encodes it
    monkeypatch.setenv("SECRET", "hunt/2@")
    url = f"{server.url.replace('://', '://me:$SECRET@')}/train?sig=$SECRET"
    server.faults = {"train/train-000001.tar": ["503", "cut 100", *["403"] * 9]}
    index = read_index(url, cache=Cache(str(tmp_path / "cache")))
    reader = Reader(Stream([index], seed=0))
    with caplog.at_level(logging.DEBUG):
        assert len(read_all(reader)) == 30
    (place,) = {place for place, _ in reader.damage}
    assert place == f"{url.replace('/train?', '/train/train-000001.tar?')}"
    assert "503" in caplog.text
    monkeypatch.setenv("SECRET", "hunter3@")
    with pytest.raises(UserError, match="HTTP Error 401") as refusal:
        read_index(url)
    monkeypatch.delenv("SECRET")
    with pytest.raises(UserError, match="the environment variable SECRET is not set"):
        read_index(url)
    assert not re.search("hunt", caplog.text + str(refusal.value) + str(reader.damage))


@pytest.mark.parametrize("secret", ["hunter 2", "hunter\n2", "hunt\x07r2", "hunt\u00e9r2"])
@pytest.mark.parametrize(
    "address", ["{}/train?sig=$SECRET", "{}/$SECRET/train", "nosuch-$SECRET://site", "memory://$SECRET/a"]
)
def test_a_secret_that_no_url_can_hold_is_not_shown(server, monkeypatch, caplog, address: str, secret: str) -> None:  # noqa: F811
    """Libraries quote the URL that they cannot read."""
    monkeypatch.setenv("SECRET", secret)
    with pytest.raises(UserError) as refusal:
        read_index(address.format(server.url))
    shown = str(refusal.value) + caplog.text
    assert "$SECRET" in shown and "hunt" not in shown
    if "{}" in address:
        assert "the environment variable SECRET holds blanks or what else no URL holds" in shown
        assert not server.requests


def test_a_password_is_not_handed_on_to_another_server(server, tmp_path, monkeypatch) -> None:  # noqa: F811
    monkeypatch.setenv("SECRET", "hunt/2@")
    server.authorization = "Basic bWU6aHVudC8yQA=="
    with Server(server.folder) as other:
        Thread(target=other.serve_forever, args=(0.01,), daemon=True).start()
        server.faults["train/index.json"] = [f"302 {other.url}/train/index.json"]
        server.faults["train/train-000000.tar"] = [f"302 {other.url}/train/train-000000.tar"]
        index = read_index(f"{server.url.replace('://', '://me:$SECRET@')}/train", cache=Cache(str(tmp_path / "cache")))
        other.shutdown()
    assert index.count == 30
    assert (server.authorizations, other.authorizations) == ([server.authorization] * 2, [None] * 2)
