"""Classifiers of texts through `kdlm train`: what is left, how it is resumed, and what is refused before a run."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

from kdlm.check import check
from kdlm.data.load import pad_id
from kdlm.data.text_classes import ClassCollator
from kdlm.models import TextClassifierStudent, view
from kdlm.recipe import Recipe, load
from kdlm.sandbox import build
from kdlm.train import assemble, train

RECIPE = """
student: {name: text_classifier, path: "sandbox:code-encoder-small", num_labels: 3}
teacher: {name: text_classifier, path: "sandbox:code-encoder", num_labels: 3}
data:
  name: text_classes
  train: [{path: ROWS}]
  eval: [{path: ROWS}]
  max_length: 16
method: {name: class_kd}
losses: [{name: forward_kl}, {name: cross_entropy}]
training: {max_steps: 6, per_device_train_batch_size: 4, learning_rate: 0.01, logging_steps: 1, save_steps: 2, use_cpu: true}
run_dir: RUN
"""  # noqa: E501
LABELS = ["low", "middle", "high"]


def recipe(tmp_path: Path, *changes: str, run: str = "run") -> Recipe:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"text": f"x = {n} + {n * n}", "label": LABELS[n % 3]}) + "\n" for n in range(24))
    )
    path = tmp_path / f"{run}.yaml"
    path.write_text(RECIPE.replace("ROWS", str(rows)).replace("RUN", str(tmp_path / run)))
    return load(path, changes)


def test_a_run_leaves_a_plain_folder_that_names_its_classes(tmp_path: Path) -> None:
    run = train(recipe(tmp_path, "training.max_steps=2"))
    results = json.loads((run / "results.json").read_text())
    assert {"eval_accuracy", "eval_cross_entropy", "eval_ece", "eval_agreement"} <= results.keys()
    student = AutoModelForSequenceClassification.from_pretrained(run / "student").eval()
    assert student.config.id2label == dict(enumerate(sorted(LABELS)))
    ids = AutoTokenizer.from_pretrained(run / "student")("x = 3", return_tensors="pt")
    assert student(input_ids=ids["input_ids"]).logits.shape == (1, 3)


class Stop(TrainerCallback):
    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 4:
            raise KeyboardInterrupt


def test_tinybert_of_a_classifier_goes_on_exactly_with_its_maps_and_exports_none(tmp_path: Path) -> None:
    changes = ["method={name: tinybert}"]
    whole = train(recipe(tmp_path, *changes, run="whole"))
    broken = recipe(tmp_path, *changes, run="broken")
    trainer = assemble(broken).trainer
    trainer.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    (tmp_path / "broken" / "recipe.yaml").write_text((tmp_path / "whole" / "recipe.yaml").read_text().replace(
        str(tmp_path / "whole"), str(tmp_path / "broken")
    ))  # fmt: skip
    resumed = train(broken, resume=True)
    expected, got = (load_file(run / "student" / "model.safetensors") for run in (whole, resumed))
    assert expected.keys() == got.keys() and all(torch.equal(expected[name], got[name]) for name in expected)
    assert not any("projector" in name for name in got)
    kept = list((resumed / "checkpoint-6").rglob("*projectors*"))
    assert kept, "the maps are in the checkpoint"
    for file in kept:
        other = load_file(whole / file.relative_to(resumed))
        assert all(torch.equal(value, other[name]) for name, value in load_file(file).items())


def test_a_classifier_reads_general_text_for_the_inside_of_a_masked_model(tmp_path: Path) -> None:
    text = "data={train: [{path: 'sandbox:code/train', limit: 2}], eval_rows: 1, max_length: 16, packing: padding_free}"
    of = ["method={name: tinybert}", "losses=[]", "teacher={name: masked_lm, path: 'sandbox:code-encoder'}", text]
    changed = recipe(tmp_path, *of, "training.max_steps=2")
    assert "student: a classifier, which learns from the inside of its teacher alone" in check(changed)
    results = json.loads((train(changed) / "results.json").read_text())
    assert {"eval_hidden", "eval_attention", "eval_embeddings"} <= results.keys()
    assert "eval_accuracy" not in results


def test_what_does_not_fit_is_refused_before_the_run(tmp_path: Path) -> None:
    for change, said in (
        ("student={name: sandbox, model: code-student-tiny}", "tells no classes of texts apart"),
        ("method={name: logit_kd}", "text_classes does not provide labels"),
        ("teacher=null", "teacher: missing"),
        ("losses=[]", "class_kd needs at least one"),
    ):
        with pytest.raises(ValueError, match=said):
            check(recipe(tmp_path, change))
    text = ["data={train: [{path: 'sandbox:code/train'}]}", "method={name: sequence_kd}", "losses=[]"]
    with pytest.raises(ValueError, match="text_classifier predicts no tokens"):
        check(recipe(tmp_path, *text))
    with pytest.raises(ValueError, match="it tells 4 classes apart, and the data have 3"):
        train(recipe(tmp_path, "student.num_labels=4", "teacher.num_labels=4"))


@pytest.mark.parametrize("pad", [None, 7])
def test_a_decoder_judges_a_text_by_its_last_token_however_it_is_padded(tmp_path: Path, pad: int | None) -> None:
    """A configuration may name no padding, or another than the tokenizer that batches are padded by."""
    folder = shutil.copytree(build("code-student-tiny"), tmp_path / "decoder")
    config = json.loads((folder / "config.json").read_text()) | {"pad_token_id": pad}
    (folder / "config.json").write_text(json.dumps(config))
    source = TextClassifierStudent(path=str(folder), num_labels=3)
    model, rows = view(source.load().eval()), [[11, 12, 13], [21, 22, 23, 24, 25, 26]]
    collate = ClassCollator(pad_id(source.tokenizer()))
    both, alone = (
        model(collate([{"input_ids": ids, "labels": 0, "index": 0} for ids in some])) for some in (rows, rows[:1])
    )
    torch.testing.assert_close(both[:1], alone)


def test_sizes_make_random_weights_of_a_checkpoints_configuration(tmp_path: Path) -> None:
    student = recipe(tmp_path, "student.sizes={num_hidden_layers: 1, hidden_size: 24}").student
    one, again = student.load(), student.load()
    assert one.config.num_hidden_layers == 1 and one.config.num_labels == 3
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), again.parameters(), strict=True))
    with pytest.raises(ValueError, match="has no layers_of_cake"):
        recipe(tmp_path, "student.sizes={layers_of_cake: 1}").student.load()
