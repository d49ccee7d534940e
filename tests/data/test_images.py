"""Images from folders, parquet files and the sandbox: what a row holds, which labels are kept, what goes wrong."""

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from kdlm.data import ImagesSection
from kdlm.signal import IGNORE_INDEX

DIGITS = {"train": "sandbox:digits/train", "eval": "sandbox:digits/eval"}


def picture(seed: int, size: tuple[int, int] = (5, 4), mode: str = "RGB") -> Image.Image:
    shape = (size[1], size[0], 3) if mode == "RGB" else size[::-1]
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8), mode)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three cats and two dogs of 5 x 4 in a folder of pictures."""
    for name, count in (("cat", 3), ("dog", 2)):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for number in range(count):
            picture(number + 10 * count).save(tmp_path / "pets" / name / f"{number}.png")
    return tmp_path / "pets"


def parquet(path: Path, **columns) -> str:
    features = {"image": datasets.Image(), "img": datasets.Image()}
    kinds = {name: features[name] for name in columns if name in features}
    table = datasets.Dataset.from_dict(columns)
    for name, kind in kinds.items():
        table = table.cast_column(name, kind)
    table.to_parquet(str(path))
    return str(path)


def test_a_folder_for_each_class_gives_pixels_classes_and_numbers(folder):
    data = ImagesSection(train=str(folder)).load(0)
    assert data.made_with["classes"] == ["cat", "dog"]
    rows = [data.train[number] for number in range(len(data.train))]
    assert [row["labels"] for row in rows] == [0, 0, 0, 1, 1] and [row["index"] for row in rows] == list(range(5))
    expected = torch.from_numpy(np.array(Image.open(folder / "cat" / "1.png"))).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(rows[1]["pixel_values"], expected)
    batch = data.collator(rows)
    assert batch["pixel_values"].shape == (5, 3, 4, 5) and batch["labels"].dtype == torch.int64


def test_names_of_columns_and_of_classes_are_the_sources(tmp_path):
    images = [picture(n, mode="L") for n in range(4)]
    path = parquet(tmp_path / "a.parquet", img=images, kind=["b", "a", "b", None])
    data = ImagesSection(train=path, columns={"label": "kind"}).load(0)
    assert data.made_with["classes"] == ["a", "b"]
    assert [data.train[n]["labels"] for n in range(4)] == [1, 0, 1, IGNORE_INDEX]
    assert data.train[0]["pixel_values"].shape == (1, 4, 5)  # grey, as the first image is


def test_a_picture_is_cut_to_a_square_and_scaled(tmp_path):
    images = [picture(0, (8, 6)), picture(1, (20, 30))]
    path = parquet(tmp_path / "a.parquet", image=images, label=[0, 1])
    data = ImagesSection(train=path, size=7, channels=1, mean=[0.0], std=[1.0]).load(0)
    for number in range(2):
        pixels = data.train[number]["pixel_values"]
        assert pixels.shape == (1, 7, 7) and 0 <= pixels.min() and pixels.max() <= 1


def test_pictures_of_several_sizes_need_one_said(tmp_path):
    path = parquet(tmp_path / "a.parquet", image=[picture(0, (8, 6)), picture(1, (3, 4))], label=[0, 1])
    data = ImagesSection(train=path).load(0)
    with pytest.raises(ValueError, match=r"image 1 is 3x4, the first is 8x6: set data.size"):
        data.train[1]


def test_the_scale_of_a_models_image_processor_is_taken(tmp_path, folder):
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_processor_type": "ViTImageProcessor", "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.25, 2]}'
    )
    plain = ImagesSection(train=str(folder), mean=[0.0], std=[1.0]).load(0).train[0]["pixel_values"]
    scaled = ImagesSection(train=str(folder), processor=str(tmp_path)).load(0).train[0]["pixel_values"]
    expected = (plain - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.5, 0.25, 2]).view(3, 1, 1)
    torch.testing.assert_close(scaled, expected)
    with pytest.raises(ValueError, match="says no image_mean"):
        ImagesSection(train=str(folder), processor=str(folder)).load(0)


def test_labels_are_kept_of_so_many_images_evenly_over_classes():
    section = ImagesSection(**DIGITS, labelled=103)
    data = section.load(0)
    labels, whole = data.train.columns["labels"], ImagesSection(**DIGITS).load(0)
    kept = labels != IGNORE_INDEX
    counts = labels[kept].bincount(minlength=10)
    assert kept.sum() == 103 and counts.min() == 10 and counts.max() <= 11
    assert torch.equal(labels[kept], whole.train.columns["labels"][kept])
    assert torch.equal(data.eval.columns["labels"], whole.eval.columns["labels"])
    assert torch.equal(section.load(5).train.columns["labels"], labels)  # whatever the run's seed
    assert not torch.equal(
        ImagesSection(**DIGITS, labelled=103, labelled_seed=1).load(0).train.columns["labels"], labels
    )


def test_the_digits_can_be_coloured_and_scaled():
    data = ImagesSection(**DIGITS, size=12, channels=3).load(0)
    assert data.train.columns["pixel_values"].shape == (1438, 3, 12, 12)


@pytest.mark.parametrize(
    ("columns", "given", "said"),
    [
        ({"label": [0, 1]}, {}, r"no column 'image'; it has label: say which one in data.columns.image"),
        ({"image": 2}, {}, r"no column of labels; it has image: say which one in data.columns.label"),
        ({"image": 2, "label": [0, 1]}, {"label": "kind"}, r"no column 'kind'; it has image, label"),
        ({"image": 2, "img": 2, "label": [0, 1]}, {}, r"several columns of images, image, img"),
        ({"image": 2, "label": [0.5, 1.5]}, {}, r"'label' holds no classes"),
        ({"image": [1, 2], "label": [0, 1]}, {}, r"'image' holds no images"),
    ],
)
def test_a_wrong_column_is_named_with_those_that_there_are(tmp_path, columns, given, said):
    made = {name: [picture(n) for n in range(value)] if value == 2 else value for name, value in columns.items()}
    if "image" in columns and columns["image"] != 2:
        datasets.Dataset.from_dict(made).to_parquet(str(tmp_path / "a.parquet"))
        path = str(tmp_path / "a.parquet")
    else:
        path = parquet(tmp_path / "a.parquet", **made)
    with pytest.raises(ValueError, match=said):
        ImagesSection(train=path, columns=given).load(0)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"train": "./nowhere"}, "nowhere: no such file or folder"),
        ({"train": "sandbox:digit/train"}, "no such images, the sandbox has sandbox:digits/train and"),
        ({"train": "sandbox:digits/train", "labelled": 2000}, "only 1438 training images have a label"),
    ],
)
def test_what_is_not_there_is_an_error(section, said):
    with pytest.raises(ValueError, match=said):
        ImagesSection(**section).load(0)


def test_a_scale_is_said_once():
    with pytest.raises(ValueError, match="keep one"):
        ImagesSection(processor="somewhere", mean=[0.1])
