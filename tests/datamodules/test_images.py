"""Own images: whatever a person points at becomes batches with safe, unique keys."""

import io
import sys
import tarfile

import numpy as np
import pytest
import torch
from lightning.fabric.utilities import move_data_to_device
from PIL import EpsImagePlugin, Image, PngImagePlugin

from datamodules import Images
from datamodules._contents import has_changed
from datamodules._decode import read_index_png, reason_of
from datamodules._device_decode import load_decoder
from datamodules._samples import Batch, Encoded, Wanted
from datamodules._tar import MAX_KEY, BadSample
from datamodules.images import find_images, make_key
from tasks._task import Task
from tests.datamodules.fakes import picture

SIZE = (20, 30)


@pytest.fixture
def photos(tmp_path):
    """A folder as people have them: sub-folders, the same name twice, other files, hidden ones."""
    for name in (
        "b.jpg",
        "a.jpg",
        "a.png",
        "A.PNG",
        "trip to Köln/a.jpg",
        "trip to Köln/c.v2.webp",
    ):
        picture(tmp_path / "photos" / name, SIZE)
    (tmp_path / "photos" / ".hidden.jpg").write_bytes(b"")
    (tmp_path / "photos" / "notes.txt").write_text("not a picture")
    return tmp_path / "photos"


def batches_of(data):
    return list(data.loader())


def pending(batch):
    return [sample.image for sample in batch.samples]


def sizes(batch):
    return [sample.size for sample in batch.samples]


def keys_of(data):
    return [key for batch in batches_of(data) for key in batch.keys]


def images(path, **fields):
    return Images(path, num_workers=0, image_size=8, **fields)


def test_a_folder_with_all_below_it(photos):
    data = images(str(photos), names=["cat", "remote control"])
    keys = keys_of(data)
    assert sorted(keys) == sorted(
        ["A", "a_jpg", "a_png", "b", "trip_to_Köln/a", "trip_to_Köln/c_v2"]
    )
    assert len({key.casefold() for key in keys}) == len(keys)
    assert data.info.classes == data.info.prompts == ("cat", "remote control")
    assert data.sample_counts() == {"images-00000": 6}


@pytest.mark.parametrize("kind", ["file", "pattern", "list", "twice"])
def test_files_patterns_and_lists(kind, photos):
    path, keys = {
        "file": (str(photos / "b.jpg"), ["b"]),
        "pattern": (str(photos / "*.jpg"), ["a", "b"]),
        "list": ([str(photos / "b.jpg"), str(photos / "a.jpg")], ["b", "a"]),
        "twice": ([str(photos / "b.jpg"), str(photos / "b.jpg")], ["b"]),
    }[kind]
    assert keys_of(images(path)) == keys


def test_a_tar_is_a_shard_as_it_is(photos, tmp_path):
    with tarfile.open(tmp_path / "mine.tar", "w") as tar:
        tar.add(photos / "a.jpg", "one.jpg")
        tar.add(photos / "b.jpg", "two.jpg")
    data = images([str(tmp_path / "mine.tar"), str(photos / "b.jpg")])
    assert [name for name, _ in data.shard_list()] == ["images-00000", "mine"]
    assert keys_of(data) == ["b", "one", "two"]


def test_groups_take_the_place_of_shards(photos):
    data = images(str(photos), group=4, batch_size=3)
    found = [(b.shard, b.start, len(b.keys), b.total) for b in batches_of(data)]
    assert found == [
        ("images-00000", 0, 3, 4),
        ("images-00000", 3, 1, 4),
        ("images-00001", 0, 2, 2),
    ]
    data.wanted = Wanted(finished=frozenset({"images-00000"}))
    assert [b.shard for b in batches_of(data)] == ["images-00001"]


def test_another_size_of_a_file_is_another_run(photos):
    before = images(str(photos)).contents()
    assert not has_changed(before["images-00000"], images(str(photos)).contents()["images-00000"])
    (photos / "b.jpg").write_bytes(b"shorter")
    assert has_changed(before["images-00000"], images(str(photos)).contents()["images-00000"])


def test_what_is_broken_is_named_and_the_rest_goes_on(photos):
    (photos / "empty.jpg").write_bytes(b"")
    (photos / "text.jpg").write_bytes(b"no picture at all")
    whole = (photos / "b.jpg").read_bytes()
    (photos / "half.jpg").write_bytes(whole[: len(whole) // 2])
    batch = images(str(photos), batch_size=20).loader().__iter__().__next__()
    assert len(batch.keys) == 6
    reasons = {error.key: error.reason for error in batch.errors}
    assert reasons["empty"] == "the image file is empty"
    assert reasons["text"] == "not a picture of a known format"
    assert "Truncated" in reasons["half"] or "truncated" in reasons["half"]


@pytest.fixture
def jpegs(photos):
    """Those that decoders read alike, others, and broken ones."""
    down, right = np.mgrid[0:255:90j, 0:255:120j]
    smooth = Image.fromarray(np.stack([down, right, 255 - down], axis=2).astype(np.uint8))
    smooth.save(photos / "smooth.jpg", quality=90)
    smooth.save(photos / "progressive.jpg", progressive=True)
    smooth.convert("L").save(photos / "gray.jpg")
    smooth.convert("CMYK").save(photos / "cmyk.jpg")
    turned = Image.Exif()
    turned[0x0112] = 6
    smooth.save(photos / "turned.jpg", exif=turned)
    whole = (photos / "smooth.jpg").read_bytes()
    (photos / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (photos / "no_image.jpg").write_bytes(whole[:2] + whole[-2:])
    (photos / "empty.jpg").write_bytes(b"")
    return photos


@pytest.mark.parametrize("resize", ["squash", "short_side", "opencv"])
def test_torchcodec_decodes_what_pillow_does(resize, jpegs):
    options = {"resize": resize, "batch_size": 5}
    expected = batches_of(images(str(jpegs), **options))
    data = images(str(jpegs), decoder="torchcodec", **options)
    waiting = batches_of(data)
    assert {type(image).__name__ for b in waiting for image in pending(b)} == {"Encoded", "Tensor"}
    given = [data.on_after_batch_transfer(batch, 0) for batch in waiting]
    for ours, theirs in zip(given, expected, strict=True):
        assert (ours.keys, sizes(ours), ours.end) == (theirs.keys, sizes(theirs), theirs.end)
        assert [e.key for e in ours.errors] == [e.key for e in theirs.errors]
        assert type(ours.images) is type(theirs.images)
        for a, b in zip(ours.images, theirs.images, strict=True):
            assert a.shape == b.shape
            assert (a.int() - b.int()).abs().max() <= 1
    assert sorted(e.key for batch in given for e in batch.errors) == ["empty", "half", "no_image"]


def test_a_jpeg_that_only_breaks_while_it_is_decoded(jpegs):
    data = images(str(jpegs / "smooth.jpg"), decoder="torchcodec")
    (batch,) = batches_of(data)
    (waiting,) = pending(batch)
    torn = Encoded(waiting.data[: len(waiting.data) // 2], waiting.size)
    half = batch.samples[0]._replace(image=torn)
    found = data.on_after_batch_transfer(Batch.collate(batch.shard, 0, 1, [half], []), 0)
    assert (found.keys, len(found.images), found.end) == ([], 0, 1)
    assert [error.key for error in found.errors] == ["smooth"]


def test_lightning_moves_a_waiting_jpeg_as_it_is(jpegs):
    (batch,) = batches_of(images(str(jpegs / "smooth.jpg"), decoder="torchcodec"))
    moved = move_data_to_device(batch, torch.device("cpu"))
    assert pending(moved) == pending(batch)


def test_a_batch_that_is_decoded_in_parts(jpegs, monkeypatch):
    """Because it is large, or because the decoder refuses all of it for one bad image."""
    data = images(str(jpegs), decoder="torchcodec", batch_size=20)
    (batch,) = batches_of(data)
    whole = data.on_after_batch_transfer(batch, 0)
    monkeypatch.setattr("datamodules._device_decode._PIXELS_AT_ONCE", 90 * 120)
    parts = data.on_after_batch_transfer(batch, 0)
    assert parts.keys == whole.keys
    assert torch.equal(parts.images, whole.images)
    decode = load_decoder()

    def one_only(files, **options):
        if len(files) > 1:
            raise RuntimeError("out of memory")
        return decode(files, **options)

    monkeypatch.setattr("datamodules._device_decode._PIXELS_AT_ONCE", 1 << 25)
    monkeypatch.setattr("datamodules._device_decode.load_decoder", lambda: one_only)
    assert torch.equal(data.on_after_batch_transfer(batch, 0).images, whole.images)


@pytest.mark.parametrize("decoder", ["pillow", "torchcodec"])
def test_only_our_own_limit_of_pixels_counts(decoder, jpegs):
    assert Image.MAX_IMAGE_PIXELS is None  # Pillow's, of which a worker would be reminded or not
    few = images(str(jpegs / "smooth.jpg"), decoder=decoder, max_pixels=100)
    assert "more than max_pixels 100" in batches_of(few)[0].errors[0].reason


def test_a_missing_torchcodec_is_said_at_once(photos, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with pytest.raises(ValueError, match=r"clip-surgery-lightning\[gpu-decode\]"):
        images(str(photos), decoder="torchcodec")


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16", "F"])
def test_any_mode_is_rgb(mode, tmp_path):
    gray = np.full(SIZE, 128, np.uint8)
    suffix = {"CMYK": "jpg", "F": "tif"}.get(mode, "png")
    if mode == "I;16":
        image = Image.fromarray(gray.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(gray).convert(mode)
    image.save(tmp_path / f"x.{suffix}")
    batch = batches_of(images(str(tmp_path)))[0]
    assert not batch.errors
    assert batch.images.shape == (1, 3, 8, 8)
    if mode != "1":
        assert (batch.images.int() - 128).abs().max() <= 2


@pytest.fixture
def ghostscript(monkeypatch):
    """How often Ghostscript would have been called."""
    called = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **options: called.append(args))
    return called


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 30 20\n%%EndComments\n{} loop\n"


def test_what_data_sets_do_not_use_is_refused_by_name(tmp_path, ghostscript):
    gray = Image.new("L", (30, 20), 128)
    for name, kind in {"pcx": "PCX", "ico": "ICO"}.items():
        gray.save(tmp_path / f"{name}.jpg", kind)
    for name, start in {
        "eps": EPS,
        "heic": b"\0\0\0\x18ftypheic" + bytes(40),
        "page": b"<!DOCTYPE html><html>",
        "broken": b"\xff\xd8\xff" + b"x" * 60,
    }.items():
        (tmp_path / f"{name}.jpg").write_bytes(start)
    (batch,) = batches_of(images(str(tmp_path), batch_size=20))
    reasons = {error.key: error.reason.split(",")[0] for error in batch.errors}
    assert reasons == {
        "pcx": "it is of the format PCX",
        "ico": "it is of the format ICO",
        "eps": "it is of the format EPS",
        "heic": "it is an HEIC file",
        "page": "it is a web page file",
        "broken": "a broken JPEG file",
    }
    assert not ghostscript


def test_labels_are_png_and_nothing_else(tmp_path, ghostscript):
    for data in (EPS, b"GIF89a" + bytes(60)):
        with pytest.raises(BadSample, match=r"its label PNG: it is of the format (EPS|GIF)"):
            read_index_png(data)
    assert not ghostscript


@pytest.mark.parametrize(
    ("kind", "options"),
    [("GIF", {"save_all": True}), ("WEBP", {"save_all": True, "lossless": True}),
     ("TIFF", {"save_all": True}), ("PNG", {"save_all": True}), ("MPO", {"save_all": True})],
)  # fmt: skip
def test_of_many_frames_the_first_is_read_and_no_other(kind, options, tmp_path):
    frames = [Image.new("RGB", (30, 20), (value, value, value)) for value in (128, 20, 250, 90)]
    frames[0].save(tmp_path / "x.jpg", kind, append_images=frames[1:], **options)
    (batch,) = batches_of(images(str(tmp_path)))
    assert not batch.errors
    assert (batch.images.int() - 128).abs().max() <= 2


def test_texts_inside_a_png_are_bounded(tmp_path):
    """Of compressed texts in its chunks; Pillow's own limits, on which we rely."""
    for name, texts in {"long": [2 << 20], "many": [1 << 19] * 200, "usual": [1 << 10]}.items():
        info = PngImagePlugin.PngInfo()
        for i, length in enumerate(texts):
            info.add_text(f"text {i}", "x" * length, zip=True)
        Image.new("L", (30, 20), 128).save(tmp_path / f"{name}.png", pnginfo=info)
    (batch,) = batches_of(images(str(tmp_path)))
    assert batch.keys == ["usual"]
    assert {error.key for error in batch.errors} == {"long", "many"}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_pixels_that_are_no_numbers(value, tmp_path):
    pixels = np.zeros(SIZE, np.float32)
    pixels[3, 4] = value
    Image.fromarray(pixels).save(tmp_path / "x.tif")
    (batch,) = batches_of(images(str(tmp_path)))
    assert "not finite numbers" in batch.errors[0].reason


def test_a_reason_is_the_same_every_time(tmp_path):
    """Not an object's address, nor the file that a download happens to be in."""
    for name, data in {"a": b"GIF89a", "b": b"\xff\xd8\xff", "c": b"II*\0", "d": b"BM"}.items():
        (tmp_path / f"{name}.jpg").write_bytes(data + b"\x01" * 40)
    data = images(str(tmp_path))
    reasons = [[error.reason for error in batches_of(data)[0].errors] for _ in range(2)]
    assert reasons[0] == reasons[1]
    assert len(reasons[0]) == 4
    (tmp_path / "a.jpg").unlink()
    assert batches_of(data)[0].errors[0].reason == "No such file or directory"
    assert " at 0x" not in reason_of(OSError(f"cannot identify image file {io.BytesIO()!r}"))


def test_names_come_from_a_file_too(photos, tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("﻿cat\n\n remote control \r\n", encoding="utf-8")
    assert images(str(photos), names=str(words)).info.classes == ("cat", "remote control")
    assert images(str(photos), names="cat, dog").info.classes == ("cat", "dog")
    with pytest.raises(FileNotFoundError, match="no such file"):
        images(str(photos), names="missing.txt")


def test_comments_in_a_file_of_names(photos, tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("# what we look for\ncat\n  # not dogs\nC# sheet\n")
    assert images(str(photos), names=str(words)).info.classes == ("cat", "C# sheet")


def test_pictures_that_are_not_read_are_counted(photos, caplog):
    for name in ("a.HEIC", "trip to Köln/b.heic", "c.svg", "d.txt"):
        (photos / name).write_bytes(b"")
    assert len(keys_of(images(str(photos)))) == 6
    assert "left out: 2 .heic, 1 .svg;" in caplog.text


def test_nothing_there_says_what_to_give(tmp_path):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "missing.jpg", tmp_path / "*.jpg"):
        with pytest.raises(FileNotFoundError, match=r"--data\.path"):
            find_images([str(path)])


def test_a_task_that_needs_classes_says_how_to_give_them(photos):
    class Needy(Task):
        needs = ("classes",)

    with pytest.raises(ValueError, match=r'--data\.names "\[cat, remote control\]"'):
        Needy().check_data(images(str(photos)))


def test_keys_are_safe_and_bounded():
    from pathlib import Path

    assert make_key(Path("a b/c:d?.e")) == "a_b/c_d__e"
    assert make_key(Path("__x__")) == "x"
    assert make_key(Path("...")) == "image"
    long = make_key(Path("é" * 300))
    assert len(long.encode()) < MAX_KEY
    assert long != make_key(Path("é" * 301))


def test_the_aspect_ratio_is_kept(tmp_path):
    picture(tmp_path / "wide.png", (40, 100))
    picture(tmp_path / "tall.png", (90, 31))
    for resize in ("short_side", "opencv"):
        batch = batches_of(images(str(tmp_path), resize=resize))[0]
        assert isinstance(batch.images, list)
        assert [tuple(i.shape) for i in batch.images] == [(3, 23, 8), (3, 8, 20)]
        assert sizes(batch) == [(90, 31), (40, 100)]
    alone = batches_of(images(str(tmp_path / "wide.png"), resize="short_side"))[0]
    assert isinstance(alone.images, torch.Tensor)


def test_an_image_in_memory_is_not_needed(photos):
    """Entries only hold places in files: listing a large folder reads nothing of the images."""
    groups, _ = images(str(photos)).found
    spans = [span for entry in groups["images-00000"] for span in entry.members.values()]
    assert all(span.offset == 0 and span.size > 0 for span in spans)
    with open(spans[0].path, "rb") as file:
        assert Image.open(io.BytesIO(file.read())).size == SIZE[::-1]
