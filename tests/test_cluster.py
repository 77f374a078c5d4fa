"""What a cluster is given: the image and the JobSet, as far as that is seen without one."""

import re
import tomllib
from pathlib import Path

import yaml

from rlhf_jax.cli.parsing import parse

SCRIPTS = Path(__file__).parents[1] / "tpu_scripts"


def test_the_jobset_restarts_what_a_signal_stopped_and_its_command_is_one_of_ours():
    job = yaml.safe_load((SCRIPTS / "jobset.yaml").read_text())
    (replicated,) = job["spec"]["replicatedJobs"]
    inner = replicated["template"]["spec"]
    pod = inner["template"]["spec"]
    (container,) = pod["containers"]
    assert (job["apiVersion"], job["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert (
        inner["backoffLimit"] == 0 and pod["restartPolicy"] == "Never" and job["spec"]["failurePolicy"]["maxRestarts"]
    )
    command, *options = container["args"]
    given = dict(zip(options[::2], options[1::2], strict=True))
    assert given.pop("--config").startswith("gs://") and given["--run.output_dir"].startswith("gs://")
    parsed = parse(command, [f"{name}={value}" for name, value in given.items()])
    assert parsed.run.exit_code_when_stopped == 75
    assert container["resources"]["limits"]["google.com/tpu"] == 8
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_the_image_is_made_of_what_there_is_and_starts_our_program():
    lines = (SCRIPTS / "Dockerfile").read_text().splitlines()
    copied = [name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]]
    project = tomllib.loads((SCRIPTS.parent / "pyproject.toml").read_text())["project"]
    assert all((SCRIPTS.parent / name).exists() for name in copied) and {project["readme"], "LICENSE"} <= set(copied)
    (install,) = [line for line in lines if "pip install" in line]
    extras = re.search(r"\[(.+)\]", install)[1].split(",")
    assert set(extras) <= project["optional-dependencies"].keys() and "tpu" in extras
    assert lines[-1] == 'ENTRYPOINT ["rlhf-jax"]' and "rlhf-jax" in project["scripts"]
