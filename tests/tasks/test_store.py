"""Runs in an object store: a real S3 server on this machine, with the faults that stores have."""

import logging
import os
import re
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import boto3
import fsspec
import pytest
import s3fs
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from common.errors import UserError
from datamodules._samples import SampleError
from tasks import Run
from tasks.__main__ import main
from tasks.run import RunError, place
from tests.tasks.test_run_folder import begin, described, publish


class Store:
    """An S3 server; answers requests with the faults listed for it, in turn, then as it should."""

    def __init__(self) -> None:
        self.app = DomainDispatcherApplication(create_backend_app)
        self.faults: dict[tuple[str, str], list] = {}
        self.asked: list[tuple[str, str]] = []
        self.server = make_server("127.0.0.1", 0, self, threaded=True)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def __call__(self, environ, start_response):
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        name = path.strip("/").partition("/")[2].partition("/")[2] or "list"
        self.asked.append((method, name))
        faults = self.faults.get((method, name), [])
        if faults:
            return faults.pop(0)(self.app, environ, start_response)
        return self.app(environ, start_response)

    def files(self, run: str) -> dict[str, bytes]:
        found = self.client.list_objects_v2(Bucket="bucket", Prefix=f"{run}/").get("Contents", [])
        keys = [one["Key"] for one in found]
        get = self.client.get_object
        return {k.partition("/")[2]: get(Bucket="bucket", Key=k)["Body"].read() for k in keys}

    def begin(self) -> None:
        self.client = boto3.client("s3", endpoint_url=self.url)
        self.client.create_bucket(Bucket="bucket")


def error(app, environ, start_response):
    environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    start_response("500 Internal Server Error", [("Content-Length", "0")])
    return [b""]


def reset(app, environ, start_response):
    environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
    return [b""]


def cut(app, environ, start_response):
    """Half of the body, under the length of all of it."""
    body = b"".join(app(environ, start_response))
    return [body[: len(body) // 2]]


def slow(app, environ, start_response):
    time.sleep(0.3)
    return app(environ, start_response)


@pytest.fixture(scope="session")
def s3():
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    store = Store()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": store.url,
            "AWS_ACCESS_KEY_ID": "x",
            "AWS_SECRET_ACCESS_KEY": "SECRET",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "1",  # the client's own tries would hide most faults
            "no_proxy": "*",
        }.items():
            patch.setenv(name, value)
        patch.setattr(s3fs.S3FileSystem, "retries", 1)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        store.begin()
        yield store
        fsspec.get_filesystem_class("s3").clear_instance_cache()
    store.server.shutdown()


@pytest.fixture
def store(s3, monkeypatch):
    monkeypatch.setattr(place, "_pause", lambda seconds: None)
    s3.faults.clear()
    s3.asked.clear()
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield s3
        monkeypatch.undo()
        assert not [name for name in os.listdir(folder) if name.startswith("clip_surgery")]


@pytest.fixture(scope="session")
def stored(s3, command) -> str:
    """An undisturbed run in the store."""
    assert main(command("s3://bucket/finished")) == 0
    return "s3://bucket/finished"


def test_a_run_in_a_store_is_that_of_a_folder(stored, finished, store, capsys):
    here = {path.name: path.read_bytes() for path in finished.iterdir()}
    there = store.files("finished")
    assert set(there) == set(here)
    assert {name for name in here if here[name] != there[name]} == {"config.yaml", "jobs.jsonl"}
    assert main(["metrics", stored]) == 0
    assert stored in capsys.readouterr().out
    assert store.files("finished")["metrics.json"] == here["metrics.json"]
    one, other = Run.load(stored), Run.load(finished)
    assert (one.metrics, one.errors) == (other.metrics, other.errors)
    assert [(i.key, i.record) for i in one.images()] == [(i.key, i.record) for i in other.images()]
    assert main(["compare", stored, str(finished)]) == 0


def test_a_run_goes_on_and_asks_no_more_than_it_must(store, command, predict, tmp_path, finished):
    words = command("s3://bucket/on")
    store.faults["PUT", "000002.tar"] = [error] * 4
    assert main(words) == 1
    assert sorted(name for name in store.files("on") if name.endswith(".tar")) == [
        "000000.tar",
        "000001.tar",
    ]
    store.asked.clear()
    assert main([*words, "--data.batch_size=1"]) == 1  # another run
    assert main(words) == 0
    puts = Counter(name for method, name in store.asked if method == "PUT")
    assert puts["000002.tar"] == puts["000003.tar"] == 1
    assert not puts["000000.tar"]
    assert sum(name == "list" for _, name in store.asked) < 12
    for name in ("000002.tar", "metrics.json"):
        assert store.files("on")[name] == (finished / name).read_bytes()


@pytest.mark.parametrize("fault", [error, reset, cut, slow])
def test_what_may_pass_is_tried_again(fault, store, caplog):
    url = place.place_of(f"s3://bucket/{fault.__name__}")
    for method, name in (
        *(("PUT", "run.json"), ("PUT", "a.tar")),
        *(("GET", "run.json"), ("GET", "a.tar"), ("GET", "list")),
    ):
        if fault is not cut or method == "GET":
            store.faults[method, name] = [fault, fault]
    run = begin(url)
    for name in ("a", "b"):
        publish(run, name)
    run.close()
    again = begin(url)
    assert again.finished == ["a", "b"]
    assert [image.key for image in again.images()] == [f"{s}{i}" for s in "ab" for i in range(3)]
    assert all(len(left) < 2 for left in store.faults.values())
    assert ("trying again in 1 s (1 of 3)" in caplog.text) == (fault is not slow)
    assert "SECRET" not in caplog.text


def test_what_does_not_pass_ends_the_run_in_a_sentence(store, command, capsys, monkeypatch):
    run = begin(place.place_of("s3://bucket/broken"))
    store.faults["PUT", "a.tar"] = [reset] * 20  # each try is two where a connection was kept
    with pytest.raises(
        RunError, match=r"s3://bucket/broken/a\.tar could not be written .*again to"
    ):
        publish(run, "a")
    run.close()
    assert "a.tar" not in store.files("broken")
    assert main(command("s3://nobucket/run")) == 1
    said = capsys.readouterr().err
    assert re.search("s3://nobucket/run/run.json could not be written .*check the address", said)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    assert main(["metrics", "s3://bucket/broken"]) == 1
    assert re.search("could not be (read|listed)", capsys.readouterr().err)
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def test_a_run_in_a_store_is_only_replaced_when_asked(store):
    url = place.place_of("s3://bucket/old")
    run = begin(url)
    publish(run, "a")
    run.close()
    with pytest.raises(RunError, match="holds another run's results"):
        begin(url, precision="16")
    begin(url, overwrite=True, precision="16").close()
    assert set(store.files("old")) == {"run.json"}
    store.client.put_object(Bucket="bucket", Key="theirs/photo.jpg", Body=b"x")
    with pytest.raises(RunError, match="is not empty and not a run of ours"):
        begin(place.place_of("s3://bucket/theirs"))


def test_runs_at_the_same_place_are_never_mixed(store):
    url = place.place_of("s3://bucket/two")
    with ExitStack() as runs:

        def of(precision: str, overwrite: bool = True) -> Run:
            run = begin(url, overwrite=overwrite, precision=precision)
            runs.callback(run.close)
            return run

        first, same, other = of("32", False), of("32", False), of("16")
        for job in (first, same):
            with pytest.raises(
                RunError, match=r"another run was begun .*\n  precision: '16' there"
            ):
                publish(job, "a")
        publish(other, "a")

        def late(app, environ, start_response):
            publish(other, "b")
            return app(environ, start_response)

        store.faults["DELETE", "a.tar"] = [late]
        again = of("32")
        assert set(store.files("two")) == {"run.json"}

        def overtaken(app, environ, start_response):
            publish(of("8"), "b")
            return app(environ, start_response)

        publish(again, "a")
        store.faults["PUT", "b.tar"] = [overtaken]
        with pytest.raises(RunError, match="precision: '8' there"):
            publish(again, "b")
        assert set(store.files("two")) == {"run.json"}
        with pytest.raises(RunError, match="precision: '8' there"):
            again.summarise(Nothing())
        store.client.delete_object(Bucket="bucket", Key="two/run.json")
        with pytest.raises(RunError, match=r"run\.json was deleted"):
            publish(again, "a")
        assert not store.files("two")


def test_a_shard_is_taken_back_when_nobody_knows_whose_the_run_is(store):
    url = place.place_of("s3://bucket/unknown")
    with ExitStack() as runs:
        first = begin(url, precision="32")
        runs.callback(first.close)

        def overtaken(app, environ, start_response):
            runs.callback(begin(url, overwrite=True, precision="16").close)
            store.faults["HEAD", "run.json"] = [error] * 40
            return app(environ, start_response)

        store.faults["PUT", "a.tar"] = [overtaken]
        with pytest.raises(RunError, match=r"run\.json could not be read"):
            publish(first, "a")
        store.faults.clear()
    assert set(store.files("unknown")) == {"run.json"}


def test_nothing_is_written_into_a_run_begun_meanwhile(store):
    url = place.place_of("s3://bucket/late")
    with ExitStack() as runs:

        def of(precision: str) -> Run:
            run = Run.open(url, described(precision=precision), mine=["a", "b"], overwrite=True)
            runs.callback(run.close)
            return run

        def begin_another(app, environ, start_response):
            answer = app(environ, start_response)
            of("16").accept(["a", "b"], {}, "config of 16")
            return answer

        first = of("32")
        store.faults["PUT", "run.json"] = [begin_another]
        writes = (
            lambda: first.accept(["a", "b"], {}, "config of 32"),
            lambda: first.note_loss(SampleError("a", "", "gone")),
            lambda: first.note_job({"images": 1}),
        )
        for write in writes:
            with pytest.raises(RunError, match="precision: '16' there"):
                write()
    assert set(store.files("late")) == {"run.json", "config.yaml"}
    assert store.files("late")["config.yaml"] == b"config of 16"


@pytest.mark.parametrize("when", ["000002.tar", "metrics.json"])
def test_a_run_whose_finished_shard_is_taken_away_is_a_failure(
    when, store, command, finished, capsys
):
    run = f"taken-before-{when}"

    def take_away(app, environ, start_response):
        store.client.delete_object(Bucket="bucket", Key=f"{run}/000001.tar")
        return app(environ, start_response)

    store.faults["PUT", when] = [take_away]
    words = command(f"s3://bucket/{run}")
    assert main(words) == 1
    said = capsys.readouterr().err
    assert "1 of 4 shards were finished, and then taken away by another job" in said
    assert "000001. Run the same command again" in said
    assert main(words) == 0
    for name in ("000001.tar", "metrics.json"):
        assert store.files(run)[name] == (finished / name).read_bytes()


class Nothing:
    """What measures nothing."""

    def merge(self, states):
        pass

    def report(self):
        return None


def test_a_shard_that_is_lost_is_listed_until_it_is_done(store):
    from tasks.run.summary import merge_shards

    url = place.place_of("s3://bucket/lost")
    run = begin(url)
    publish(run, "b")
    run.note_loss(SampleError("a", "", "gone"))
    run.close()

    assert merge_shards(url, ["a", "b"], Nothing(), {})["a"].reason == "gone"
    begin(url).close()
    assert "a.error.json" not in store.files("lost")


def test_jobs_that_share_a_run_in_a_store(store, command, finished):
    words = command("s3://bucket/parts", "--data.parts=2")
    assert main([*words, "--data.part=1"]) == 0
    assert main([*words, "--data.part=0"]) == 0
    there = store.files("parts")
    assert there["metrics.json"] == (finished / "metrics.json").read_bytes()
    assert len(there["jobs.jsonl"].splitlines()) == 2


def test_a_report_of_a_run_in_a_store(stored, store, scenes, tmp_path, capsys):
    assert main(["report", stored]) == 1
    assert "say with --output" in capsys.readouterr().err
    page = tmp_path / "report.html"
    assert main(["report", stored, "--output", str(page), "--images", "2"]) == 0
    assert page.stat().st_size


def test_what_a_store_can_not_do_is_said_at_once(command, capsys, monkeypatch):
    for words, said in (
        (command("s3://bucket/x", "--writer.layout=files"), "--writer.layout files needs"),
        (command("http://127.0.0.1/run"), "a store such as s3://"),
    ):
        assert main(words) == 1
        assert said in capsys.readouterr().err
    with pytest.raises(UserError, match="give a URL as a string"):
        Run.load(Path("s3://bucket/x"))
    monkeypatch.setitem(sys.modules, "upath", None)
    with pytest.raises(UserError, match="pip install universal-pathlib"):
        place.place_of("s3://bucket/x")
