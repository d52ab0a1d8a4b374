"""The batch scripts and the Kubernetes job, without a scheduler: what they start, and when a job goes on.

Under a real SLURM they are run by `tools/slurm/try_scripts.py`.
"""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tasks.__main__ import main

from .conftest import same_results

TOOLS = Path(__file__).parents[2] / "tools"
SCRIPTS = ["one_node", "several_nodes", "array"]


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """A folder of programs that are found first; returns what makes one of a line of shell."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def program(name: str, line: str) -> None:
        (folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / name).chmod(0o755)

    return program


def slurm(script: str, *words: str) -> tuple[int, str]:
    """Exit code and words of a batch script, run as SLURM would."""
    numbers = {"CPUS_PER_TASK": 8, "NTASKS_PER_NODE": 4, "NNODES": 2, "JOB_ID": 12}
    array = {"ARRAY_TASK_ID": 1, "ARRAY_TASK_COUNT": 3, "ARRAY_JOB_ID": 12}
    env = {f"SLURM_{name}": str(value) for name, value in (numbers | array).items()}
    command = ["bash", TOOLS / "slurm" / f"{script}.sbatch", *words]
    done = subprocess.run(
        command, env={**os.environ, **env}, capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(("end", "back"), [(0, False), (1, False), (143, True)])
def test_a_job_that_was_stopped_is_put_back(script, end, back, programs):
    for name in ("srun", "lightning"):
        programs(name, f"exit {end}")
    programs("scontrol", 'echo "$@"')
    code, said = slurm(script, "demo.yaml")
    assert code == end
    assert said.strip() == (f"requeue 12{'_1' * (script == 'array')}" if back else "")


@pytest.mark.parametrize("script", SCRIPTS)
def test_sigusr1_for_the_script_stops_the_run(script, programs):
    """As before the time limit: the run has time to put its shard away, and ends before the script."""
    for name in ("srun", "lightning"):
        programs(
            name,
            "trap 'sleep 0.2; echo stopped; exit 143' USR1 TERM\nkill -USR1 $PPID\n"
            "while :; do sleep 0.1; done",
        )
    programs("scontrol", 'echo "$1"')
    assert slurm(script, "demo.yaml") == (143, "stopped\nrequeue\n")


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    """The Kubernetes job."""
    return yaml.safe_load((TOOLS / "kubernetes" / "indexed_job.yaml").read_text())


def test_the_parts_of_a_kubernetes_job_make_the_run(
    job, finished, scenes, tiny, programs, tmp_path
):
    assert (job["kind"], job["spec"]["completionMode"]) == ("Job", "Indexed")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    env = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert env["PARTS"] == str(job["spec"]["completions"])
    config = tmp_path / "config.yaml"
    backbone = {"model": str(tiny), "pretrained": None}
    config.write_text(
        yaml.safe_dump(
            {
                "model": {"class_path": "Explainability", "init_args": {"backbone": backbone}},
                "data": {"class_path": "Shapes", "init_args": {"batch_size": 4}},
            }
        )
    )
    here = {"CONFIG": config, "SHARDS": scenes, "OUTPUT": tmp_path / "run"}
    env |= {name: str(path) for name, path in here.items()}
    env |= {"ACCELERATOR": "cpu", "PRECISION": "32-true", "PARTS": "2", "CPUS": "0"}
    programs("lightning", "printf '%s\\n' \"$@\"")
    for index in range(2):
        words = subprocess.run(
            [*container["command"], *container["args"]],
            env={**os.environ, **env, "JOB_COMPLETION_INDEX": str(index)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
        assert main(words) == 0
    assert same_results(finished, tmp_path / "run")


@pytest.mark.parametrize(
    ("code", "disrupted", "action"),
    [
        (143, False, "Ignore"),  # SIGTERM: finished shards are kept, another pod goes on
        (137, True, "Ignore"),  # killed on a node that was taken away
        (2, False, "FailJob"),
        (1, False, "Count"),
        (137, False, "Count"),  # for lack of memory
    ],
)
def test_what_kubernetes_makes_of_exit_codes(job, code, disrupted, action):
    pod = job["spec"]["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # else there is no policy
    actions = ["Count"]
    for rule in reversed(job["spec"]["podFailurePolicy"]["rules"]):
        conditions = rule.get("onPodConditions", [])
        of_codes = rule.get("onExitCodes", {"values": []})
        assert of_codes.get("containerName", "predict") == pod["containers"][0]["name"]
        if code in of_codes["values"] or (
            disrupted and {"type": "DisruptionTarget", "status": "True"} in conditions
        ):
            actions.append(rule["action"])
    assert actions[-1] == action  # of the first rule that fits
