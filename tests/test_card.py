"""The model card that an export writes: where a model comes from, by the folders of its runs."""

from __future__ import annotations

import json

import pytest
import yaml
from omegaconf import OmegaConf

from src.export import main
from src.models.hf.folder import fingerprint, save_pretrained
from src.models.tiny import tiny
from src.text.tokenizer import Codec

SCENES = {"name": "", "weight": 1.0, "licence": "none needed", "origin": "drawn by this program"}
PHOTOS = {"name": "coco", "weight": 0.5, "licence": "CC BY 4.0", "origin": "cocodataset.org"}
DECODER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def runs(tmp_path):
    """A base model without a run, a run of Stage I from it, and one of Stage II from that, each with its model."""
    codec = Codec.train(["a red ring user Describe assistant"], vocab_size=80)
    save_pretrained(tiny(codec=codec, decoder=DECODER, vision=None), codec, tmp_path / "base")
    start = tmp_path / "base"
    for name, target, sources in (
        ("stage1", "src.objectives.revision.RevisionObjective", [SCENES]),
        ("stage2", "src.objectives.refine.Refine", [SCENES, PHOTOS]),
    ):
        data = tmp_path / f"data-{name}"
        data.mkdir()
        (data / "index.json").write_text(json.dumps({"sources": sources}))
        run = {
            "format": 2, "name": name, "run_dir": str(tmp_path / name), "seed": 7, "model": {"path": str(start)},
            "data": {"path": str(data), "batch_size": 32}, "objective": {"target": target},
            "trainer": {"max_steps": 150},
        }  # fmt: skip
        start = tmp_path / name / "model"
        model = tiny(codec=codec, decoder=DECODER, vision=None)
        model.lm_head.weight.data += len(sources)  # another model than the one before
        save_pretrained(model, codec, start)
        OmegaConf.save(run, tmp_path / name / "config.yaml")
    return tmp_path


def export(folder, out, *more):
    main(["conf=export", f"model={folder}", f"out={out}", "format=own", *more])
    _, head, text = (out / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(head), text


def test_the_card_of_a_run_names_all_runs_before_it_and_their_data(runs):
    head, text = export(runs / "stage2" / "model", runs / "out")
    assert head == {"pipeline_tag": "text-generation", "tags": ["masked-diffusion", "rediff-lightning"]}
    assert f"It starts from `{runs / 'base'}`" in text and fingerprint(runs / "out") in text
    first, second = text.index("1. stage1: "), text.index("2. stage2: ")
    assert first < text.index("src.objectives.revision.RevisionObjective") < second
    assert text.count("150 steps of 32 samples; seed 7") == 2
    rows = [line for line in text.splitlines() if line.startswith(f"| `{runs}")]
    assert rows == [
        f"| `{runs}/data-stage1` |  | none needed | drawn by this program |",
        f"| `{runs}/data-stage2` |  | none needed | drawn by this program |",
        f"| `{runs}/data-stage2` | coco | CC BY 4.0 | cocodataset.org |",
    ]
    assert "drawn scenes of a few shapes" in text and "None were given." in text


def test_a_run_that_was_made_again_from_its_own_child_ends_the_list(runs):
    config = OmegaConf.load(runs / "stage1" / "config.yaml")
    config.model.path = str(runs / "stage2" / "model")
    OmegaConf.save(config, runs / "stage1" / "config.yaml")
    _, text = export(runs / "stage2" / "model", runs / "out")
    assert "1. stage1: " in text and "2. stage2: " in text and "3. " not in text
    assert f"It starts from `{runs / 'stage2' / 'model'}`" in text


def test_a_model_without_a_run_says_so(runs):
    _, text = export(runs / "base", runs / "out")
    assert "more is not known here" in text and "Not known here" in text and "1. " not in text


def test_scores_are_those_of_this_model_or_refused(runs, capsys):
    no_value = {"mean": None, "se": None, "n": 0}  # of captions without a claim
    cells = {
        speed: {"quality": {"mean": 1 / int(speed), "se": 0.01, "n": 96}, "factuality": no_value}
        for speed in ("1", "4")
    }
    meta = {
        "models": {"ours": fingerprint(runs / "stage1" / "model")},
        "seed": 0,
        "data": {"taken": 96, "split": "test"},
    }
    results = runs / "results.json"
    results.write_text(json.dumps({"meta": meta, "methods": {"ours": {"refine": cells}}}))
    _, text = export(runs / "stage1" / "model", runs / "out", f"scores={results}")
    assert "| refine | 1 | 1.000 ± 0.010 |\n| refine | 4 | 0.250 ± 0.010 |" in text
    with pytest.raises(SystemExit):
        main(["conf=export", f"model={runs / 'base'}", f"out={runs / 'other'}", "format=own", f"scores={results}"])
    assert "has no results of this model" in capsys.readouterr().err and not (runs / "other").exists()
