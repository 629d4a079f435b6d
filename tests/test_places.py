"""Files that start a job elsewhere: a container image, SkyPilot, Kubernetes; their scripts run a stub launcher."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "train_configs"
# Instructions of a Dockerfile, by Docker's reference.
INSTRUCTIONS = {"FROM", "ARG", "RUN", "WORKDIR", "COPY", "ENV", "ENTRYPOINT"}


def instructions() -> list[tuple[str, str]]:
    """Name and arguments of each instruction of the Dockerfile, continued lines joined."""
    text = re.sub(r"\\\n\s*", "", (CONFIGS / "docker/Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines)]


def test_the_image_has_what_the_launcher_needs_and_nothing_that_is_missing_here():
    found = instructions()
    assert {name for name, _ in found} == INSTRUCTIONS
    assert found[0][0] == "FROM"
    sources = [source for name, rest in found if name == "COPY" for source in rest.split()[:-1]]
    assert all((ROOT / source).exists() for source in sources)
    # Everything that a wheel is built from, and the launcher.
    assert {"pyproject.toml", "README.md", "LICENSE", "run_train.sh", "kernels", "train_configs", "ltx_titan"} == {
        *sources
    }
    ignored = (CONFIGS / "docker/Dockerfile.dockerignore").read_text().splitlines()
    assert {line.removeprefix("!") for line in ignored if line.startswith("!")} == {*sources}
    folder = dict(found)["WORKDIR"]
    assert dict(found)["ENTRYPOINT"] == f'["{folder}/run_train.sh"]'
    (extras,) = re.findall(r"\.\[([\w,]+)\]", " ".join(rest for _, rest in found))
    assert all(f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text() for extra in extras.split(","))


def stub(folder: Path, script: str) -> Path:
    """A launcher that only records its variables and arguments, then runs `script`."""
    path = folder / "run_train.sh"
    variables = f'echo "$NNODES $NODE_RANK $NGPU $MASTER_ADDR" > {folder}/variables'
    arguments = f'printf "%s\\n" "$@" > {folder}/arguments'
    path.write_text(f"#!/bin/bash\n{variables}\n{arguments}\n{script}\n")
    path.chmod(0o755)
    return path


def test_skypilot_starts_each_node_as_its_part_of_the_job(tmp_path):
    task = yaml.safe_load((CONFIGS / "skypilot/train.yaml").read_text())
    assert task.keys() == {"name", "resources", "num_nodes", "workdir", "file_mounts", "envs", "setup", "run"}
    assert (ROOT / task["envs"]["JOB"]).is_file()
    stub(tmp_path, "")
    sky = {
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": "1",
        "SKYPILOT_NUM_GPUS_PER_NODE": "8",
        "SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.5",
    }
    conda = tmp_path / "conda"
    conda.write_text("#!/bin/sh\n")
    conda.chmod(0o755)
    sky["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    environment = os.environ | task["envs"] | sky | {"OVERRIDES": "--training.steps=5 --optimizer.lr=1e-5"}
    subprocess.run(["bash", "-euc", task["run"]], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "variables").read_text().split() == ["2", "1", "8", "10.0.0.4"]
    arguments = (tmp_path / "arguments").read_text().splitlines()
    assert {"/data", "/runs"} == task["file_mounts"].keys()
    assert arguments[0] == task["envs"]["JOB"]
    assert arguments[-3:] == ["--job.dump_folder=/runs/ltx-lora", "--training.steps=5", "--optimizer.lr=1e-5"]


@pytest.fixture(scope="module")
def pod() -> dict:
    """The pod of the JobSet, whose surroundings are checked here."""
    jobset = yaml.safe_load((CONFIGS / "kubernetes/jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    found = spec["template"]["spec"]
    (container,) = found["containers"]
    variables = {item["name"]: item.get("value") for item in container["env"]}
    assert str(spec["parallelism"]) == str(spec["completions"]) == variables["NNODES"]
    # <jobset>-<job>-<replica>-<pod>.<jobset>
    name = jobset["metadata"]["name"]
    assert variables["MASTER_ADDR"] == f"{name}-{job['name']}-0-0.{name}"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == variables["NGPU"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in found["volumes"]}
    return container


@pytest.mark.parametrize(
    ("node", "script", "phase", "code"),
    [(0, "", "finished", 0), (0, "", "stopped", 75), (1, "", "stopped", 0), (1, "exit 3", "failed", 3)],
)
def test_kubernetes_restarts_what_has_not_finished(tmp_path, pod, node, script, phase, code):
    process = start(tmp_path, pod, script, phase, node)
    assert process.wait(timeout=30) == code
    assert (tmp_path / "variables").read_text().split() == ["2", str(node), "8", "ltx-titan-node-0-0.ltx-titan"]


def test_kubernetes_lets_a_stopped_run_save(tmp_path, pod):
    saving = f"trap 'touch {tmp_path}/saved; exit 0' TERM; touch {tmp_path}/started; while :; do sleep 0.02; done"
    process = start(tmp_path, pod, saving, "stopped")
    deadline = time.monotonic() + 30
    while not (tmp_path / "started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    # Again until it ends: the launcher may be stopped before the shell around it knows its number.
    while process.poll() is None:
        assert time.monotonic() < deadline
        process.send_signal(signal.SIGTERM)
        time.sleep(0.02)
    assert process.returncode == 75
    assert (tmp_path / "saved").exists()


def start(folder: Path, container: dict, script: str, phase: str, node: int = 0) -> subprocess.Popen:
    """The container's command with a stub for the launcher."""
    (folder / "heartbeat.json").write_text(f'{{"step": 3, "phase": "{phase}"}}\n')
    values = {item["name"]: item["value"] for item in container["env"] if "value" in item}
    environment = os.environ | values | {"NODE_RANK": str(node), "DUMP": str(folder)}
    (text,) = container["args"]
    text = text.replace("/opt/ltx_titan/run_train.sh", str(stub(folder, script)))
    return subprocess.Popen([*container["command"], text], env=environment)
