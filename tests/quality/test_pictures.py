import sys

import numpy as np
import pytest
import torch
from PIL import Image

from kdlm.quality import grid, scatter, side_by_side, write_png


def images(n: int, channels: int = 3, side: int = 5) -> torch.Tensor:
    return torch.rand(n, channels, side, side) * 2 - 1


def test_a_grid_survives_its_file_to_the_last_bit(tmp_path):
    picture = grid(images(7), columns=3, scale=2)
    write_png(tmp_path / "new" / "grid.png", picture)
    with Image.open(tmp_path / "new" / "grid.png") as opened:
        assert opened.mode == "RGB"
        np.testing.assert_array_equal(np.array(opened), picture)


def test_every_image_stands_in_its_place_enlarged_and_the_rest_is_white():
    batch = images(5)
    picture = grid(batch, columns=3, scale=4)
    step, left = 5 * 4 + 2, 2
    assert picture.shape == (2 * step + left, 3 * step + left, 3) and picture.dtype == np.uint8
    for index, image in enumerate(batch):
        top, start = left + index // 3 * step, left + index % 3 * step
        tile = picture[top : top + 20 : 4, start : start + 20 : 4]
        expected = ((image + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(tile, expected)
        np.testing.assert_array_equal(tile.repeat(4, 0).repeat(4, 1), picture[top : top + 20, start : start + 20])
    assert (picture[step + left :, 2 * step + left :] == 255).all()


def test_minus_one_is_black_one_is_white_and_what_lies_beyond_is_clipped():
    values = torch.tensor([-1.0, 0.0, 1.0, -7.0, 7.0]).view(5, 1, 1, 1)
    picture = grid(values, columns=5, scale=1)
    assert picture[2, 2::3].tolist() == [[v] * 3 for v in (0, 128, 255, 0, 255)]


def test_small_images_are_enlarged_and_large_ones_left_alone():
    assert grid(images(1, side=8), columns=1).shape == (44, 44, 3)
    assert grid(images(1, side=64), columns=1).shape == (68, 68, 3)


def test_titles_stand_to_the_left_and_move_no_pixel_of_an_image():
    batch = images(4)
    plain, titled = grid(batch, columns=2, scale=5), grid(batch, columns=2, scale=5, titles=["step 0", "step 100"])
    room = titled.shape[1] - plain.shape[1]
    assert room > 20
    np.testing.assert_array_equal(titled[:, room:], plain)
    assert (titled[: titled.shape[0] // 2, :room] < 128).any() and (titled[titled.shape[0] // 2 :, :room] < 128).any()


def test_teacher_and_student_of_one_noise_stand_in_one_column():
    teacher, student = images(5, channels=3), images(5, channels=1)
    picture = side_by_side({"teacher": teacher, "student": student}, columns=3, scale=8)
    band = grid(torch.cat([teacher[:3], student[:3].expand(-1, 3, -1, -1)]), 3, 8, titles=["teacher", "student"])
    np.testing.assert_array_equal(picture[: len(band), : band.shape[1]], band)
    assert picture.shape[0] == 2 * len(band), "what does not fit goes on in a second band"


def test_points_stand_where_they_lie_with_up_above():
    reference = torch.tensor([[-1.0, -1.0], [1.0, 1.0]])
    picture = scatter(torch.tensor([[1.0, 0.5]]), reference, side=101)
    red = (picture[..., 0].astype(int) - picture[..., 2]) > 40
    down, across = (where.mean() for where in red.nonzero())
    extent = 101 / 2.4
    assert across == pytest.approx(50.5 + extent, abs=1.5)
    assert down == pytest.approx(50.5 - extent / 2, abs=1.5)


def test_a_stray_point_is_drawn_on_the_edge_and_does_not_move_the_others():
    reference = torch.randn(50, 2)
    here = scatter(reference[:5], reference, side=80)
    stray = scatter(torch.cat([reference[:5], torch.tensor([[1e6, 0.0]])]), reference, side=80)
    changed = (here != stray).any(-1)
    assert changed[:, 77:].any() and not changed[:, :77].any()


def test_points_that_are_all_one_are_drawn():
    assert (scatter(torch.ones(3, 2), side=50) < 255).any()


@pytest.mark.usefixtures("unchecked_shapes")
def test_what_is_no_picture_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"images are \[n, 1 or 3, height, width\], got \[4, 2, 5, 5\]"):
        grid(images(4, channels=2))
    with pytest.raises(ValueError, match="4 images in 3 columns are 2 rows, got 1 titles"):
        grid(images(4), columns=3, titles=["one"])
    with pytest.raises(ValueError, match="images: 1 of 2 samples"):
        grid(torch.cat([images(1), torch.full((1, 3, 5, 5), torch.nan)]))
    with pytest.raises(ValueError, match="columns must be 1 or more"):
        grid(images(4), columns=0)
    with pytest.raises(ValueError, match="scale must be 1 or more"):
        grid(images(4), scale=0)
    with pytest.raises(ValueError, match=r"as many images of one size, got .*'student': \[3, 3, 5, 5\]"):
        side_by_side({"teacher": images(4), "student": images(3)})
    with pytest.raises(ValueError, match=r"points of the plane are \[n, 2\], got \[4, 3\]"):
        scatter(torch.randn(4, 3))
    with pytest.raises(ValueError, match="a picture is uint8"):
        write_png(tmp_path / "a.png", np.zeros((4, 4)))
    assert list(tmp_path.iterdir()) == []


def test_a_missing_pillow_is_named_and_grids_without_titles_do_without_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    picture = grid(images(4))
    with pytest.raises(ValueError, match="pip install pillow"):
        write_png(tmp_path / "a.png", picture)
