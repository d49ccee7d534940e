"""Images with text: conversations become batches in which only the assistant's words have labels."""

import pickle
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image
from tiny_vlm import picture, rendered

from kdlm.data import Data, ImageTextCollator, ImageTextSection
from kdlm.data.image_collate import expanded
from kdlm.data.image_forms import place_images
from kdlm.data.report import Unusable
from kdlm.sandbox.vision_language import processor
from kdlm.signal import IGNORE_INDEX

READS = processor(4)
IMAGE = READS.tokenizer.convert_tokens_to_ids("<image>")
PLAIN = (  # the same template without generation markers, for turns found by rendering twice
    READS.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
)


@pytest.fixture
def loaded(tmp_path: Path, jsonl):
    """`loaded(rows, **section)` writes the images `0.png` ... and the rows, and loads them."""
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(picture(number))

    def load(rows: Any, **section: Any) -> Data:
        path = rows if isinstance(rows, str) else jsonl(rows)
        settings = {"train": [{"path": path}], "cache": str(tmp_path / "cache"), "image_folder": str(tmp_path)}
        return ImageTextSection.model_validate(settings | section).load(READS)

    return load


def words(ids: torch.Tensor) -> str:
    return " ".join(READS.tokenizer.convert_ids_to_tokens(ids.tolist()))


def trained(batch: dict[str, torch.Tensor], row: int = 0) -> str:
    labels = batch["labels"][row]
    return words(labels[labels != IGNORE_INDEX])


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content[0] if len(content) == 1 else list(content)}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def user_said(text: str) -> dict[str, Any]:
    """In ShareGPT's words."""
    return {"from": "human", "value": text}


PART = {"type": "image"}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "which digit is this ?", "completion": "seven"},
        {"prompt": "<image>\nwhich digit is this ?", "completion": "seven"},
        {"messages": [user("which digit is this ?"), said("seven")]},
        {"messages": [user(PART, {"type": "text", "text": "which digit is this ?"}), said("seven")]},
        {"conversations": [user_said("<image>which digit is this ?"), {"from": "gpt", "value": "seven"}]},
    ],
    ids=["completion", "marked completion", "chat", "parts", "sharegpt"],
)  # fmt: skip
@pytest.mark.parametrize("template", [None, PLAIN], ids=["generation markers", "plain template"])
def test_every_form_becomes_the_same_batch(loaded, row: dict[str, Any], template: str | None) -> None:
    data = loaded([{**row, "images": ["0.png"]}], chat_template=template)
    batch = data.collator([data.train[0]])
    assert words(batch["input_ids"][0]) == (
        "<|im_start|> user <image> <image> <image> <image> which digit is this ? <|im_end|> "
        "<|im_start|> assistant seven <|im_end|>"
    )
    assert trained(batch) == "seven <|im_end|>"
    assert batch["pixel_values"].shape == (1, 3, 8, 8)
    assert batch["visual"].tolist() == [[-1, -1, 0, 0, 0, 0, *[-1] * 10]]


def test_several_turns_and_images_are_labelled_where_the_processor_moved_them(loaded) -> None:
    talk = [user("<image> which digit is this ?"), said("one"), user("is this <image> even ?"), said("yes no")]
    batch = (data := loaded([{"messages": talk, "images": ["0.png", "1.png"]}])).collator([data.train[0]])
    assert trained(batch) == "one <|im_end|> yes no <|im_end|>"
    assert batch["visual"].unique_consecutive().tolist() == [-1, 0, -1, 1, -1]
    assert ((batch["visual"] >= 0) == (batch["input_ids"] == IMAGE)).all()
    assert (batch["labels"][batch["visual"] >= 0] == IGNORE_INDEX).all()


def test_padding_is_inert_and_images_are_numbered_through_the_batch() -> None:
    rows = rendered(3, images=2)
    collate = ImageTextCollator(READS, 100)
    batch, alone = collate(rows), [collate([row]) for row in rows]
    assert batch["visual"].max() == 5
    for number, one in enumerate(alone):
        length = one["input_ids"].shape[1]
        assert batch["attention_mask"][number].sum() == length
        assert torch.equal(batch["input_ids"][number, :length], one["input_ids"][0])
        assert torch.equal(batch["labels"][number, :length], one["labels"][0])
        assert (batch["labels"][number, length:] == IGNORE_INDEX).all() and (batch["visual"][number, length:] < 0).all()
        assert torch.equal(batch["pixel_values"][2 * number : 2 * number + 2], one["pixel_values"])
    assert batch["index"].tolist() == [0, 1, 2]


def test_what_is_too_long_is_cut_at_its_end_but_never_in_its_images() -> None:
    rows = rendered(2)
    whole, short = ImageTextCollator(READS, 100)(rows), ImageTextCollator(READS, 15)(rows)
    for name in ("input_ids", "labels", "visual", "attention_mask"):
        assert torch.equal(short[name], whole[name][:, :15])
    with pytest.raises(ValueError, match=r"rows.jsonl:1: its images reach beyond 5 tokens: raise data.max_length"):
        ImageTextCollator(READS, 5)(rows)


def test_images_come_as_paths_bytes_or_what_datasets_holds(loaded, tmp_path: Path) -> None:
    expected = loaded([{"prompt": "even ?", "completion": "no", "images": "0.png"}])
    folder = tmp_path / "saved"
    with Image.open(tmp_path / "0.png") as image:
        table = datasets.Dataset.from_dict({"prompt": ["even ?"], "completion": ["no"], "images": [image]})
    table.save_to_disk(str(folder))
    table.to_parquet(str(tmp_path / "rows.parquet"))
    for path in (folder, tmp_path / "rows.parquet"):
        found = loaded(str(path))
        for name, value in expected.collator([expected.train[0]]).items():
            if name != "domain":
                assert torch.equal(found.collator([found.train[0]])[name], value)


def test_rows_that_cannot_be_used_are_counted_with_their_place(loaded) -> None:
    good = {"prompt": "even ?", "completion": "no", "images": ["0.png"]}
    wrong = [
        {**good, "images": []},
        {**good, "images": ["nowhere.png"]},
        {**good, "prompt": "<image> <image> even ?"},
        {**good, "completion": ""},
    ]
    report = loaded([good, *wrong]).report.train[0]
    assert (report.rows, report.kept) == (5, 1)
    assert {"no image", "no such image", "malformed"} <= set(report.unused)
    assert any("nowhere.png" in place for place in report.unused["no such image"].examples)
    with pytest.raises(ValueError, match="no usable row"):
        loaded(wrong[:1])


def test_a_row_with_a_wrong_weight_is_not_used_and_not_counted_as_used(loaded, jsonl) -> None:
    asked = {"prompt": "which digit is this ?", "completion": "seven", "images": ["0.png"]}
    weighed = jsonl([{**asked, "w": 2}, {**asked, "w": None}])
    (report,) = (data := loaded("", train=[{"path": weighed, "columns": {"weight": "w"}}])).report.train
    assert len(data.train) == report.sequences == report.kept == 1
    assert report.unused["malformed"].count == 1


def test_a_column_of_images_must_be_there(loaded) -> None:
    row = {"prompt": "even ?", "completion": "no", "picture": "0.png"}
    with pytest.raises(ValueError, match=r"no column 'images' of images; its columns are .*'picture'"):
        loaded([row])
    assert len(loaded([row], images="picture").train) == 1


def test_a_file_that_is_no_image_is_named_when_it_is_opened(loaded, tmp_path: Path) -> None:
    (tmp_path / "0.png").write_text("nothing")
    data = loaded([{"prompt": "even ?", "completion": "no", "images": "0.png"}])
    with pytest.raises(ValueError, match=r"0.png: cannot be read"):
        data.collator([data.train[0]])


def test_the_text_must_name_as_many_images_as_the_row_has_or_none() -> None:
    assert place_images([user("even ?")], 2)[0]["content"] == [PART, PART, {"type": "text", "text": "even ?"}]
    with pytest.raises(Unusable, match="the text names 1 images, the row has 2"):
        place_images([user("<image> even ?")], 2)


def test_spans_move_by_what_the_images_before_them_have_gained() -> None:
    images = [{"span": (5, 12), "new_span": (5, 33)}, {"span": (40, 47), "new_span": (61, 68)}]
    assert expanded([(0, 5), (12, 20), (47, 50)], images) == [(0, 5), (33, 41), (68, 71)]
    assert expanded([(3, 4)], []) == [(3, 4)]


def test_the_collator_goes_to_worker_processes() -> None:
    collate = pickle.loads(pickle.dumps(ImageTextCollator(READS, 100)))
    rows = rendered(2)
    for name, value in ImageTextCollator(READS, 100)(rows).items():
        assert torch.equal(collate(rows)[name], value)
