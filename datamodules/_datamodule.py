"""What all data sets share: the DataModule that streams shards."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import CombinedLoader

from common.errors import InvalidSetting
from common.pictures import MAX_PIXELS
from datamodules._contents import describe_file
from datamodules._dataset_json import read_dataset_json
from datamodules._decode import Decoder, Resize
from datamodules._device_decode import decode_pending, load_decoder
from datamodules._download import Archive
from datamodules._fetch import MAX_SHARD_BYTES, TIMEOUT, Limits
from datamodules._handout import Handout
from datamodules._loader import BatchLoader, cores_of_rank
from datamodules._remote import is_remote, needs_spool
from datamodules._samples import Batch, DatasetInfo, Wanted, Wording
from datamodules._shards import ShardStream, expand_shards, name_shards
from datamodules._spool import Ahead, Fetcher, Spool
from datamodules._words import read_names, worded

_PATIENCE = 10  # times --data.timeout, in which a shard is tried again and a batch is decoded


class ShardDataModule(LightningDataModule):
    """Streams the shards of one data set; a subclass names the data set.

    Args:
        shards: a folder of ``*.tar``, a pattern (``shards/{000000..000007}.tar``, ``shards/*.tar``), a
            URL (http, https; s3 and gs with the extras ``s3`` and ``gcs``; what else fsspec opens), or
            a list of these. Tars may be packed (``.tar.gz``).
        batch_size: images a batch.
        num_workers: loader processes of each rank; by default the cores of this machine shared among
            its ranks, and at most 8 where the model itself wants those cores.
        image_size: side, or (height, width), of the images; by default the model's own.
        resize: ``squash`` to that size, as in the paper, or ``short_side``: the shorter side gets that
            size and the aspect ratio is kept, rounded to whole patches; ``opencv``: the same without
            rounding to patches, bilinear and without antialiasing, which gives the very pixels that
            evaluations on mmsegmentation see.
        decoder: ``pillow`` decodes and resizes in the loader workers, the same pixels everywhere.
            ``torchcodec`` leaves common JPEGs to the device of the model, nvJPEG on a GPU, for GPUs
            that the workers can't feed. Its pixels differ: at 224 x 224 by 0.15 of 255 on average
            and 8 at most on a CPU, where decoding is the same and resizing rounds once, not twice;
            nvJPEG's colours differ besides. Needs the extra ``gpu-decode``.
        names: words to use for the classes instead of the data set's own, in the same order: a list,
            or a text file with one a line.
        synonyms: the wording of the classes: ``none`` (the official names, where need be with joined
            words apart), ``raw`` (as they are spelled), ``readable`` (friendlier words), that of a
            published evaluation, where there is one for the data set, or of a text file: a line a class,
            with commas between its words.
        background: whether the background is a class of its own in segmentation; by default as
            usual for the data set.
        on_error: ``skip`` lists a bad sample in ``errors.jsonl`` and goes on, ``raise`` stops.
        max_error_rate: share of bad samples, of all those seen so far by all processes, above which a
            run stops at the end of a shard; of 1,000 if fewer were seen.
        max_pixels: pictures with more pixels are bad samples; they are not unpacked.
        timeout: seconds without a byte after which a shard that is being fetched is tried again, and
            at last given up; a run whose loader workers bring neither a byte nor a batch for ten
            times as long ends.
        max_shard_bytes: larger shards are not fetched or unpacked into the temporary folder.
        ahead: remote shards that a rank fetches before a loader worker comes to them; with 0 a shard is
            fetched when the one before has been read.
        ahead_bytes: no further shard is fetched while another as large as the largest would make
            those that a rank holds, read or not, take more room in the temporary folder.
        connections: remote shards that a rank fetches at the same time: one uses up a line, several
            a store that sends each slower than the line is.
        allow_pipe: accept ``pipe:`` shards, which run a shell command.
        part: number, from 0, of the part of the shards that this run does, for jobs which know nothing
            of each other and share one run's folder.
        parts: how many such jobs there are.
    """

    info: DatasetInfo
    wordings: ClassVar[Mapping[str, Wording]] = {}
    """What ``synonyms`` offers besides ``none`` and ``raw``."""
    layout: ClassVar[str] = ""
    """The tree that ``source`` expects."""
    archives: ClassVar[tuple[Archive, ...]] = ()
    """What ``--download`` fetches."""
    registration: ClassVar[str] = ""
    """Where to get what may not be downloaded without registering."""

    def __init__(
        self,
        shards: str | list[str],
        batch_size: int = 8,
        num_workers: int | None = None,
        image_size: int | tuple[int, int] | None = None,
        resize: Resize = "squash",
        decoder: Literal["pillow", "torchcodec"] = "pillow",
        names: list[str] | str | None = None,
        synonyms: str = "none",
        background: bool | None = None,
        on_error: Literal["skip", "raise"] = "skip",
        max_error_rate: float = 0.01,
        max_pixels: int = MAX_PIXELS,
        timeout: float = TIMEOUT,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        ahead: int = Ahead.shards,
        ahead_bytes: int = Ahead.bytes,
        connections: int = Ahead.connections,
        allow_pipe: bool = False,
        part: int = 0,
        parts: int = 1,
    ) -> None:
        super().__init__()
        if not 0 <= part < parts:
            raise InvalidSetting(
                f"--data.part counts from 0 to --data.parts - 1, got {part} of {parts}"
            )
        if batch_size < 1:
            raise InvalidSetting(f"--data.batch_size must be at least 1, got {batch_size}")
        if num_workers is not None and num_workers < 0:
            raise InvalidSetting(f"--data.num_workers must be at least 0, got {num_workers}")
        sides = image_size if isinstance(image_size, tuple | list) else [image_size]
        if any(side is not None and side < 1 for side in sides):
            raise InvalidSetting(f"--data.image_size is in pixels, above 0, got {image_size}")
        if timeout <= 0:
            raise InvalidSetting(f"--data.timeout is in seconds, above 0, got {timeout}")
        if ahead < 0 or ahead_bytes < 0:
            raise InvalidSetting(
                "--data.ahead and --data.ahead_bytes must be at least 0, "
                f"got {ahead} and {ahead_bytes}"
            )
        if connections < 1:
            raise InvalidSetting(f"--data.connections must be at least 1, got {connections}")
        if not 0 <= max_error_rate <= 1:
            raise InvalidSetting(
                f"--data.max_error_rate is a share in [0, 1], got {max_error_rate}"
            )
        if resize != "squash" and not isinstance(image_size, int | None):
            raise InvalidSetting(f"--data.resize {resize} needs one number as --data.image_size")
        self.info = worded(self.info, read_names(names), self.wordings, synonyms, background)
        self.names = names
        self.synonyms = synonyms
        self.background = background
        self.shards = shards
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.image_size = image_size
        self.resize = resize
        self.decoder = decoder
        if decoder == "torchcodec":
            load_decoder()  # before anything else is: it may not be installed
        self.on_error = on_error
        self.max_error_rate = max_error_rate
        self.max_pixels = max_pixels
        self.timeout = timeout
        self.max_shard_bytes = max_shard_bytes
        self.ahead = ahead
        self.ahead_bytes = ahead_bytes
        self.connections = connections
        self.allow_pipe = allow_pipe
        self.part = part
        self.parts = parts
        self.wanted = Wanted()
        self._folders: dict[Path, dict[str, dict[str, Any]]] = {}
        self._loader: BatchLoader | None = None
        self._fetcher: Fetcher | None = None

    def settings(self) -> dict[str, Any]:
        """What of the settings can change a result."""
        return {
            "name": self.info.name,
            "prompts": list(self.info.prompts),
            "batch_size": self.batch_size,
            "synonyms": [list(words) for words in self.info.synonyms],
            "image_size": self.image_size,
            "resize": self.resize,
            "decoder": self._decoded_by(),
            "max_pixels": self.max_pixels,
            "shards": [name for name, _ in self.shard_list()],
        }

    def shard_list(self) -> list[tuple[str, str]]:
        """(name, path or URL) of all shards, in order; the names are unique."""
        return name_shards(expand_shards(self.shards, allow_pipe=self.allow_pipe))

    def contents(self) -> dict[str, dict[str, Any]]:
        """What `has_changed` needs to tell whether a shard of this machine is still the same, by name.

        One that can't be read is left out: it is an error of this shard, found when its turn comes.
        """
        found: dict[str, dict[str, Any]] = {}
        for name, url in self.shard_list():
            if not is_remote(url):
                listed = self._listed(url)  # refuses a data set that is only half made
                with suppress(OSError):
                    found[name] = describe_file(Path(url), listed.get("sha256"))
        return found

    def sample_counts(self) -> dict[str, int]:
        """Samples in each shard by name, as far as they are written down beside the shards.

        Raises:
            InvalidSetting: what is written there says that the shards are another data set's.
        """
        counts: dict[str, int] = {}
        for name, url in self.shard_list():
            if "samples" in (listed := self._listed(url)):
                counts[name] = int(listed["samples"])
        return counts

    def _listed(self, url: str) -> dict[str, Any]:
        """What ``dataset.json`` says of a shard; empty if it says nothing."""
        if needs_spool(url):
            return {}
        path = Path(url)
        if path.parent not in self._folders:
            shards = self._described(path.parent).get("shards", [])
            self._folders[path.parent] = {shard["name"]: shard for shard in shards}
        return self._folders[path.parent].get(path.name, {})

    def _described(self, folder: Path) -> dict[str, Any]:
        described = read_dataset_json(folder)
        if described.get("dataset", self.info.name) != self.info.name:
            raise InvalidSetting(
                f"{folder} holds shards of {described['dataset']!r}, "
                f"not of {self.info.name!r}: choose the DataModule that fits with --data"
            )
        return described

    def part_list(self) -> list[tuple[str, str]]:
        """The shards of this job, finished or not: every ``parts``-th."""
        return self.shard_list()[self.part :: self.parts]

    def todo(self) -> list[tuple[str, str]]:
        """The shards of this job that are not finished, for all its ranks."""
        return [shard for shard in self.part_list() if shard[0] not in self.wanted.finished]

    def predict_dataloader(self) -> Loaders:
        """Batches of this rank's shards, for Lightning."""
        return Loaders(self.loader(), "sequential")

    def loader(self) -> BatchLoader:
        """Batches of this rank's shards."""
        shards, handout = self._division()
        workers = self._workers()
        fetcher = self._fetcher = Fetcher(
            shards,
            handout,
            max(workers, 1),
            Limits(self.timeout, self.max_shard_bytes),
            Ahead(self.ahead, self.ahead_bytes, self.connections),
        )
        decoder = Decoder(
            self.info,
            self._size(),
            self.max_pixels,
            resize=self.resize,
            multiple=self.wanted.patch_size,
            keep_original=self.wanted.originals,
            defer=self.decoder != "pillow",
        )
        device = self._device().type
        self._loader = BatchLoader(
            self.stream(decoder, fetcher.spool),
            workers,
            timeout=_PATIENCE * self.timeout,
            give_way=device == "cpu",
            pin_memory=device == "cuda",
            expected=partial(_expected, fetcher.spool),
            moving=fetcher.progress,
            received=fetcher.received,
            beside=fetcher,
        )
        return self._loader

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Decode on the model's device what the workers left to it."""
        return decode_pending(batch, self._device(), self.max_pixels, self.wanted.originals)

    def stream(self, decoder: Decoder, spool: Spool) -> ShardStream:
        """What the loader workers iterate over."""
        return ShardStream(self.batch_size, decoder, spool)

    def lacking(self, need: str) -> str:
        """What to do about data without what a task needs, such as ``classes``; may be empty."""
        return ""

    def on_exception(self, exception: BaseException) -> None:
        """End the loader workers and what is fetched for them: nobody will ask for it."""
        if self._loader:
            self._loader.close()
        self.teardown("predict")  # which Lightning only calls where all went well

    def teardown(self, stage: str) -> None:
        """Remove fetched shards."""
        if self._fetcher:
            self._fetcher.close()
            self._fetcher = None

    def _division(self) -> tuple[list[tuple[str, str]], Handout | None]:
        """Shards, and who says which of them are this rank's; None: all are."""
        todo = self.todo()
        rank, ranks = (
            (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        )
        if ranks > 1 and self.wanted.counter:
            return todo, Handout(len(todo), rank, ranks, self.wanted.counter)
        return todo[rank::ranks], None

    def _decoded_by(self) -> str:
        """What makes the pixels: other versions, and other devices, make other ones."""
        if self.decoder == "pillow":
            return self.decoder
        return f"{self.decoder} {version(self.decoder)}, {self._device().type}"

    def _device(self) -> torch.device:
        return self.trainer.strategy.root_device if self.trainer else torch.device("cpu")

    def _workers(self) -> int:
        if self.num_workers is not None:
            return self.num_workers
        if not hasattr(os, "sched_getaffinity"):
            return 0  # not Linux: starting workers costs seconds
        workers = cores_of_rank(self.trainer.num_devices if self.trainer else 1)
        return workers if self._device().type == "cuda" else min(8, workers)

    def _size(self) -> tuple[int, int]:
        size = self.image_size or self.wanted.image_size
        if size is None:
            raise InvalidSetting(
                "--data.image_size: say how large images shall be, where no model does"
            )
        return (size, size) if isinstance(size, int) else (size[0], size[1])


class Loaders(CombinedLoader):
    """Loaders whose batches Lightning uses as soon as they are there.

    Of what has no length, Lightning holds each batch back until the next one has come, to know whether
    it is the last: a shard's last batch would wait until the next shard is fetched.
    """

    def __len__(self) -> int:
        return sys.maxsize  # only its being there is looked at


def _expected(spool: Spool, last: Batch | None) -> str:
    """What follows a batch, in words."""
    if last is not None and not last.last:
        return f"the batch from sample {last.end} on of shard {last.shard}"
    names, more = spool.known()
    following = names[names.index(last.shard) + 1 :] if last else names
    if following:
        return f"the first batch of shard {following[0]}"
    if more:
        return "the first batch of another shard"
    return "the loader to finish" if last else "the end of an empty share"
