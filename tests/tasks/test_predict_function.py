"""`tasks.predict`: a run from Python, the same as the command's."""

import signal

import pytest

import tasks
from common.errors import UserError
from tests.tasks.conftest import same_results


@pytest.fixture(scope="module")
def fields(tiny, scenes):
    return {
        "data": {"class_path": "Shapes", "init_args": {"shards": str(scenes)}},
        "data.num_workers": 0,
        "data.batch_size": 4,
        "model.backbone": {"model": str(tiny), "pretrained": None},
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
    }


def test_a_run_from_python_is_the_commands(fields, finished, tmp_path, capsys):
    handler = signal.getsignal(signal.SIGTERM)
    run = tasks.predict({"model": "Explainability"}, writer={"output": str(tmp_path)}, **fields)
    assert same_results(tmp_path, finished)
    assert run.metrics == tasks.Run.load(finished).metrics
    assert signal.getsignal(signal.SIGTERM) is handler
    assert "results in" not in capsys.readouterr().out


def test_what_the_command_tells_in_a_line_is_raised(fields, tmp_path):
    with pytest.raises(UserError, match="did you mean `batch_size`"):
        tasks.predict("vit_b16_voc", data={"batchsize": 3})
    with pytest.raises(UserError, match="expected int, got 'x'"):
        tasks.predict("demo", **{"data.batch_size": "x"})
    with pytest.raises(UserError, match="no config 'demmo'"):
        tasks.predict("demmo")
    (tmp_path / "000000.tar").write_bytes(b"no tar at all" * 100)
    lost = fields | {"data.shards": str(tmp_path), "writer.output": str(tmp_path / "run")}
    with pytest.raises(UserError, match="shards are missing"):
        tasks.predict({"model": "Explainability"}, **lost)
