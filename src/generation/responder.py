"""One model with one sampler that answers samples: what `generate` does with a batch, for a server as well.

respond = Responder(backbone, codec, choose_sampler(cfg), seed=0)
sampled = respond([Sample("a", {"prompt": "Describe the picture."}, b"", image)])
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
from omegaconf import DictConfig

from datamodules.collate import Collate
from datamodules.shards import Sample
from src.cli.config import load_part
from src.cli.instantiate import build
from src.models.hf.folder import ModelFolder
from src.models.llada_v import LLaDAV
from src.samplers.base import AnySampler
from src.text.tokenizer import Codec
from src.types import Sampled

SAMPLER = ("length", "post_steps", "temperature", "cfg_scale", "early_stop")  # sampler settings that a config may set
logger = logging.getLogger(__name__)


class Responder:
    """Calling it with samples returns what the sampler writes for them.

    caption: a text that every response starts from, to correct it; None: start from masks
    suffix: a text after every response; trace: keep every step
    positions: positions that the model was made for, if known; longer rows are warned about
    """

    def __init__(
        self,
        backbone: LLaDAV,
        codec: Codec,
        sampler: AnySampler,
        *,
        seed: int,
        caption: str | None = None,
        suffix: str | None = None,
        trace: bool = False,
        positions: int | None = None,
    ) -> None:
        self.backbone, self.sampler, self.caption, self.positions = backbone, sampler, caption, positions
        if sampler.compile:
            backbone.compile_blocks()
        self.suffix = torch.tensor(codec.encode(suffix)[0]) if suffix else None
        self.options = {"special": codec.special, "seed": seed, "trace": trace, "suffix": self.suffix}
        layout = backbone.layout
        self.collate = Collate(codec, response_length=sampler.length, layout=layout, seed=seed, first=True)

    @torch.inference_mode()
    def __call__(self, samples: Sequence[Sample]) -> Sampled:
        start = [{"text": self.caption or ""}]
        batch, _ = self.collate([replace(s, record={**s.record, "captions": start}) for s in samples])
        batch = batch.to(next(self.backbone.parameters()).device)
        prefix = self.backbone.encode_prefix(batch.prefix)
        lengths = [prefix.embeds.shape[1]] * len(batch) if prefix.mask is None else prefix.mask.sum(1).tolist()
        after = self.sampler.length + (0 if self.suffix is None else len(self.suffix))
        for key, tokens in zip(batch.keys, lengths, strict=True):
            if self.positions is not None and tokens + after > self.positions:
                message = "%s: %d prompt tokens and %d after them exceed the model's %d positions (config.json)"
                logger.warning(message, key, tokens, after, self.positions)
        response = None if self.caption is None else batch.response
        return self.sampler(self.backbone, prefix, start=response, keys=batch.keys, **self.options)


def choose_sampler(cfg: DictConfig) -> AnySampler:
    """The sampler of conf/sampler/NAME.yaml, or of another .yaml file, with the settings of the config on top.

    Without `length` it writes the response length that the model was trained with, if its folder has it.
    """
    node = load_part("sampler", cfg.sampler)
    response_length = ModelFolder.open(cfg.model.path).config.get("response_length")
    settings = {"length": response_length} if response_length else {}
    if cfg.caption is not None and node.get("reviser"):  # a text without masks has no steps but post steps
        settings["post_steps"] = max(1, node.get("post_steps", 0))
    settings |= {name: cfg[name] for name in (*SAMPLER, "compile") if cfg[name] is not None}
    if cfg.tokens_per_step is not None or cfg.steps is not None:
        settings |= {"tokens_per_step": cfg.tokens_per_step, "steps": cfg.steps}
    return build({**node, **settings})
