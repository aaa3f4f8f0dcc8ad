"""`Captioner`, the Python API: batches of mixed requests, streams that can be stopped, mistakes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import Image

from src.generation.captioner import Captioner, Request, Token
from src.io.errors import UserError
from src.models.hf.folder import save_pretrained
from src.samplers.rediff import OverwriteAll
from src.samplers.reviser import Reviser
from src.samplers.sampler import Sampler
from src.samplers.uniform import Posterior
from src.samplers.unmask import Bernoulli
from tests.test_generate import LENGTH, TEXTS, backbone, codec, directly, photos

__all__ = ["backbone", "codec", "photos"]  # fixtures
RANDOM = Sampler(length=LENGTH, tokens_per_step=4, unmask=Bernoulli(), temperature=1.0)
REFINE = Sampler(length=LENGTH, tokens_per_step=4, reviser=OverwriteAll(), post_steps=3, temperature=1.0)


@pytest.fixture(scope="module")
def captioner(backbone, codec):
    return Captioner(backbone, codec)


@pytest.mark.parametrize("sampler", [RANDOM, REFINE])
def test_a_caption_is_that_of_the_sampler_whatever_the_image_comes_as(captioner, backbone, codec, photos, sampler):
    expected = directly(backbone, codec, photos / "a.png", sampler)
    image, data = Image.open(photos / "a.png"), (photos / "a.png").read_bytes()
    requests = [Request(image=i, key="a.png") for i in (str(photos / "a.png"), data, image)]
    for caption in captioner.answer(requests, sampler):
        assert caption.text == codec.decode(expected.ids[0].tolist()) == codec.decode(caption.ids)
        assert (caption.forward_calls, caption.edits) == (int(expected.forwards), int(expected.edits))


def test_a_response_does_not_depend_on_the_others_of_its_batch(captioner, photos):
    a, b = (photos / name for name in ("a.png", "b.png"))
    requests = [Request(image=a, seed=seed) for seed in range(4)]
    requests += [Request(image=b, seed=1, prompt="Describe it."), Request(image=b, seed=1, text=TEXTS[0])]
    together = captioner.answer(requests, REFINE)
    assert together == captioner.answer(requests, REFINE, batch_size=1)
    assert len({caption.text for caption in together}) == len(requests)
    assert together[1] == captioner.caption([b, a], sampler=REFINE, seed=1)[1]  # the same seed and image
    assert together[5] == captioner.revise(b, TEXTS[0], sampler=REFINE, seed=1)


@pytest.mark.parametrize("text", [None, TEXTS[0]])
def test_a_stream_shows_every_step_and_ends_with_the_caption(captioner, codec, photos, text):
    """Replayed from the trace: what a step wrote has its state, all else is kept or still a mask."""
    options = {"sampler": REFINE, "seed": 2}
    *states, last = captioner.stream(photos / "a.png", text=text, **options)
    if text is None:
        (caption,) = captioner.caption(photos / "a.png", trace=True, **options)
    else:
        caption = captioner.revise(photos / "a.png", text, trace=True, **options)
    assert last.caption == replace(caption, trace=None)
    assert last.text == caption.text and {token.state for token in last.tokens} == {"kept"}
    assert len(states) == len(caption.trace) > 1 and sum(len(step.rewritten) for step in caption.trace) > 0
    probabilities = {}
    for state, step in zip(states, caption.trace, strict=True):
        probabilities |= dict(zip(step.unmasked, step.confidence, strict=True))
        rewritten = {place: codec.decode([old]) for place, old, _ in step.rewritten}
        probabilities |= dict(zip(rewritten, step.rewrite_confidence, strict=True))
        for place, token in enumerate(state.tokens):
            is_mask = step.tokens[place] == codec.mask_id
            expected = "mask" if is_mask else "new" if place in step.unmasked else "kept"
            assert token.state == ("rewritten" if place in rewritten else expected)
            assert token.text == ("_" if is_mask else codec.decode([step.tokens[place]]))
            assert (token.old, token.confidence) == (rewritten.get(place), probabilities.get(place))
        assert state.forward_calls == step.forwards
        assert len(state.tokens) == LENGTH or step.tokens[len(state.tokens)] == codec.eot_id


def test_remasked_tokens_are_masks_without_a_probability(captioner, photos):
    class Remask(Reviser):
        def remask(self, state, prediction):
            return state.visible & (state.step == 1)[:, None]

    sampler = Sampler(length=LENGTH, tokens_per_step=4, reviser=Remask())
    first, second = list(captioner.stream(photos / "a.png", sampler=sampler))[:2]
    places = [place for place, token in enumerate(first.tokens) if token.state == "new"]
    assert places and {second.tokens[place] for place in places} == {Token("_", "remasked", None)}


def test_closing_a_stream_stops_the_sampler(captioner, photos):
    calls = []
    hook = captioner.backbone.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    stream = captioner.stream(photos / "a.png", sampler=RANDOM)
    next(stream)
    before = len(calls)
    stream.close()
    hook.remove()
    assert len(calls) == before < len(list(captioner.stream(photos / "a.png", sampler=RANDOM)))
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()


def test_loaded_from_a_folder(backbone, codec, photos, tmp_path):
    """The sampler of a name has the response length of the model, unless one is given."""
    backbone.response_length = LENGTH
    save_pretrained(backbone, codec, tmp_path / "model")
    backbone.response_length = None
    captioner = Captioner.load(tmp_path / "model", device="cpu", dtype="float32")
    expected = Captioner(backbone, codec).caption(photos / "a.png", tokens_per_step=4, length=LENGTH)
    assert captioner.caption([photos / "a.png"], tokens_per_step=4) == expected
    assert captioner.sampler("plain").length == LENGTH and captioner.sampler("plain", length=8).length == 8
    assert captioner.sampler(RANDOM, steps=2) == replace(RANDOM, steps=2, tokens_per_step=None)
    own = captioner.sampler("plain", reviser=OverwriteAll(share=0.5), steps=2)
    assert own == replace(captioner.sampler("plain", steps=2), reviser=OverwriteAll(share=0.5))


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda c, p: c.caption(p / "none.png"), "none.png: missing_image"),
        (lambda c, p: c.caption(b"no image"), "image: undecodable_image"),
        (lambda c, p: c.caption(p / "a.png", sampler="refin"), "did you mean 'sampler/refine'"),
        (lambda c, p: c.caption(p / "a.png", steps=2, tokens_per_step=2), "give one of tokens_per_step and steps"),
        (lambda c, p: c.caption(p / "a.png", tokens=2), "tokens"),
        (lambda c, p: c.caption(p / "a.png", batch_size=-1), "batch_size must be at least 1, got -1"),
        (lambda c, p: c.revise(p / "a.png", TEXTS[0], sampler="plain"), "rewrites no finished text"),
        (lambda c, p: c.revise(p / "a.png", " ".join(TEXTS), length=8), "a response has room for 7"),
        (lambda c, p: c.revise(p / "a.png", "", sampler=Posterior(length=LENGTH)), "rewrites no finished text"),
    ],
)
def test_mistakes_are_named(captioner, photos, ask, message):
    with pytest.raises(UserError, match=message):
        ask(captioner, photos)
