"""A batch on its way: between processes, to pinned memory, to a device; all tensors as one."""

import io
import os
import pickle
import resource
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

from common.errors import InvalidSetting
from datamodules import VOC, _device_decode
from datamodules._datamodule import ShardDataModule
from datamodules._samples import Batch, Encoded, Sample, SampleError
from tasks.__main__ import main
from tests.datamodules import fakes


def tensor(*shape, dtype=torch.uint8):
    return torch.from_numpy(np.random.default_rng(sum(shape)).integers(0, 99, shape)).to(dtype)


SAMPLES = (
    Sample("a", tensor(3, 5, 5), (7, 9), tensor(7, 9), (1,), "cap", {"x": 1}, tensor(3, 7, 9)),
    Sample("b", tensor(3, 5, 5), (3, 3), tensor(3, 3, dtype=torch.int32), None, None, {}),
    Sample("c", tensor(3, 5, 5), (4, 4), tensor(0, 4, 4), (), None, {}),
    Sample("d", tensor(3, 5, 5), (4, 6), tensor(2, 4, 6), (3, 4), None, {}),
    Sample("e", tensor(3, 5, 5), (4, 6), None, None, None, {}),
)
OTHER_SIZE = (SAMPLES[0], SAMPLES[1]._replace(image=tensor(3, 5, 6)))
PENDING = (SAMPLES[0], SAMPLES[1]._replace(image=Encoded(b"jpeg", (5, 5))))
ERRORS = (SampleError("s", "x", "why"),)


def same(one: Batch, other: Batch) -> bool:
    def comparable(value):
        return (value.dtype, value.tolist()) if isinstance(value, torch.Tensor) else value

    def facts(batch):
        samples = [tuple(map(comparable, sample)) for sample in batch.samples]
        images = [comparable(image) for image in batch.images]
        return batch.shard, batch.start, batch.total, samples, batch.errors, images

    return type(one.images) is type(other.images) and facts(one) == facts(other)


@pytest.mark.parametrize("samples", [SAMPLES, OTHER_SIZE, PENDING, ()])
def test_a_batch_travels_as_one_tensor(samples):
    batch = Batch.collate("s", 8, 20, samples, ERRORS)
    assert batch.end == 8 + len(samples) + 1
    shared = []

    def reduce(value):
        shared.append(value)
        return torch.Tensor, ()

    class Counting(ForkingPickler):
        def reducer_override(self, value):
            return reduce(value) if isinstance(value, torch.Tensor) else NotImplemented

    Counting(io.BytesIO()).dump(batch)
    assert len(shared) == 1
    arrived = pickle.loads(pickle.dumps(batch))
    assert same(arrived, batch)
    assert same(pickle.loads(pickle.dumps(arrived)), batch)


def test_a_batch_that_is_there_is_not_copied():
    batch = Batch.collate("s", 0, 5, SAMPLES, ())
    assert batch.to("cpu") is batch
    arrived = pickle.loads(pickle.dumps(batch))
    assert arrived.images.untyped_storage().data_ptr() == arrived._buffer().data_ptr()


def test_a_device_gets_one_copy_of_everything(monkeypatch):
    batch = Batch.collate("s", 0, 5, SAMPLES, ())
    with FakeTensorMode(allow_non_fake_inputs=True):
        moved = batch.to(torch.device("meta"))
    places = {
        tensor.device.type for s in moved.samples for tensor in s if hasattr(tensor, "device")
    }
    assert places == {"meta"} == {moved.images.device.type}
    assert moved.images.shape == (5, 3, 5, 5)


def test_batches_of_256_under_the_usual_limit_of_open_files(tmp_path):
    """With four workers, each label used to be an open file until its batch was dropped."""
    fakes.fake_voc(tmp_path / "source")
    words = ["shards", "voc", "--source", str(tmp_path / "source"), "--split", "val"]
    assert main([*words, "--output", str(tmp_path / "once"), "--workers", "1"]) == 0
    many = fakes.repeated(tmp_path / "once" / "000000.tar", tmp_path / "000000.tar", 400)
    data = VOC(str(many), batch_size=256, num_workers=4, image_size=8)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    try:
        batches = list(data.loader())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert sum(len(batch.keys) for batch in batches) == 400 * len(fakes.SIZES)
    assert all(sample.label is not None for batch in batches for sample in batch.samples)


def test_the_limit_of_open_files_is_raised_at_the_start(capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    try:
        assert main(["predict", "--config", "none.yaml"]) == 2
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(1 << 16, hard), hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_nothing_says_how_large_images_are():
    with pytest.raises(InvalidSetting, match=r"--data\.image_size"):
        ShardDataModule.loader(VOC("pipe:true", allow_pipe=True, num_workers=0))


@pytest.mark.parametrize(
    ("device", "cores", "on_node", "workers"),
    [
        ("cpu", 4, None, 2),
        ("cpu", 4, 8, 4),
        ("cpu", 4, 4, 2),
        ("cpu", 64, None, 8),
        ("cuda", 64, None, 32),
        ("cuda", 16, 64, 16),
    ],
)
def test_workers_of_the_cores_there_are(device, cores, on_node, workers, monkeypatch):
    """Cores that SLURM has bound are not divided again; a GPU is fed by all there are."""
    trainer = SimpleNamespace(num_devices=2)
    trainer.strategy = SimpleNamespace(root_device=torch.device(device))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    monkeypatch.delenv("SLURM_CPUS_ON_NODE", raising=False)
    if on_node:
        monkeypatch.setenv("SLURM_CPUS_ON_NODE", str(on_node))
    data = VOC("x")
    data.trainer = trainer
    assert data._workers() == workers


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("nvjpegDecodeBatched failed: NVJPEG_STATUS_EXECUTION_FAILED"),
    ],
)
def test_a_gpu_that_fails_is_not_the_pictures_fault(error, monkeypatch):
    def decode(files, **options):
        raise error

    monkeypatch.setattr(_device_decode, "load_decoder", lambda: decode)
    batch = Batch.collate("s", 0, 2, PENDING, ())
    with pytest.raises(RuntimeError, match=str(error)):
        _device_decode.decode_pending(batch, torch.device("cpu"), 1000, False)


def test_an_old_torchcodec_is_refused(monkeypatch):
    pytest.importorskip("torchcodec")
    monkeypatch.setattr(_device_decode, "version", lambda name: "0.16.1")
    with pytest.raises(InvalidSetting, match=r"0\.17 or newer.*it is 0\.16\.1"):
        VOC("x", decoder="torchcodec")
