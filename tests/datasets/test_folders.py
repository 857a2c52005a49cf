"""Folders of images: what comes out of them, and what is refused."""

from __future__ import annotations

import pytest
import torch
from fake_data import png, write

from fxprune import data
from fxprune.datasets.augment import normalize
from fxprune.errors import DataError, OptionError, OptionTypeError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture
def folder(tmp_path):
    """Two classes, 3 + 2 training images and 1 + 1 to validate with, of different sizes."""
    write(
        tmp_path,
        {
            "train/cat/1.png": png(40, 30, 1),
            "train/cat/2.png": png(30, 40, 2),
            "train/cat/more/3.png": png(64, 64, 3),
            "train/dog/4.png": png(33, 47, 4),
            "train/dog/5.png": png(50, 20, 5, mode="L"),
            "train/dog/readme.txt": "no image",
            "val/cat/6.png": png(40, 30, 6),
            "val/dog/7.png": png(37, 37, 7),
        },
    )
    return tmp_path


@pytest.fixture
def tiny(tmp_path):
    """Tiny-ImageNet with three classes, two training images and one to validate with in each."""
    names = ["n003", "n001", "n002"]
    files = {"wnids.txt": "\n".join(names) + "\n"}
    for i, name in enumerate(names):
        for k in range(2):
            files[f"train/{name}/images/{name}_{k}.JPEG"] = png(64, 64, 10 * i + k)
        files[f"val/images/val_{i}.JPEG"] = png(64, 64, 100 + i)
    rows = [f"val_{i}.JPEG\t{name}\t0\t0\t62\t62\n" for i, name in enumerate(names)]
    files["val/val_annotations.txt"] = "".join(rows)
    write(tmp_path / "tiny-imagenet-200", files)
    return tmp_path


def whole(loader):
    batches = list(loader)
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def refused(call):
    with pytest.raises(DataError) as caught:
        call()
    return str(caught.value)


def test_an_imagefolder(folder):
    loaders = data.load(f"imagefolder:{folder}", batch_size=2, size=28)
    assert (loaders.name, loaders.classes, loaders.shape) == ("imagefolder", 2, (3, 28, 28))
    assert (loaders.mean, loaders.std) == (MEAN, STD)
    assert [len(y) for _, y in loaders.train] == [2, 2, 1]
    x, y = whole(loaders.train)
    assert (x.shape, x.dtype, y.dtype) == ((5, 3, 28, 28), torch.float32, torch.int64)
    assert sorted(y.tolist()) == [0, 0, 0, 1, 1]
    x, y = whole(loaders.test)
    assert (x.shape, y.tolist()) == ((2, 3, 28, 28), [0, 1])
    x, y = whole(loaders.plain)
    assert sorted(y.tolist()) == [0, 0, 0, 1, 1]


def test_its_images_are_the_middle_of_the_resized_ones(folder):
    from PIL import Image
    from torchvision.transforms import v2
    from torchvision.transforms.v2 import functional

    image = Image.open(folder / "val/cat/6.png")
    middle = v2.CenterCrop(28)(v2.Resize(32)(image))  # 28 * 256 / 224
    expected = normalize(functional.pil_to_tensor(middle)[None], MEAN, STD)
    assert torch.equal(next(iter(data.imagefolder(folder, size=28).test))[0][:1], expected)


def test_the_usual_size(folder):
    assert next(iter(data.imagefolder(folder).test))[0].shape == (2, 3, 224, 224)


def test_folders_follow_the_seed_and_the_batch_size_and_workers_have_no_say(folder):
    first = data.imagefolder(folder, size=16, seed=3)
    epochs = [whole(first.train) for _ in range(2)]
    assert not torch.equal(epochs[0][0], epochs[1][0])
    torch.manual_seed(99)
    state = torch.get_rng_state()
    for options in ({}, {"batch_size": 2}, {"workers": 2}):
        train = data.imagefolder(folder, size=16, seed=3, **options).train
        for x, y in epochs:
            u, v = whole(train)
            assert torch.equal(x, u)
            assert torch.equal(y, v)
    assert torch.equal(torch.get_rng_state(), state)
    other = whole(data.imagefolder(folder, size=16, seed=4).train)
    assert not torch.equal(other[0], epochs[0][0])


def test_without_augmentation_the_training_images_are_plain(folder):
    loaders = data.imagefolder(folder, size=16, augment=False)
    plain = {tuple(x.flatten().tolist()) for x in whole(loaders.plain)[0]}
    assert {tuple(x.flatten().tolist()) for x in whole(loaders.train)[0]} == plain
    drawn = whole(data.imagefolder(folder, size=16).train)[0]
    assert not {tuple(x.flatten().tolist()) for x in drawn} & plain


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_missing_folder(folder, part):
    (folder / part).rename(folder / "moved")
    text = refused(lambda: data.imagefolder(folder))
    assert f"there is no folder `{part}`" in text
    assert f"where: {folder / part}" in text
    assert "give the PATH that holds both `train` and `val`" in text


def test_a_folder_without_classes(tmp_path):
    write(tmp_path, {"train/1.png": png(), "val/cat/2.png": png()})
    text = refused(lambda: data.imagefolder(tmp_path))
    assert "`train` holds no classes" in text
    assert "sort the images into folders, one per class" in text


def test_classes_that_differ(folder):
    write(folder, {"train/emu/1.png": png(), "val/fox/1.png": png()})
    write(folder, {f"val/x{i}/1.png": png() for i in range(4)})
    text = refused(lambda: data.imagefolder(folder))
    assert "`train` and `val` have different classes" in text
    assert "only `train` has `emu`; only `val` has `fox`, `x0`, `x1` and 2 more" in text


def test_an_empty_class(folder):
    for part in ("train", "val"):
        write(folder, {f"{part}/emu/notes.txt": "later", f"{part}/fox/notes.txt": "later"})
    text = refused(lambda: data.imagefolder(folder))
    assert "the class `emu` holds no image, nor do 1 others" in text
    assert f"where: {folder / 'train' / 'emu'}" in text


@pytest.mark.parametrize("damage", [b"no image", b"", png(64, 64)[:200]])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_is_no_image(folder, damage, workers):
    write(folder, {"val/dog/7.png": damage})
    loaders = data.imagefolder(folder, size=16, workers=workers)
    text = refused(lambda: list(loaders.test))
    assert text.startswith("`7.png` is not an image that can be read\n  where: ")
    assert f"where: {folder / 'val/dog/7.png'}\n  why:   " in text
    assert text.endswith("\n  fix:   replace or remove it")


def test_the_size_is_checked(folder):
    with pytest.raises(OptionError, match="`size` must be at least 1, not 0"):
        data.imagefolder(folder, size=0)
    with pytest.raises(OptionTypeError, match="`size` must be an integer, not 1"):
        data.imagefolder(folder, size=1.5)
    with pytest.raises(OptionError, match="at least 1, not -1"):
        data.imagefolder(folder, batch_size=-1)


@pytest.mark.parametrize("given", ["path", "root"])
def test_tiny_imagenet(tiny, given):
    path = tiny / "tiny-imagenet-200"
    if given == "path":
        loaders = data.load(f"tiny-imagenet:{path}", batch_size=4)
    else:
        loaders = data.load("tiny-imagenet", root=tiny, batch_size=4)
    assert (loaders.name, loaders.classes, loaders.shape) == ("tiny-imagenet", 3, (3, 64, 64))
    x, y = whole(loaders.train)
    assert x.shape == (6, 3, 64, 64)
    assert sorted(y.tolist()) == [0, 0, 1, 1, 2, 2]
    assert whole(loaders.test)[1].tolist() == [2, 0, 1]  # classes in the order of their names


def test_tiny_imagenet_is_shifted_and_flipped_when_augmented(tiny):
    plain = {y: x for x, y in data.load("tiny-imagenet", root=tiny, seed=1).plain.dataset}
    loaders = data.load("tiny-imagenet", root=tiny, seed=1)
    black = -torch.tensor(loaders.mean) / torch.tensor(loaders.std)
    padded = 0
    for _ in range(4):
        x, _ = whole(loaders.train)
        assert x.shape == (6, 3, 64, 64)
        edges = torch.cat([x[..., 0], x[..., -1], x[..., 0, :], x[..., -1, :]], 2)
        padded += sum(bool((e - black[:, None]).abs().max(0).values.min() < 1e-6) for e in edges)
    assert padded > 12  # of 24: a shift by nothing is rare
    assert plain


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda d: (d / "wnids.txt").unlink(), "wnids.txt: No such file"),
        (lambda d: (d / "val/val_annotations.txt").unlink(), "val_annotations.txt: No such file"),
        (lambda d: (d / "val/images").rename(d / "val/pictures"), "val/images: No such file"),
        (lambda d: (d / "val/images/val_1.JPEG").unlink(), "`val/images` lacks `val_1.JPEG`"),
        (lambda d: (d / "train").rename(d / "training"), "`train` does not hold the classes"),
        (lambda d: (d / "train/n001").rename(d / "train/n009"), "`train` does not hold the classes"),
        (lambda d: (d / "train/n001/images/n001_0.JPEG").unlink(), "classes of `train` have 1 to 2 images; in the whole set"),
        (lambda d: (d / "val/val_annotations.txt").write_text("val_0.JPEG\tn009\n"), "line 1, names no class"),
        (lambda d: (d / "val/val_annotations.txt").write_text("val_0.JPEG\n"), "`val_annotations.txt`, line 1, names no class"),
        (lambda d: (d / "val/val_annotations.txt").write_text("val_0.JPEG\tn001\n"), "classes of `val` have 0 to 1 images"),
        (lambda d: (d / "val/val_annotations.txt").write_text(""), "classes of `val` have 0 to 0 images"),
    ],
)  # fmt: skip
def test_tiny_lacks_something(tiny, spoil, words):
    spoil(tiny / "tiny-imagenet-200")
    text = refused(lambda: data.load("tiny-imagenet", root=tiny))
    assert "Tiny-ImageNet is incomplete" in text
    assert words in text
    assert "http://cs231n.stanford.edu/tiny-imagenet-200.zip (MD5 90528d7c" in text


def test_an_image_of_another_size(tiny):
    write(tiny / "tiny-imagenet-200", {"val/images/val_0.JPEG": png(32, 16)})
    text = refused(lambda: list(data.load("tiny-imagenet", root=tiny).test))
    assert "`val_0.JPEG` has 32 x 16 pixels" in text
    assert "every image of this set has 64 x 64" in text


def test_an_image_of_too_many_pixels_is_named(folder, monkeypatch):
    from PIL import Image

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)  # 64 x 64 is more than twice that
    text = refused(lambda: whole(data.load(f"imagefolder:{folder}", batch_size=2, size=28).train))
    assert "is not an image that can be read" in text
    assert "decompression bomb" in text
