"""What a GPU would be asked to do: how often, and that it is the same as on a CPU."""

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from benchmarks._pretended_gpu import CUDA, PretendedGPU
from benchmarks.operations import GOALS, MOST_WAITS, count, make_task, random_batch
from datamodules._samples import Batch
from tasks._transfer import bring


@pytest.mark.parametrize("name", GOALS)
def test_a_batch_is_few_operations_and_fewer_waits(name):
    found = count(name, 16, all_different=True)
    assert found.an_image <= GOALS[name], found.operations
    assert found.waits.total() <= MOST_WAITS, found.waits


def as_masks(batch: Batch) -> Batch:
    """The same truth as masks, one a positive label; of one image, nothing is known."""
    samples = [
        s._replace(label=torch.stack([(s.label == i + 1).byte() for i in s.positives]))
        for s in batch.samples
    ]
    samples[1] = samples[1]._replace(label=None, positives=None)
    return Batch.collate(batch.shard, 0, len(samples), samples, [])


def arrays(results, info):
    """What is written of each image: file -> array, masks and label maps as they are decoded."""
    return [
        {name: array for one in result.results for name, array in one.files(info).items()}
        for result in results
    ]


@pytest.mark.parametrize("masks", [False, True], ids=["label map", "masks of all sizes"])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("Explainability", {"methods": ["surgery", "clip"]}),
        ("Explainability", {"order": "paper", "void": "background"}),
        ("Segmentation", {"prob_thd": 0.11}),
        ("Segmentation", {"window": 16}),
        ("Recognition", {}),
        ("Multimodal", {}),
        ("Interactive", {"methods": ["surgery", "clip"]}),
        ("Analysis", {}),
    ],
)
def test_a_gpu_would_find_what_a_cpu_does(name, settings, masks, tmp_path):
    task = make_task(name, tmp_path, **settings)
    batch = random_batch(task, 8, all_different=masks)
    batch = as_masks(batch) if masks else batch
    reports, records, files = [], [], []
    with torch.no_grad():
        results = task.predict_step(batch)
        records.append([result.record() for result in results])
        files.append(arrays(results, task.info))
        reports.append(task.measures.report())
        task.measures = task.new_measures()
        with PretendedGPU() as gpu:
            gpu.put(task)
            task._device = CUDA
            task.on_predict_start()
            results = task.predict_step(batch.to(CUDA))
            arriving = bring(task.measures.pop())
            records.append([result.record() for result in results])
            files.append(arrays(results, task.info))
            states = load(save(arriving()))
    task.measures = task.new_measures()
    task.measures.merge(states)
    reports.append(task.measures.report())
    there, here = reports
    assert here.metrics == pytest.approx(there.metrics, abs=1e-4)
    assert here.per_class == {
        k: pytest.approx(v, abs=1e-3, nan_ok=True) for k, v in there.per_class.items()
    }
    assert [list(record) for record in records[1]] == [list(record) for record in records[0]]
    for own, other in zip(*files, strict=True):
        assert own.keys() == other.keys()
        for key, array in own.items():
            assert array.dtype == other[key].dtype
            assert array.shape == other[key].shape
            if array.dtype == np.uint8:
                assert (array != other[key]).mean() < 1e-2  # where two words are all but equal
            else:
                assert array == pytest.approx(other[key], abs=1e-3)
    if name == "Explainability":
        assert records[1] == records[0]


def test_one_rank_encodes_the_texts_and_the_others_get_them(tmp_path, monkeypatch):
    first = make_task("Recognition", tmp_path)
    texts = first.texts
    first.trainer.is_global_zero = False
    first.trainer.strategy.broadcast = lambda found, src: texts if found is None else None
    monkeypatch.setattr("surgery.Texts.encode", None)
    first.configure_texts()
    assert first.texts is texts
