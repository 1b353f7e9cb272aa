import dataclasses
import pickle

import pytest
import torch

from normlab.data import DataError, ImageData, generator, load, names


def small(**changes):
    chance = torch.Generator().manual_seed(0)
    fields = {
        "name": "small",
        "title": "Small",
        "train_images": torch.randint(256, (7, 3, 2, 5), generator=chance, dtype=torch.uint8),
        "train_labels": torch.tensor([0, 1, 0, 1, 0, 1, 0]),
        "test_images": torch.randint(256, (3, 3, 2, 5), generator=chance, dtype=torch.uint8),
        "test_labels": torch.tensor([1, 0, 1]),
        "classes": ("a", "b"),
    }
    return ImageData(**(fields | changes))


def test_statistics_are_the_moments_of_the_training_pixels():
    data = small()
    pixels = data.train_images.double() / 255
    mean, std = data.statistics()
    # The result is rounded to float32 once: relative error below 2⁻²⁴.
    expected = pixels.std((0, 2, 3), correction=0).float()
    assert torch.allclose(mean, pixels.mean((0, 2, 3)).float(), rtol=1e-7, atol=0)
    assert torch.allclose(std, expected, rtol=1e-7, atol=0)


def test_statistics_given_out_are_copies():
    data = small()
    data.statistics()[0].zero_()
    assert data.statistics()[0].min() > 0


def test_prepare_standardizes_and_leaves_the_images():
    data = small()
    before = data.train_images.clone()
    prepared = data.prepare(data.train_images)
    assert prepared.dtype == torch.float32
    # Rounding of at most a few 2⁻²⁴ for each of 70 values of size about 2.
    assert prepared.mean((0, 2, 3)).abs().max() < 1e-6
    assert (prepared.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-6
    assert torch.equal(before, data.train_images)
    assert torch.equal(data.prepare(data.train_images[2]), prepared[2])


def test_prepare_of_a_constant_channel_is_finite():
    data = small(train_images=torch.full((7, 3, 2, 5), 51, dtype=torch.uint8))
    assert data.prepare(data.train_images).abs().max() < 1e-6
    assert data.prepare(data.test_images).isfinite().all()


@pytest.mark.parametrize("images", [torch.zeros(1, 3, 2, 5), torch.zeros(1, 1, 2, 5).byte()])
def test_prepare_refuses_other_images(images):
    with pytest.raises(DataError, match="uint8 images of shape"):
        small().prepare(images)


def test_fingerprint_depends_on_all_content_and_on_no_name():
    data = small()
    assert data.fingerprint() == small(name="x", title="y", note="z").fingerprint()
    others = [
        small(train_images=data.train_images.flip(0)),
        small(train_labels=data.train_labels.flip(0) ^ 1),
        small(test_images=data.test_images ^ 1),
        small(test_labels=data.test_labels ^ 1),
        small(classes=("b", "a")),
        small(
            train_images=data.train_images.view(7, 3, 5, 2),
            test_images=data.test_images.view(3, 3, 5, 2),
        ),
    ]
    assert len({d.fingerprint() for d in (data, *others)}) == 1 + len(others)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_images": torch.zeros(7, 3, 2, 5)}, "training part of small, uint8 images"),
        ({"train_images": torch.zeros(0, 3, 2, 5).byte()}, "training part of small, uint8"),
        ({"test_images": torch.zeros(3, 3, 2, 4).byte()}, "training and test images of one shape"),
        ({"test_labels": torch.tensor([0, 1])}, "one int64 label for each of 3"),
        ({"test_labels": torch.tensor([0.0, 1, 0])}, "one int64 label"),
        ({"test_labels": torch.tensor([0, 2, 1])}, "labels from 0 to 1, but found.*from 0 to 2"),
        ({"train_labels": -torch.ones(7).long()}, "labels from 0 to 1"),
    ],
)
def test_contradictions_are_refused(changes, message):
    with pytest.raises(DataError, match=message):
        small(**changes)


def test_is_frozen_and_prints_shortly():
    with pytest.raises(dataclasses.FrozenInstanceError):
        small().name = "other"
    assert repr(small()) == ("ImageData('small', 7 training and 3 test images of 3×2×5, 2 classes)")


@pytest.mark.parametrize(
    ("asked", "hint"),
    [("CIFAR-10", "'cifar10'"), ("fashion_mini", "'fashion-mini'"), ("folders", "'folder'")],
)
def test_unknown_name_suggests(asked, hint):
    with pytest.raises(DataError, match=f"did you mean.*{hint}"):
        load(asked)


def test_unknown_name_lists_all():
    with pytest.raises(DataError, match=", ".join(names())):
        load("zzz")


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "folder"])
def test_without_directory_the_variable_is_named(name):
    with pytest.raises(DataError, match="NORMLAB_DATA_DIR"):
        load(name)


def test_directory_that_does_not_exist(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"directory=, but found .*nowhere, which does not exist"):
        load("cifar10", tmp_path / "nowhere")
    monkeypatch.setenv("NORMLAB_DATA_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"variable NORMLAB_DATA_DIR, but found .*nowhere"):
        load("cifar10")


def test_fashion_mini_ignores_the_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("NORMLAB_DATA_DIR", str(tmp_path))
    assert load().name == "fashion-mini"


def test_size_is_for_folders():
    with pytest.raises(DataError, match="'folder' only"):
        load("fashion-mini", size=8)


def test_error_survives_pickling():
    error = DataError("a", "b", "c")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) == "expected a, but found b; c"
    assert isinstance(again, ValueError)


@pytest.mark.usefixtures("untouched_chance")
def test_streams_differ_in_every_argument():
    streams = [
        generator(0, "a"), generator(1, "a"), generator(0, "b"), generator(0, "a", epoch=1),
        generator((0, 1), "a"), generator((1, 0), "a"), generator(-1, "a"),
    ]  # fmt: skip
    draws = {tuple(torch.rand(3, generator=s).tolist()) for s in streams}
    assert len(draws) == len(streams)
    first, again = (torch.rand(3, generator=generator(0, "a")) for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize("seed", ["x", 1.5, True, None, (1, 2.5)])
def test_seed_must_be_made_of_integers(seed):
    with pytest.raises(DataError, match="integers as seed"):
        generator(seed, "a")
