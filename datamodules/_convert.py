"""Shards made: the official layout of a data set becomes webdataset tars and a ``dataset.json``.

A data set's file says which samples there are and how one is read; everything else (splitting into
shards, worker processes, resuming, checksums, reporting) is here, once for all.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image
from tqdm import tqdm
from webdataset import TarWriter

from common import signals
from common.errors import UserError
from common.files import file_digest, write_atomically
from common.pictures import MAX_PIXELS, BadPicture, identify
from datamodules._dataset_json import NAME, UNFINISHED, read_dataset_json
from datamodules._decode import read_index_png
from datamodules._samples import DatasetInfo
from datamodules._tar import BadSample

log = logging.getLogger(__name__)

Members = dict[str, str | bytes]

_SIGN_OF_LIFE = 30  # seconds


class SourceError(UserError):
    """The source folder isn't what was expected; the message shows both."""


@dataclass(frozen=True)
class Source:
    """The samples of a data set as its official layout holds them.

    Attributes:
        info: the data set.
        split: name of the split.
        items: what ``read`` needs for each sample, in order; picklable, with a stable repr.
        read: members (name -> bytes) of one sample, ``__key__`` among them as text; raises for a
            sample that can't be used.
        bad: samples known to be unusable before any was read, as (key, reason).
        extra: further facts for ``dataset.json``, such as the variant of the layout that was found.
    """

    info: DatasetInfo
    split: str
    items: Sequence[Any]
    read: Callable[[Any], Members]
    bad: tuple[tuple[str, str], ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ShardFacts:
    """What ``dataset.json`` says of one shard; ``source`` identifies the samples it was made from."""

    name: str
    samples: int
    sha256: str
    source: str
    bad: tuple[tuple[str, str], ...]


def write_shards(
    source: Source, output: Path, *, shard_size: int = 500, workers: int | None = None
) -> dict[str, Any]:
    """Write all shards that are not there yet, then ``dataset.json``; returns what that holds.

    A shard gets its final name only when it is complete, so a killed conversion is resumed by
    running it again; until it has come to its end ``dataset.json`` says so, and nobody else takes the
    folder for a data set. Bad samples are left out, counted and listed. A second process that writes
    to the same folder waits for the first.

    Raises:
        SourceError: the output folder holds shards of another data set or split, or tars that no
            conversion made.
    """
    output.mkdir(parents=True, exist_ok=True)
    with _alone(output):
        return _write_shards(source, output, shard_size, workers)


def _write_shards(
    source: Source, output: Path, shard_size: int, workers: int | None
) -> dict[str, Any]:
    before = read_dataset_json(output, half_made=True)
    if before and (before.get("dataset"), before.get("split")) != (source.info.name, source.split):
        raise SourceError(
            f"{output} holds shards of {before.get('dataset')} {before.get('split')}, not of "
            f"{source.info.name} {source.split}: choose another --output"
        )
    listed = {shard["name"] for shard in before.get("shards", [])}
    for tar in sorted(output.glob("*.tar")):
        if tar.name not in listed and not tar.with_name(f"{tar.name}.json").exists():
            raise SourceError(
                f"{output} holds {tar.name}, which is no shard made here: choose another --output"
            )
    groups = {
        f"{start // shard_size:06d}.tar": source.items[start : start + shard_size]
        for start in range(0, len(source.items), shard_size)
    }
    done: dict[str, ShardFacts] = {}
    for name, group in groups.items():
        facts = _finished(output, name, _identity(source, group))
        if facts:
            done[name] = facts
    stale = {path.name for path in output.glob("[0-9]*.tar")} - groups.keys()
    if stale or len(done) < len(groups):
        unfinished = {"samples": len(source.items), "shards": len(groups)}
        about = {"dataset": source.info.name, "split": source.split, UNFINISHED: unfinished}
        write_atomically(output / NAME, json.dumps(about, indent=1))
    for name in stale:
        (output / name).unlink()
        (output / f"{name}.json").unlink(missing_ok=True)
    for pattern in ("[0-9]*.tar.*.partial", ".*.json.*.partial"):
        for leftover in output.glob(pattern):
            leftover.unlink()
    _write_missing(source, output, groups, done, workers)
    shards = [done[name] for name in sorted(done)]
    described = {
        "dataset": source.info.name,
        "split": source.split,
        "classes": list(source.info.classes),
        "prompts": list(source.info.prompts),
        "palette": [list(colour) for colour in source.info.palette],
        "background": source.info.zero_is_background,
        "labels": source.info.labels,
        "samples": sum(s.samples for s in shards),
        **source.extra,
        "shards": [{k: v for k, v in asdict(s).items() if k != "bad"} for s in shards],
        "bad": [list(b) for b in (*source.bad, *(b for s in shards for b in s.bad))],
    }
    write_atomically(output / NAME, json.dumps(described, indent=1))
    return described


def _write_missing(
    source: Source,
    output: Path,
    groups: dict[str, Sequence[Any]],
    done: dict[str, ShardFacts],
    workers: int | None,
) -> None:
    """Write the shards of ``groups`` that are not in ``done``, and add them to it."""
    todo = {name: group for name, group in groups.items() if name not in done}
    workers = min(workers or os.cpu_count() or 1, max(len(todo), 1))
    with tqdm(total=len(source.items), unit="sample", disable=None, file=sys.stderr) as bar:
        bar.update(sum(len(groups[name]) for name in done))
        if workers <= 1:
            for name, group in todo.items():
                done[name] = _write_shard(source, output, name, group)
                bar.update(len(group))
            return
        with process_pool(workers) as pool:
            with signals.blocked():
                futures = [
                    pool.submit(_write_shard, _without_items(source), output, name, group)
                    for name, group in todo.items()
                ]
            for future in as_completed(futures):
                facts = future.result()
                done[facts.name] = facts
                bar.update(len(groups[facts.name]))


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Hold a folder for this process, waiting for one that has it; ends with the process."""
    lock = FileLock(output / ".lock")
    waited = 0
    while True:
        try:
            lock.acquire(timeout=_SIGN_OF_LIFE if waited else 0)
            break
        except Timeout:
            log.warning("waiting for another process that writes to %s (%d s)", output, waited)
            waited += _SIGN_OF_LIFE
        except (NotImplementedError, OSError) as error:  # a file system without locks
            log.warning("%s can't be locked (%s): let no second process write there", output, error)
            break
    try:
        yield
    finally:
        lock.release()


def process_pool(workers: int) -> ProcessPoolExecutor:
    """Processes that leave Ctrl-C to this one, if jobs are submitted within `signals.blocked`."""
    # SIGTERM is how the pool itself ends those that are left when one of them has died.
    begin = partial(signals.leave_to_parent, but=(signal.SIGTERM,))
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), begin)


def _write_shard(source: Source, output: Path, name: str, items: Sequence[Any]) -> ShardFacts:
    partial = output / f"{name}.{os.getpid()}.partial"
    bad: list[tuple[str, str]] = []
    samples = 0
    with open(partial, "wb") as file:
        with TarWriter(file, encoder=False, mtime=0, user="root", group="root") as tar:
            for item in items:
                try:
                    members = source.read(item)
                except BadSample as error:
                    bad.append((_item_key(item), str(error)))
                except Exception as error:  # any broken file of a large set must not end the run
                    bad.append((_item_key(item), f"{type(error).__name__}: {error}"[:500]))
                else:
                    tar.write(members)
                    samples += 1
        file.flush()
        os.fsync(file.fileno())
    facts = ShardFacts(name, samples, file_digest(partial), _identity(source, items), tuple(bad))
    write_atomically(output / f"{name}.json", json.dumps(asdict(facts)))
    partial.replace(output / name)
    return facts


def _finished(output: Path, name: str, identity: str) -> ShardFacts | None:
    """What a complete shard of the same samples says of itself, if it is there."""
    beside = output / f"{name}.json"
    if not (output / name).exists() or not beside.exists():
        return None
    facts = json.loads(beside.read_text())
    if facts["source"] != identity or file_digest(output / name) != facts["sha256"]:
        return None
    return ShardFacts(**{**facts, "bad": tuple((k, r) for k, r in facts["bad"])})


def _identity(source: Source, items: Sequence[Any]) -> str:
    what = (source.info.name, source.split, sorted(source.extra.items()))
    text = repr((*what, [str(item) for item in items]))
    return hashlib.sha256(text.encode()).hexdigest()


def _item_key(item: Any) -> str:
    return str(item[0] if isinstance(item, tuple) else item)


def _without_items(source: Source) -> Source:
    # each worker gets its shard's items; sending it all of them would cost more than the work
    return Source(source.info, source.split, (), source.read, extra=source.extra)


def sample_members(info: DatasetInfo, image_id: str, image: Path, label: np.ndarray) -> Members:
    """Members of a sample with a label map [H,W] of label values.

    Raises:
        BadSample: the sizes differ, or a label is out of range.
    """
    width, height = image_size(image)
    if label.shape != (height, width):
        raise BadSample(
            f"mask is {label.shape[1]}x{label.shape[0]}, image {image} is {width}x{height}"
        )
    values = [int(v) for v in np.unique(label) if v != info.void]
    first, top = info.label_value(0), info.label_value(len(info.classes) - 1)
    if any(v > top for v in values):
        raise BadSample(f"label value {max(values)} is above {top}")
    positives = [v - first for v in values if v >= first]
    record = {"id": image_id, "width": width, "height": height, "positives": positives}
    return {
        **image_members(image_id, image),
        "label.png": png_bytes(label.astype(info.label_type), info.flat_palette()),
        "json": json_bytes(record),
    }


def image_members(image_id: str, image: Path) -> Members:
    """Key and image of a sample; the file's bytes as they are."""
    return {
        "__key__": image_id.replace(".", "_"),  # webdataset ends a key at its first dot
        image.suffix[1:].lower(): image.read_bytes(),
    }


def image_size(image: Path) -> tuple[int, int]:
    """(width, height) of an image that can be read to its end.

    Raises:
        BadSample: it isn't there, is broken, or of a format that is not opened.
    """
    try:
        picture = identify(image.read_bytes(), MAX_PIXELS)
        picture.load()
        return picture.size
    except FileNotFoundError:
        raise BadSample(f"{image} is missing") from None
    except (OSError, BadPicture) as error:
        raise BadSample(f"{image} can't be read: {error}") from None


def label_of(mask: Path) -> np.ndarray:
    """Values [H,W] of a label PNG.

    Raises:
        BadSample: it isn't there, or is broken.
    """
    try:
        return read_index_png(mask.read_bytes())
    except FileNotFoundError:
        raise BadSample(f"{mask} is missing") from None
    except OSError as error:
        raise BadSample(f"{mask} can't be read: {error}") from None


def mapped(label: np.ndarray, table: np.ndarray, mask: Path) -> np.ndarray:
    """Values of ``label`` [H,W] looked up in ``table`` [n], where -1 stands for what may not occur.

    Raises:
        BadSample: such a value occurs; names the file ``mask``.
    """
    known = np.flatnonzero(table >= 0)
    wrong = np.setdiff1d(label, known)
    if wrong.size:
        raise BadSample(f"{mask} has unknown values {wrong[:8].tolist()}")
    return table[label].astype(np.uint8)


def png_bytes(indices: np.ndarray, palette: list[int]) -> bytes:
    """Palette PNG of label values [H,W] uint8, or 16-bit PNG of uint16.

    ``palette`` must reach the largest value: larger ones would lose their upper bits.
    """
    image = Image.fromarray(indices)
    if indices.dtype == np.uint8:
        image.putpalette(palette)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def json_bytes(record: dict[str, Any]) -> bytes:
    """A sample's json member."""
    return json.dumps(record, ensure_ascii=False).encode()


def folder_with(name: str, source: Path, *below: str) -> Path:
    """The folder of a data set: ``source``, or one ``below`` it, whichever holds ``name``.

    ``source`` where none does: what is missing is told by whoever reads it.
    """
    places = (source, *(source / inner for inner in below))
    return next((place for place in places if (place / name).exists()), source)


def first_of(places: Sequence[Path], layout: str) -> Path:
    """The first of ``places`` that exists.

    Raises:
        SourceError: none does; shows the expected ``layout`` and what is found instead.
    """
    for place in places:
        if place.exists():
            return place
    nearest = next(p for p in places[0].parents if p.exists())
    found = ", ".join(sorted(p.name for p in nearest.iterdir())[:12]) or "nothing"
    others = f" (nor {', '.join(str(p) for p in places[1:])})" if places[1:] else ""
    raise SourceError(
        f"{places[0]} does not exist{others}.\nExpected --source to hold:\n{layout}\n"
        f"Found in {nearest}: {found}"
    )
