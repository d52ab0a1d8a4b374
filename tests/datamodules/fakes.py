"""Miniature data sets in their official layouts, made of noise.

Each function writes a few samples below a folder and returns what must come out of the pipeline:
key -> label map [H,W], or {class index: mask [H,W]}, or a tuple of class indices. The last sample of
each shows none of the classes: only background, or only void.
"""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from datamodules import coco, coco_stuff, nus_wide, pascal_context, voc
from datamodules.imagenet_s import CLASSES_50

SIZES = [(30, 44), (50, 24), (32, 32), (28, 40)]  # (height, width)
BARE = len(SIZES) - 1  # the sample without any class


def picture(path: Path, size: tuple[int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(list(path.name.encode()))
    Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)


def label_png(path: Path, label: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(label).save(path)


def draw_sample(i, classes, others):
    """The label map of sample ``i``: blocks of classes and of ``others``; of the last, others alone."""
    rng = np.random.default_rng(i)
    values = np.array(others if i == BARE else [*classes, *others])
    blocks = np.array([*others[:4], *rng.choice(values, 20 - len(others[:4]))])
    blocks = rng.permutation(blocks).reshape(5, 4)
    rows, columns = (np.arange(n) * m // n for n, m in zip(SIZES[i], (5, 4), strict=True))
    return blocks[rows][:, columns]


def fake_voc(root: Path):
    folder, truth = root / "VOCdevkit" / "VOC2012", {}
    for i, size in enumerate(SIZES):
        key = f"2007_00{i}"
        truth[key] = draw_sample(i, range(1, len(voc.CLASSES) + 1), [0, 255]).astype(np.uint8)
        picture(folder / "JPEGImages" / f"{key}.jpg", size)
        label_png(folder / "SegmentationClass" / f"{key}.png", truth[key])
    write_list(folder / "ImageSets" / "Segmentation" / "val.txt", truth)
    return truth


def fake_pascal_context(root: Path):
    folder, truth = root / "VOC2010", {}
    for i, size in enumerate(SIZES):
        key = f"2008_00{i}"
        truth[key] = draw_sample(i, range(1, 60), [0]).astype(np.uint8)
        picture(folder / "JPEGImages" / f"{key}.jpg", size)
        label_png(folder / "SegmentationClassContext" / f"{key}.png", truth[key])
    write_list(folder / "ImageSets" / "SegmentationContext" / "val.txt", truth)
    return truth


def fake_pascal_context_mat(root: Path):
    """The release with 459 classes, of which one here is none of the 59."""
    from scipy.io import savemat

    names = {2 * i + 3: name for i, name in enumerate(pascal_context.CLASSES)} | {400: "accordion"}
    root.mkdir(parents=True)
    (root / "labels.txt").write_text("".join(f"{n}: {name}\n" for n, name in names.items()))
    truth = {}
    for i, size in enumerate(SIZES):
        key = f"2008_00{i}"
        index = draw_sample(i, range(1, 60), [0])
        released = np.where(index == 0, 400, 2 * index + 1).astype(np.uint16)
        truth[key] = index.astype(np.uint8)
        picture(root / "JPEGImages" / f"{key}.jpg", size)
        (root / "trainval").mkdir(exist_ok=True)
        savemat(root / "trainval" / f"{key}.mat", {"LabelMap": released})
    write_list(root / "ImageSets" / "Main" / "val.txt", [*truth, "2008_not_labelled"])
    return truth


def fake_coco(root: Path):
    """Overlapping polygons, both kinds of RLE, a crowd, and an image without annotations."""
    height, width = 40, 60
    images = [
        {"id": i + 5, "file_name": f"{i:012d}.jpg", "height": height, "width": width}
        for i in range(3)
    ]
    for image in images:
        picture(root / "val2017" / image["file_name"], (height, width))
    cat = np.zeros((height, width), np.uint8)
    cat[4:14, 6:26] = 1
    bed = np.zeros((height, width), np.uint8)
    bed[0:30, 0:50] = 1
    crowd = np.zeros((height, width), np.uint8)
    crowd[20:40, 10:30] = 1
    person = np.zeros((height, width), np.uint8)
    person[25:35, 5:15] = 1
    annotations = [
        annotation(5, 17, [[6, 4, 26, 4, 26, 14, 6, 14]]),
        annotation(5, 65, [[0, 0, 50, 0, 50, 15, 0, 15], [0, 15, 50, 15, 50, 30, 0, 30]]),
        annotation(6, 1, {"counts": run_lengths(crowd), "size": [height, width]}, crowd=1),
        annotation(6, 1, {"counts": run_lengths(person), "size": [height, width]}),
        annotation(6, 3, {"counts": run_lengths(crowd), "size": [height, width]}, crowd=1),
    ]
    listed = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": n} for i, n in zip(coco.IDS, coco.CLASSES, strict=True)],
    }
    (root / "annotations").mkdir()
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(listed))
    crowded = np.where(person == 1, 1, np.where(crowd == 1, 255, 0)).astype(np.uint8)
    return {f"{0:012d}": {15: cat, 59: bed}, f"{1:012d}": {0: crowded}, f"{2:012d}": {}}


def annotation(image, category, segmentation, crowd=0):
    return {
        "image_id": image,
        "category_id": category,
        "segmentation": segmentation,
        "iscrowd": crowd,
    }


def run_lengths(mask: np.ndarray) -> list[int]:
    """COCO's counts: lengths of runs down the columns, of zeros first."""
    flat = mask.T.ravel()
    edges = np.flatnonzero(np.diff(flat)) + 1
    lengths = np.diff([0, *edges, flat.size]).tolist()
    return [0, *lengths] if flat[0] else lengths


def fake_coco_stuff(root: Path):
    truth = {}
    for i, size in enumerate(SIZES):
        key = f"{i:012d}"
        index = draw_sample(i, range(171), [171])
        pixels = np.array([*coco_stuff.PIXELS, 255])[index].astype(np.uint8)
        truth[key] = np.where(index == 171, 255, index).astype(np.uint8)
        picture(root / "images" / "val2017" / f"{key}.jpg", size)
        label_png(root / "annotations" / "val2017" / f"{key}.png", pixels)
    return truth


def fake_coco_stuff_converted(root: Path):
    truth = {}
    for i, size in enumerate(SIZES):
        key = f"{i:012d}"
        truth[key] = draw_sample(i, range(171), [255]).astype(np.uint8)
        picture(root / "val2017" / f"{key}.jpg", size)
        folder = root / "stuffthingmaps_trainval2017" / "val2017"
        label_png(folder / f"{key}_labelTrainIds.png", truth[key])
    return truth


def fake_coco_object(root: Path):
    stuff = fake_coco_stuff(root)
    return {key: np.where(m < 80, m + 1, 0).astype(np.uint8) for key, m in stuff.items()}


def fake_cityscapes(root: Path):
    ids = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    train = {number: i for i, number in enumerate(ids)}
    truth = {}
    for i, size in enumerate(SIZES):
        key, city = f"ulm_00000{i}_000019", "ulm" if i else "aachen"
        label = draw_sample(i, ids, sorted({*range(34)} - {*ids}))
        truth[key] = np.vectorize(lambda v: train.get(int(v), 255))(label).astype(np.uint8)
        picture(root / "leftImg8bit" / "val" / city / f"{key}_leftImg8bit.png", size)
        folder = root / "gtFine" / "val" / city
        if i < 2:
            label_png(folder / f"{key}_gtFine_labelIds.png", label.astype(np.uint8))
        else:
            label_png(folder / f"{key}_gtFine_labelTrainIds.png", truth[key])
    return truth


def fake_ade20k(root: Path):
    folder, truth = root / "ADEChallengeData2016", {}
    for i, size in enumerate(SIZES):
        key = f"ADE_val_0000000{i}"
        truth[key] = draw_sample(i, range(1, 151), [0]).astype(np.uint8)
        picture(folder / "images" / "validation" / f"{key}.jpg", size)
        label_png(folder / "annotations" / "validation" / f"{key}.png", truth[key])
    return truth


def fake_imagenet_s(root: Path, synsets=tuple(CLASSES_50), void=255):
    truth = {}
    for i, size in enumerate(SIZES):
        key, number = f"ILSVRC2012_val_0000000{i}", i * 15
        synset = synsets[number]
        label = draw_sample(i, [number + 1, len(synsets)], [0, 1000]).astype(np.uint16)
        rgb = np.stack([label % 256, label // 256, np.zeros_like(label)], -1).astype(np.uint8)
        truth[key] = np.where(label == 1000, void, label)
        picture(root / "validation" / synset / f"{key}.JPEG", size)
        label_png(root / "validation-segmentation" / synset / f"{key}.png", rgb)
    for synset in synsets:
        (root / "validation" / synset).mkdir(exist_ok=True)
    return truth


def fake_imagenet_s300(root: Path):
    return fake_imagenet_s(root, tuple(f"n{90000000 + i}" for i in range(300)), 65535)


def fake_nus_wide(root: Path):
    """The official lists; one image is gone."""
    gone = "cat-0003_3"
    truth = {"boats-0001_1": (5, 75), "cat-0001_2": (11,), gone: (), "cat-0004_4": ()}
    names = [key.replace("-", "\\") + ".jpg" for key in truth]
    (root / "ImageList").mkdir(parents=True)
    (root / "ImageList" / "TestImagelist.txt").write_text("".join(f"{n}\r\n" for n in names))
    labels = root / "Groundtruth" / "TrainTestLabels"
    labels.mkdir(parents=True)
    for index, concept in enumerate(nus_wide.CLASSES):
        column = "".join(f"{int(index in positives)}\n" for positives in truth.values())
        (labels / f"Labels_{concept}_Test.txt").write_text(column)
    del truth[gone]
    for key in truth:
        picture(root / "Flickr" / f"{key.replace('-', '/')}.jpg", SIZES[0])
    return truth


def fake_nus_wide_csv(root: Path):
    picture(root / "images" / "1.jpg", SIZES[0])
    picture(root / "images" / "2.jpg", SIZES[1])
    (root / "nus_wid_data.csv").write_text(
        "filepath,label,split_name\n"
        "images/1.jpg,\"['clouds', 'boats']\",val\n"
        "images/2.jpg,[],val\n"
        "images/3.jpg,['cat'],train\n"
    )
    return {"images-1": (5, 13), "images-2": ()}


def fake_gcc3m(folder: Path) -> dict[str, str | None]:
    """A tar of img2dataset's; returns the captions: one is empty, one is missing."""
    captions = {"000000": "a cat on a bed", "000001": "", "000002": None, "000003": "two dogs"}
    folder.mkdir(parents=True)
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for (key, text), size in zip(captions.items(), SIZES, strict=True):
            picture(folder / "picture.jpg", size)
            members = {"jpg": (folder / "picture.jpg").read_bytes()}
            if text is not None:
                members["txt"] = text.encode()
            members["json"] = json.dumps({"key": key, "caption": text}).encode()
            for ending, data in members.items():
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    (folder / "picture.jpg").unlink()
    return captions


def write_list(path: Path, ids) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{i}\n" for i in ids))


def repeated(shard: Path, target: Path, times: int) -> Path:
    """A shard with the samples of another one, many times under other keys."""
    with tarfile.open(shard) as source, tarfile.open(target, "w") as tar:
        members = [(m, source.extractfile(m).read()) for m in source]
        for i in range(times):
            for member, data in members:
                copy = tarfile.TarInfo(f"{i}_{member.name}")
                copy.size = len(data)
                tar.addfile(copy, io.BytesIO(data))
    return target
