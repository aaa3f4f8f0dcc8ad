"""What an older version wrote is refused by its name, with what to do, and never read as if it were of today."""

from __future__ import annotations

import json
from pathlib import Path

import lightning as L
import pytest
import yaml
from omegaconf import OmegaConf

from callbacks.checkpoint import Checkpoint
from src.cli.config import load_config
from src.io.errors import UserError
from src.io.files import FORMAT
from src.io.shards import read_manifest, write_shards
from src.models.hf.folder import ModelFolder
from src.preparation.scenes import Scenes
from src.train import main as train
from src.training.run_dir import check_folder
from testing.verbs import refusal

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "assets" / "base"


@pytest.mark.parametrize(
    ("kind", "command"), [("captions", "src.prepare"), ("drafts", "src.draft"), ("round", "src.revise")]
)
def test_shards(kind, command, tmp_path):
    write_shards(tmp_path / "d", [], prefix="x", per_shard=4, kind=kind, tokenizer="t", counts={})
    index = tmp_path / "d" / "index.json"
    content = json.loads(index.read_text())
    assert content["format"] == FORMAT
    assert read_manifest(tmp_path / "d")["kind"] == kind
    index.write_text(json.dumps({**content, "format": FORMAT - 1}))
    with pytest.raises(UserError, match=rf"has format 1, this version reads format {FORMAT}: remove .*{command}"):
        read_manifest(tmp_path / "d")


def test_a_dataset_is_made_again(tmp_path):
    given = dict(  # noqa: C408
        out=str(tmp_path / "d"),
        num_train=2, num_val=1, num_test=1, captions_per_image=1, objects=[1, 1], image_size=16,
        noise=0.0, vocab_size=512, prompt="Describe.", response_length=64, tokenizer=str(BASE),
    )  # fmt: skip
    Scenes(**given).run()
    index = tmp_path / "d" / "index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "format": 1}))
    with pytest.raises(UserError, match=r"has format 1, not 2; set prepare\.overwrite=true"):
        Scenes(**given).run()
    assert Scenes(**given, overwrite=True).run()["format"] == FORMAT


def test_the_config_of_a_run(tmp_path, capsys):
    cfg = load_config(["conf=mask", f"run_dir={tmp_path / 'run'}"])
    old = {key: value for key, value in OmegaConf.to_container(cfg).items() if key != "format"}  # type: ignore[union-attr]
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(old))
    argv = [f"conf={tmp_path / 'old.yaml'}"]
    assert "this config has format 1, this version reads format 2" in refusal(train, argv, capsys)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(old))
    with pytest.raises(UserError, match="holds a run of format 1, not 2; set another run_dir"):
        check_folder(cfg, tmp_path / "run")


def test_a_checkpoint(tmp_path):
    callback, trainer, module = (
        Checkpoint(run_dir=tmp_path, every_n_train_steps=1),
        L.Trainer(logger=False),
        L.LightningModule(),
    )
    content: dict = {}
    callback.on_save_checkpoint(trainer, module, content)
    assert content == {"format": FORMAT}
    callback.on_load_checkpoint(trainer, module, content)
    with pytest.raises(UserError, match="has format 1, this version resumes format 2"):
        callback.on_load_checkpoint(trainer, module, {})


def test_a_model_folder(tmp_path):
    for file in BASE.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((BASE / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "canvas": 64}))
    with pytest.raises(UserError, match="rename its key canvas to response_length"):
        ModelFolder.open(tmp_path).describe()
