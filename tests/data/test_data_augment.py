import pytest
import torch

from normlab.data import DataError, augment


def images(count=64, channels=2, height=5, width=7):
    values = torch.arange(1, 1 + count * channels * height * width, dtype=torch.float32)
    return values.view(count, channels, height, width)


def source(seed=0):
    return torch.Generator().manual_seed(seed)


def test_each_augmented_image_is_a_window_of_the_padded_one():
    before, crop = images(), 2
    original = before.clone()
    result = augment(before, crop=crop, flip=True, generator=source())
    assert torch.equal(before, original), "the input is left alone"
    padded = torch.nn.functional.pad(before, (crop,) * 4)
    seen = set()
    for sample, got in zip(padded, result, strict=True):
        matches = [
            (dy, dx, mirrored)
            for dy in range(5)
            for dx in range(5)
            for mirrored in (False, True)
            if torch.equal(got.flip(-1) if mirrored else got, sample[:, dy : dy + 5, dx : dx + 7])
        ]
        assert len(matches) == 1
        seen.add(matches[0])
    # 64 draws out of 50: about 36 different ones; every offset and both flips occur.
    assert len(seen) > 25
    assert {s[0] for s in seen} == {s[1] for s in seen} == set(range(5))
    assert {s[2] for s in seen} == {False, True}


def test_augment_follows_its_generator_alone(untouched_chance):
    one, same, other = (
        augment(images(), crop=1, flip=True, generator=source(s)) for s in (0, 0, 1)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_augment_without_options_is_a_copy():
    before = images()
    result = augment(before, generator=source())
    assert torch.equal(result, before)
    assert result.data_ptr() != before.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_augment_keeps_dtype(dtype):
    assert augment(images().to(dtype), crop=1, flip=True, generator=source()).dtype == dtype


def test_augment_refuses_raw_images_and_negative_crops():
    with pytest.raises(DataError, match="floating-point images"):
        augment(torch.zeros(1, 1, 2, 2).byte(), flip=True, generator=source())
    for crop in (-1, 1.5, True):
        with pytest.raises(DataError, match="crop as a number"):
            augment(images(), crop=crop, generator=source())
