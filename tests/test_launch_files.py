"""The files of launch/ that other programs read: each can be read, has the fields that are
published, and its times fit one another.
"""

import json
import os
import subprocess

import pytest
import yaml

from tests.test_launch import LAUNCHER, commands, started
from tests.test_train import ROOT

# The fields that the file uses, of JobSet (jobset.x-k8s.io/v1alpha2, JobSet API reference) and of
# Kubernetes' Job, Pod and Container (batch/v1 and v1): by the place in the file.
FIELDS = {
    "": {"apiVersion", "kind", "metadata", "spec"},
    "metadata": {"name"},
    "spec": {"network", "failurePolicy", "replicatedJobs"},
    "spec.network": {"enableDNSHostnames", "subdomain", "publishNotReadyAddresses"},
    "spec.failurePolicy": {"maxRestarts", "restartStrategy", "rules"},
    "spec.replicatedJobs": {"name", "groupName", "template", "replicas", "dependsOn"},
    "spec.replicatedJobs.template": {"metadata", "spec"},
    "spec.replicatedJobs.template.spec": {
        "parallelism", "completions", "completionMode", "backoffLimit", "template",
    },
}  # fmt: skip
POD = {"restartPolicy", "terminationGracePeriodSeconds", "containers", "volumes"}
CONTAINER = {
    "name", "image", "workingDir", "command", "env", "ports", "resources", "volumeMounts",
}  # fmt: skip


@pytest.fixture(scope="module")
def jobset():
    return yaml.safe_load((ROOT / "launch/kubernetes/jobset.yaml").read_text(encoding="utf-8"))


def test_the_jobset_has_fields_that_jobset_publishes(jobset):
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    for place, fields in FIELDS.items():
        section = jobset
        for key in filter(None, place.split(".")):
            section = section[key]
            if isinstance(section, list):
                (section,) = section
        assert section.keys() <= fields, place
    pod = pod_of(jobset)
    assert pod.keys() == POD and pod["containers"][0].keys() == CONTAINER


def pod_of(jobset):
    (job,) = jobset["spec"]["replicatedJobs"]
    return job["template"]["spec"]["template"]["spec"]


def test_the_pods_of_the_jobset_fit_one_another_and_the_save(jobset):
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job, pod = replicated["template"]["spec"], pod_of(jobset)
    (container,) = pod["containers"]
    values = {entry["name"]: entry.get("value") for entry in container["env"]}

    assert str(job["parallelism"]) == str(job["completions"]) == values["N_NODES"]
    assert values["LOCAL_RANKS"] == str(container["resources"]["limits"]["nvidia.com/gpu"])
    # JobSet's names of pods: JOBSET-REPLICATEDJOB-JOB-POD.JOBSET.
    name, port = jobset["metadata"]["name"], container["ports"][0]["containerPort"]
    assert values["HEAD"] == f"{name}-{replicated['name']}-0-0.{name}:{port}"

    # The launcher's own grace ends before Kubernetes kills it.
    grace_s = pod["terminationGracePeriodSeconds"]
    assert grace_s >= int(values["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) + 20
    # A pod that came back alone would wait for ranks that are gone; the set comes back as a whole.
    assert pod["restartPolicy"] == "Never" and job["backoffLimit"] == 0
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0

    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert volumes.keys() == set(mounts.values())
    assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"


def test_the_command_of_the_jobset_starts_torchrun_with_what_the_file_says(jobset, tmp_path):
    (container,) = pod_of(jobset)["containers"]
    variables = {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry}
    commands(tmp_path, torchrun=LAUNCHER)
    environment = os.environ | variables | {"NODE_RANK": "2", "PYTHONPATH": str(ROOT)}
    environment["PATH"] = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        container["command"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr

    passed, environment = started(tmp_path)
    assert passed[-3:] == ["clip", "train.batch=16384", "resume=auto"]
    assert environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "290"
    assert environment["TORCH_FR_DUMP_TEMP_FILE"].startswith("/runs/")


def test_every_file_of_a_launcher_can_be_read():
    files = sorted((ROOT / "launch").rglob("*.yaml")) + sorted((ROOT / "launch").rglob("*.json"))
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert isinstance(
            json.loads(text) if file.suffix == ".json" else yaml.safe_load(text), dict
        )
    scripts = [*(ROOT / "launch").rglob("*.sh"), *(ROOT / "launch").rglob("*.sbatch")]
    for script in scripts:
        subprocess.run(["bash", "-n", str(script)], check=True)
    assert len(files) >= 10 and len(scripts) >= 4


def test_slurm_signals_longer_before_the_end_than_the_launchers_wait():
    text = (ROOT / "launch/slurm/train.sbatch").read_text(encoding="utf-8")
    (signal_line,) = [line for line in text.splitlines() if line.startswith("#SBATCH --signal=")]
    before_s = int(signal_line.rpartition("@")[2])
    waiting = text.partition("TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-")[2]
    assert signal_line.startswith("#SBATCH --signal=B:TERM@")
    assert before_s > int(waiting.partition("}")[0])
