"""Train: build the data, the objective and its callbacks from a config, fit, and write a model folder.

    python -m src.train conf=mask
    python -m src.train conf=stage2 seed=1 trainer.max_steps=500 resume=false
    python -m src.train conf=runs/stage1/config.yaml run_dir=runs/again

    RUN/config.yaml      repeats the run          RUN/checkpoints/  to resume from
    RUN/tensorboard/     logs                     RUN/model/        the result, written last
    RUN/rounds/          online rounds (Stage II)

A rerun of the same command resumes where the run stopped, and does nothing when it is finished; `resume=false` removes
what is there and starts afresh.
"""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from functools import partial
from pathlib import Path

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import DictConfig, OmegaConf

from src.config import ConfigError, build, check, load_config, main_guard, save_config
from src.models.checkpoint import save_pretrained
from src.tokenizer import Codec

OFFERS = ("backbone", "codec", "run_dir", "seed", "special")
FIXED = ("data", "model", "objective", "seed", "tokenizer")  # what a run may not change when it resumes
log = logging.getLogger(__name__)


@main_guard
def main(argv: list[str]) -> None:
    """Train as the config says."""
    cfg = load_config(argv)
    check(cfg, offers=OFFERS)
    try:
        train(cfg)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def train(cfg: DictConfig) -> None:
    """Build everything, fit from the last checkpoint if there is one, and export the model."""
    run_dir = Path(cfg.run_dir)
    if not _open_run(cfg, run_dir):
        log.info("%s is finished already; resume=false would start it afresh", run_dir)
        return
    _quiet()
    L.seed_everything(cfg.seed, verbose=False)
    codec = Codec.load(cfg.tokenizer)
    offers = {"codec": codec, "run_dir": run_dir, "seed": cfg.seed, "special": codec.special}
    data = build(cfg.data, **offers)
    objective = build(cfg.objective, backbone=partial(build, cfg.model, codec=codec), **offers)
    trainer = L.Trainer(
        **OmegaConf.to_container(cfg.trainer),  # type: ignore[arg-type]
        logger=TensorBoardLogger(run_dir, name="tensorboard", version=""),
        callbacks=[build(node, **offers) for node in cfg.callbacks.values() if node],
        default_root_dir=run_dir,
    )
    trainer.fit(objective, datamodule=data, ckpt_path=_newest(run_dir))
    if trainer.interrupted or trainer.global_step < cfg.trainer.max_steps:
        raise ConfigError(f"stopped at step {trainer.global_step} of {cfg.trainer.max_steps}; the same command resumes")
    save_pretrained(objective.backbone, codec, run_dir / "model")
    (run_dir / "finished.json").write_text(json.dumps({"steps": trainer.global_step}) + "\n")


def _open_run(cfg: DictConfig, run_dir: Path) -> bool:
    """Prepare the run's folder; false if the run is finished. Raises ConfigError where resuming would mix two runs."""
    saved = run_dir / "config.yaml"
    if run_dir.exists() and not cfg.resume:
        if any(run_dir.iterdir()) and not saved.exists():
            raise ConfigError(f"{run_dir} is not a run's folder (no config.yaml): choose another run_dir")
        shutil.rmtree(run_dir)
    if _newest(run_dir):
        old = OmegaConf.load(saved)
        changed = [key for key in FIXED if old.get(key) != cfg.get(key)]
        if changed:
            raise ConfigError(
                f"{run_dir} holds a run with other settings ({', '.join(changed)}); give another run_dir, "
                "or resume=false to start it afresh"
            )
    finished = run_dir / "finished.json"
    if finished.exists() and json.loads(finished.read_text())["steps"] >= cfg.trainer.max_steps:
        return False
    save_config(cfg, saved)
    return True


def _quiet() -> None:
    """Lightning's banners, and warnings about its own internals, tell a user nothing."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (
        ".*LeafSpec.*",
        ".*smaller than the logging interval.*",
        ".*does not have many workers.*",
        "Using ModelCheckpoint with manual optimization.*",
        "Checkpoint directory .* exists and is not empty.*",
    ):
        warnings.filterwarnings("ignore", message=message)


def _newest(run_dir: Path) -> Path | None:
    """The checkpoint written last; before each online round one is written too."""
    return max((run_dir / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime, default=None)


if __name__ == "__main__":
    main()
