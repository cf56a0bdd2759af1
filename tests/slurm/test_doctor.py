"""pipeline doctor --slurm: each classic mistake is found in a script that is right otherwise, and what looks like it is not."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT

from pipeline.errors import UserError
from slurm import doctor, mistakes, shell

# As scripts are written, not as ours are; nothing is wrong with it.
GOOD = """\
#!/bin/bash
#SBATCH --job-name=pretrain          # seen in squeue
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH -t 1-00:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

set -uo pipefail
RUN=/shared/runs/pretrain
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST") || exit 1
head=${hosts%%$'\\n'*}
port=$((20000 + SLURM_JOB_ID % 12000))
stop=$RUN/stop-$SLURM_JOB_ID
trap 'echo "# near the end"; touch "$stop"' SIGUSR1
srun --kill-on-bad-exit=1 bash -c 'torchrun --nnodes="$SLURM_NNODES" --nproc-per-node=8 \\
    --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID-$SLURM_RESTART_COUNT" --rdzv-endpoint="$0" \\
    train.py "$@"' "$head:$port" --run-dir "$RUN" "$@" &
pid=$!
while :; do
    wait "$pid"
    code=$?
    kill -0 "$pid" 2>/dev/null || break
done
[ -e "$stop" ] && scontrol requeue "$SLURM_JOB_ID"
exit "$code"
"""
SRUN = "srun --kill-on-bad-exit=1 bash -c 'torchrun"
LAUNCH = GOOD[GOOD.index("srun --kill") : GOOD.index('[ -e "$stop" ]')]
WAITING = GOOD[GOOD.index("pid=$!") : GOOD.index('[ -e "$stop" ]')]
NATIVE = """\
#!/bin/bash
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
srun -K1 python train.py
"""
SMALL = """\
#!/bin/bash
#SBATCH --nodes=1
#SBATCH --cpus-per-task=8
torchrun --standalone --nproc-per-node=8 train.py
"""

Edit = tuple[str, str]  # what stands in GOOD, and what takes its place


def edited(*edits: Edit, script: str = GOOD) -> str:
    for old, new in edits:
        assert script.count(old) == 1, f"{old!r} stands {script.count(old)} times"
        script = script.replace(old, new)
    return script


@pytest.mark.parametrize("script", [GOOD, NATIVE, SMALL], ids=["torchrun", "srun", "one node"])
def test_a_script_that_is_right_has_no_finding(script: str) -> None:
    assert mistakes.examine(script) == []


@pytest.mark.parametrize("path", sorted((ROOT / "slurm").glob("*.sbatch")), ids=lambda path: path.name)
def test_our_own_scripts_have_no_finding(path: Path) -> None:
    assert mistakes.examine(path.read_text()) == []
    with_array = path.read_text().replace("#SBATCH --time", "#SBATCH --array=0-7\n#SBATCH --time", 1)
    assert mistakes.examine(with_array) == []


# Each mistake: its rule, its level, the edits that make it in GOOD, and what stands on the line that is blamed.
MISTAKES: dict[str, tuple[str, str, list[Edit], str]] = {
    "eight agents a node": (
        "tasks-per-node", "error", [("ntasks-per-node=1", "ntasks-per-node=8")], "#SBATCH --ntasks-per-node=8"),
    "eight agents by ntasks": (
        "tasks-per-node", "error", [("#SBATCH --ntasks-per-node=1", "#SBATCH -n 16")], "#SBATCH -n 16"),
    "eight agents by srun": ("tasks-per-node", "error", [(SRUN, "srun -N 2 -n16 -K bash -c 'torchrun")], "srun -N 2"),
    "rank in double quotes": (
        "expanded-too-early", "error",
        [(SRUN, 'srun -K bash -c "echo $SLURM_PROCID" && ' + SRUN)], "srun -K bash"),
    "node rank in a variable": (
        "expanded-too-early", "error", [("RUN=/shared", "export NODE_RANK=${SLURM_NODEID}\nRUN=/shared")], "NODE_RANK"),
    "signal to torchrun": (
        "signal-kills-torchrun", "error",
        [("B:USR1@300", "USR1@300"), ("trap 'echo \"# near the end\"; touch \"$stop\"' SIGUSR1\n", "")], "USR1@300"),
    "signal past the trap": ("signal-misses-trap", "error", [("B:USR1@300", "USR1@300")], "USR1@300"),
    "signal that nothing traps": ("signal-without-trap", "error", [("B:USR1@300", "B:TERM@300")], "B:TERM"),
    "srun in the foreground": ("foreground-srun", "error", [(' "$@" &\n', ' "$@"\n'), (WAITING, "code=$?\n")], "srun"),
    "python in the foreground": (
        "foreground-srun", "error", [(LAUNCH, "python train.py\ncode=$?\n")],
        "python"),
    "an environment sourced, and no trap": (
        "signal-without-trap", "error", [("B:USR1@300", "B:TERM@300"), ("RUN=/shared", "source .venv/bin/activate\nRUN=/shared")],
        "B:TERM"),
    "the head asked by srun": (
        "loopback-address", "warning", [("head=${hosts%%$'\\n'*}", "head=$(srun -N1 -n1 hostname -i)")], "hostname"),
    "one wait": ("waits-once", "error", [(WAITING, "wait\ncode=$?\n")], "wait"),
    "kill -TERM": ("killed-srun", "error", [('touch "$stop"', 'kill -TERM "$pid"')], "trap"),
    "kill without a name": ("killed-srun", "error", [('touch "$stop"', "kill $!")], "trap"),
    "kill by its long name": ("killed-srun", "error", [('touch "$stop"', 'kill -SIGTERM "$pid"')], "trap"),
    "kill by option": ("killed-srun", "error", [('touch "$stop"', 'kill -s TERM "$pid"')], "trap"),
    "kill by number": ("killed-srun", "error", [("exit \"$code\"", "kill -15 ${pid}")], "kill -15"),
    "no lead time given": ("lead-time", "warning", [("B:USR1@300", "B:USR1")], "--signal"),
    "a short lead time": ("lead-time", "warning", [("B:USR1@300", "B:USR1@119")], "--signal"),
    "a lead time over all": ("lead-time", "error", [("-t 1-00:00:00", "-t 5")], "--signal"),
    "a log that is emptied": ("log-truncated", "warning", [("#SBATCH --open-mode=append\n", "")], "--requeue"),
    "a fixed port": ("fixed-port", "warning", [('--rdzv-endpoint="$0"', '--rdzv_endpoint="$head:29500"')], "29500"),
    "a fixed port in a variable": (
        "fixed-port", "warning", [("port=$((20000 + SLURM_JOB_ID % 12000))", "export MASTER_PORT=29500")], "29500"),
    "a fixed id": ("fixed-rdzv-id", "warning", [('"$SLURM_JOB_ID-$SLURM_RESTART_COUNT"', "101")], "--rdzv-id=101"),
    "a log folder that is not there": ("log-folder", "error", [("%x-%j.out", "logs/%x-%j.out")], "--output"),
    "a log folder with a pattern": ("log-folder", "error", [("%x-%j.out", "%j/out")], "--output"),
    "a log on the node": ("log-on-node", "warning", [("%x-%j.out", "/tmp/%x-%j.out")], "--output"),
    "no cores": (
        "no-cpus", "warning",
        [("#SBATCH --cpus-per-task=64\n", ""), ("export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK\n", "")], "srun"),
    "srun without its cores": (
        "srun-cpus", "warning", [("export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK\n", "")], "srun"),
    "runs under /tmp": ("results-on-node", "error", [("RUN=/shared/runs/pretrain", "RUN=/tmp/run")], "RUN=/tmp/run"),
    "runs in SLURM_TMPDIR": ("results-on-node", "error", [('--run-dir "$RUN"', '--run-dir "$SLURM_TMPDIR/run"')], "train.py"),
    "outputs under /dev/shm": ("results-on-node", "error", [('--run-dir "$RUN"', "--output_dir=/dev/shm/x")], "train.py"),
    "runs under /tmp as a key": ("results-on-node", "error", [('--run-dir "$RUN"', "run.dir=/tmp/runs")], "train.py"),
    "a whole array again": (
        "array-requeue", "error", [("#SBATCH --nodes=2", "#SBATCH --array=0-3\n#SBATCH --nodes=2")], "scontrol requeue"),
    "a whole array again, by a trap": (
        "array-requeue", "error",
        [("#SBATCH --nodes=2", "#SBATCH --array=0-3\n#SBATCH --nodes=2"), ('touch "$stop"', "scontrol requeue $SLURM_JOB_ID"),
         ('[ -e "$stop" ] && scontrol requeue "$SLURM_JOB_ID"\n', "")],
        "trap"),
    "a log that is emptied by a trap's requeue": (
        "log-truncated", "warning",
        [("#SBATCH --open-mode=append\n", ""), ("#SBATCH --requeue\n", ""),
         ('touch "$stop"', "scontrol requeue $SLURM_JOB_ID"), ('[ -e "$stop" ] && scontrol requeue "$SLURM_JOB_ID"\n', "")],
        "trap"),
    "a guess for the head": ("localhost-fallback", "error", [("|| exit 1", "|| echo localhost")], "echo localhost"),
    "an address of the loopback": (
        "loopback-address", "warning", [("head=${hosts%%$'\\n'*}", "head=$(hostname --ip-address)")], "hostname"),
    "head under pipefail": (
        "broken-pipe", "warning",
        [("-uo pipefail", "-euo pipefail"), ("head=${hosts%%$'\\n'*}", "head=$(scontrol show hostnames | head -n 1)")],
        "head=$("),
    "srun that waits for the dead": ("bad-exit", "warning", [("srun --kill-on-bad-exit=1", "srun")], "srun"),
    "an option too late": (
        "ignored-directive", "error",
        [("#SBATCH --requeue\n", ""), ("RUN=/shared", "#SBATCH --requeue\nRUN=/shared")], "#SBATCH --requeue"),
    "a variable for sbatch": ("unexpanded-directive", "error", [("%x-%j.out", "$HOME/%j.out")], "--output"),
    "a secret": ("secret", "warning", [("RUN=/shared", "export WANDB_API_KEY=0123456789abcdef\nRUN=/shared")], "WANDB"),
    "a secret for sbatch": (
        "secret", "warning", [("#SBATCH --nodes=2", "#SBATCH --export=ALL,HF_TOKEN=hf_0123456789\n#SBATCH --nodes=2")], "HF_"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found_alone_and_on_its_line(mistake: str) -> None:
    rule, level, edits, line = MISTAKES[mistake]
    script = edited(*edits)
    (finding,) = mistakes.examine(script)
    assert (finding.rule, finding.level) == (rule, level)
    assert line in script.splitlines()[finding.line - 1]
    assert finding.what and finding.why and finding.mend


def test_every_rule_is_shown_to_find_something() -> None:
    named = {rule.__name__ for rule in mistakes.RULES}
    found = {
        rule.__name__ for _, _, edits, _ in MISTAKES.values() for rule in mistakes.RULES
        if any(rule(mistakes.BatchScript(edited(*edits))))
    }  # fmt: skip
    assert found == named


# What looks like a mistake and is none.
NEAR_MISSES: dict[str, str] = {
    "one agent a node by srun, whatever the job has": edited(
        ("ntasks-per-node=1", "ntasks-per-node=8"), (SRUN, "srun --ntasks-per-node=1 -K bash -c 'torchrun")),
    "as many agents as nodes": edited(("#SBATCH --ntasks-per-node=1", "#SBATCH --ntasks=2")),
    "a number of tasks that is not known here": edited((SRUN, "srun -n $SLURM_NNODES -K bash -c 'torchrun")),
    "eight tasks a node without torchrun": NATIVE,
    "torchrun in a comment and in talk": NATIVE + "# torchrun starts all ranks\necho 'no torchrun here'\n",
    "the rank in single quotes": edited((SRUN, "srun -K1 bash -c 'NODE_RANK=$SLURM_NODEID torchrun")),
    "the rank behind a backslash": NATIVE.replace("python train.py", 'bash -c "RANK=\\$SLURM_PROCID python train.py"'),
    "the rank in talk": edited(("RUN=/shared", 'echo "this is task $SLURM_PROCID"\nRUN=/shared')),
    "the rank where there is one": SMALL.replace("torchrun", "export RANK=$SLURM_PROCID\ntorchrun"),
    "a signal to ranks without torchrun": NATIVE.replace("#SBATCH --nodes", "#SBATCH --signal=USR2@300\n#SBATCH --nodes"),
    "a signal trapped in a file that is sourced": edited(
        ("B:USR1@300", "B:TERM@300"), ("RUN=/shared", "source traps.sh\nRUN=/shared")),
    "a line of Python in the foreground": edited(("trap 'echo", "trap : TERM\npython -c 'import torch'\ntrap 'echo")),
    "srun of something that is not Python": "#!/bin/bash\n#SBATCH --nodes=2\nsrun hostname\n",
    "a trap by number": edited(("SIGUSR1", "10")),
    "a short srun in the foreground before": edited(
        ("trap 'echo", "srun --ntasks-per-node=1 cp data.bin /dev/shm\ntrap 'echo")),
    "a foreground srun with a trap for the end alone": NATIVE.replace("export", "trap 'rm -f x' EXIT\nexport"),
    "one wait that a handler repeats": edited(
        ('touch "$stop"', 'touch "$stop"; wait "$pid"'), (WAITING, "pid=$!\nwait\ncode=$?\n")),
    "a signal that srun passes on": edited(('touch "$stop"', 'kill -USR1 "$pid"')),
    "the end of another process": edited(
        ("trap 'echo", "nvidia-smi dmon >gpu.log &\nmonitor=$!\ntrap 'echo"), ('exit "$code"', 'kill "$monitor"; exit "$code"')),
    "a lead time just long enough": edited(("B:USR1@300", "B:USR1@120")),
    "a log that cannot be emptied, as nothing comes back": edited(
        ("#SBATCH --requeue\n", ""), ("#SBATCH --open-mode=append\n", ""),
        ('&& scontrol requeue "$SLURM_JOB_ID"', "&& echo stopped")),
    "a port that follows from the job": edited(('--rdzv-endpoint="$0"', '--rdzv-endpoint="$head:$port"')),
    "a fixed port that no other node asks for": SMALL.replace("--standalone", "--standalone --master_port=29500"),
    "cores by GPU": edited(
        ("cpus-per-task=64", "cpus-per-gpu=8"), ("export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK\n", "")),
    "srun that is told its cores": edited(
        ("export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK\n", ""), (SRUN, "srun -c $SLURM_CPUS_PER_TASK -K bash -c 'torchrun")),
    "data and caches on the node": edited(
        ("RUN=/shared", "export TRITON_CACHE_DIR=/tmp/triton DATA_DIR=$SLURM_TMPDIR\nRUN=/shared"),
        ('--run-dir "$RUN"', '--run-dir "$RUN" --stage "$SLURM_TMPDIR"')),
    "other programs' runs and outputs": edited(
        ("RUN=/shared", "apptainer run /tmp/image.sif; curl --output /tmp/x $URL; out=/tmp/lines\nRUN=/shared")),
    "results that are copied home": edited(
        ("RUN=/shared", "OUTPUT_DIR=$SLURM_TMPDIR/out\nRUN=/shared"), ('exit "$code"', 'cp -r "$OUTPUT_DIR" "$RUN"')),
    "an element alone again": edited(
        ("#SBATCH --nodes=2", "#SBATCH --array=0-3\n#SBATCH --nodes=2"),
        ('requeue "$SLURM_JOB_ID"', 'requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"')),
    "localhost on one node": SMALL.replace("torchrun", "host=$(hostname || echo localhost)\ntorchrun"),
    "another default in talk": edited(("|| exit 1", '|| echo "no nodes"')),
    "all addresses of the node": edited(("head=${hosts", "addresses=$(hostname -I)\nhead=${hosts")),
    "head without pipefail": edited(
        ("set -uo pipefail", "set -eu"), ("head=${hosts%%$'\\n'*}", "head=$(scontrol show hostnames | head -n 1)")),
    "bad exits told by a variable": edited(("srun --kill-on-bad-exit=1", "SLURM_KILL_BAD_EXIT=1 srun")),
    "options in a comment": GOOD + "##SBATCH --nodes=4\n# SBATCH --nodes=4\n",
    "a here-document with a script in it":
        GOOD + "cat >other.sh <<'EOF'\n#SBATCH --nodes=1\nhostname -i || echo localhost\nEOF\n",
    "a secret that is read": edited(("RUN=/shared", "export WANDB_API_KEY=$(cat ~/.wandb) HF_TOKEN=$HF_TOKEN\nRUN=/shared")),
    "a number that is no secret": edited(("RUN=/shared", "tokens_per_step=524288 MAX_TOKENS=1000000000\nRUN=/shared")),
}  # fmt: skip


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_what_looks_like_a_mistake_is_left_alone(name: str) -> None:
    assert mistakes.examine(NEAR_MISSES[name]) == []


def test_a_log_folder_that_is_there_is_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "logs").mkdir()
    assert mistakes.examine(edited(("%x-%j.out", "logs/%x-%j.out"))) == []
    monkeypatch.setenv("USER", "me")
    (tmp_path / "logs-me" / "pretrain").mkdir(parents=True)
    assert mistakes.examine(edited(("%x-%j.out", "logs-%u/%x/%j.out"))) == []
    assert mistakes.examine(edited(("%x-%j.out", "logs-%N/%j.out"))) == []  # each node may have one
    (finding,) = mistakes.examine(edited(("%x-%j.out", "other-%u/%j.out")))
    assert (finding.what, finding.mend) == (
        "the log's folder other-me is not there", "mkdir -p other-me before sbatch"
    )  # fmt: skip
    (finding,) = mistakes.examine(edited(("%x-%j.out", "logs/%A/%a.out")))
    assert finding.mend == "leave the job's number to the file's name"
    in_another = edited(("%x-%j.out", "logs/%x-%j.out\n#SBATCH -D logs"))
    assert [finding.rule for finding in mistakes.examine(in_another)] == ["log-folder"]


# --- the command ---


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def written(script: str) -> Path:
        path = tmp_path / "job.sbatch"
        path.write_text(script)
        return path

    return written


def test_findings_are_lines_and_an_error_is_exit_code_2(
    write: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(edited(("%x-%j.out", "logs/%j.out"), ("B:USR1@300", "B:USR1@60")))
    with pytest.raises(UserError, match=r"has 1 error\(s\) and 1 warning\(s\), listed above"):
        doctor.run(path, as_json=False)
    warning, error = capsys.readouterr().out.splitlines()
    assert warning.startswith(f"{path}:8: warning: the signal comes 60 s before the end: a step, a save")
    assert error == (
        f"{path}:11: error: the log's folder logs is not there: SLURM does not make it, and the job dies at its start "
        "without a word; mkdir -p logs before sbatch"
    )


def test_warnings_alone_are_no_failure(write: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = write(edited(("B:USR1@300", "B:USR1@60")))
    doctor.run(path, as_json=False)
    assert capsys.readouterr().out.splitlines()[-1] == f"{path}: no error, 1 warning(s)"
    doctor.run(path, as_json=True)
    (finding,) = json.loads(capsys.readouterr().out)
    assert finding.keys() == {"line", "level", "rule", "what", "why", "mend"}
    assert (finding["line"], finding["level"], finding["rule"]) == (8, "warning", "lead-time")


def test_a_file_that_is_not_there_or_no_text_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        doctor.run(tmp_path / "nothing", as_json=False)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not text"):
        doctor.run(tmp_path / "binary", as_json=False)


def test_a_file_that_nests_without_end_is_one_line(write: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match="nested too deep"):
        doctor.run(write("echo " + "$(" * 5000), as_json=False)


# --- how bash cuts a script ---


def test_commands_are_cut_as_bash_cuts_them() -> None:
    script = shell.Script(
        "a=1 b='x y' run \"$(inner \"q r\" | second)\" 2>/dev/null >out arg & # a comment; no command\n"
        "if [[ -e x ]]; then one && two & fi\n"
        "list=(p \"q r\"); long \\\n  --option\n"
        "cat <<-END >file\n\tnot a command\n\tEND\n"
        "last ${x:-\"a b\"} $((1 << 2)) `old style`"
    )  # fmt: skip
    found = [(command.line, command.plain, command.background) for command in script.commands if command.plain]
    assert found == [
        (1, ["inner", '"q r"'], False),
        (1, ["second"], False),
        (1, ["run", '"$(inner "q r" | second)"', "arg"], True),
        (2, ["[[", "-e", "x", "]]"], False),
        (2, ["one"], True),
        (2, ["two"], True),
        (2, ["fi"], False),
        (3, ["long", "--option"], False),
        (5, ["cat"], False),
        (8, ["old", "style"], False),
        (8, ["last", '${x:-"a b"}', "$((1 << 2))", "`old style`"], False),
    ]
    assert script.variables == {"a": ["1"], "b": ["x y"], "list": ["(p q r)"]}
    assert script.lines[5:7] == ["", ""]
    assert "comment" not in script.lines[0]


@pytest.mark.parametrize(
    "text", ["'", '"', "$(", "${", "`", "((", "(", ")", "<<EOF", "\\", "a=(", '"$(', ";;", "&", "<("]
)
def test_a_script_that_is_cut_off_is_read_to_its_end(text: str) -> None:
    shell.Script("first\n" + text)
    shell.Script(text * 3 + "\nlast")


def test_what_this_shell_expands_of_a_word() -> None:
    assert shell.expanded_here("'$a'\"$b \\$c '$d'\"\\$e$f") == "\"$b c '$d'\"e$f"
