"""The classic mistakes of batch scripts, each of which costs a job, or its log, in silence.

Every rule rests on something SLURM, bash or torchrun does. A rule that is not sure says nothing: what a script takes from
variables that it does not set itself, or from files that it sources, is unknown here.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from slurm import sbatch, shell

PYTHON = re.compile(r"torchrun|\$?\{?PYTHON\w*\}?|python[\d.]*|accelerate|deepspeed")
TORCHRUN = re.compile(r"\btorchrun\b|\btorch\.distributed\.(?:run|launch)\b")
# A step and a save take this long in small runs already, and one minute is for leaving and for the requeue.
LEAST_LEAD_S = 120
NODE_LOCAL = re.compile(r"""["']?(?:/tmp|/var/tmp|/dev/shm|\$\{?(?:SLURM_)?TMPDIR\b)""")
# An option, a key or a variable that says where checkpoints go: --save-dir X, run.dir=X, RUN=X.
RESULTS = re.compile(
    r"(?:--(?=\S*(?:dir|path|folder|root))|(?<![\w.-])(?=[\w.-]+=))"
    r"((?:\w+[-_.])??(?:(?:run|ckpt|checkpoint|result|experiment)s?|(?:save|out|output)[-_.]?(?=dir|path|folder|root))"
    r"(?:[-_.]?(?:dir|path|folder|root))?)(?:=|\s+)(\S+)",
    re.IGNORECASE,
)
SECRET = re.compile(r"\b(\w*(?:API_KEY|TOKEN|SECRET|PASSWORD))=[\"']?([^\s\"'$,]{8,})")
NODES = re.compile(r"SLURM_(?:JOB_NODELIST|NODELIST|JOB_NUM_NODES|NNODES)")
# Files that are sourced and set no trap.
ENVIRONMENTS = re.compile(r"activate|bashrc|profile|conda")
# What bash calls a signal in a trap although no process sends it.
NO_SIGNALS = {"EXIT", "ERR", "DEBUG", "RETURN", "0"}
SIGNAL_NUMBERS = {"2": "INT", "10": "USR1", "12": "USR2", "15": "TERM"}


@dataclass(frozen=True)
class Finding:
    """One mistake. An error loses work or the whole job, a warning costs time, a log, or only some of the jobs."""

    line: int
    level: str
    rule: str
    what: str
    why: str
    mend: str


class BatchScript(shell.Script):
    """A script as both its readers see it: sbatch, which takes options, and bash."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.directives = sbatch.directives(text)
        self.first_command = sbatch.first_command(text)
        self.handled = set(self._handled())
        # Every command, those that traps hold in quotes among them.
        trapped = [inner for trap, action in self._traps() for inner in shell.Script(action, trap.line).commands]
        self.all_commands = [*self.commands, *trapped]
        # What may run for hours: Python, itself or through srun.
        self.launches = [command for command in self.commands if self.runs_python(command)]

    def directive(self, name: str) -> sbatch.Directive | None:
        """The last of that name, which counts."""
        return next((directive for directive in reversed(self.directives) if directive.name == name), None)

    def number(self, name: str) -> int | None:
        """A directive's value where it is a number."""
        directive = self.directive(name)
        return int(directive.value) if directive and directive.value.isdigit() else None

    @property
    def may_have_many_nodes(self) -> bool:
        """Whether the script asks for more than one node, or counts nodes that the command line asks for."""
        nodes = self.directive("nodes")
        return nodes.value != "1" if nodes else any(NODES.search(line) for line in self.lines)

    def program(self, command: shell.Command) -> str:
        """The name of what a command starts, empty for nothing."""
        words = self.expand(shell.value(command.plain[0])).split() if command.plain else []
        return words[0].rpartition("/")[2] if words else ""

    def is_srun(self, command: shell.Command) -> bool:
        return self.program(command) == "srun"

    def runs_python(self, command: shell.Command) -> bool:
        """Whether it starts a Python program, itself or through srun; a line of Python (-c) is none."""
        text = self.expand(" ".join(command.plain))
        if self.is_srun(command):
            return bool(re.search(r"torch|python|accelerate|deepspeed", text, re.IGNORECASE))
        return bool(PYTHON.fullmatch(self.program(command))) and "-c" not in command.plain

    def is_agent(self, command: shell.Command) -> bool:
        """Whether it starts torchrun, itself or through srun."""
        return self.runs_python(command) and bool(TORCHRUN.search(self.expand(" ".join(command.plain))))

    def _traps(self) -> Iterator[tuple[shell.Command, str]]:
        """Those that set something, with what is done then."""
        for command in self.commands:
            if self.program(command) == "trap" and len(command.plain) > 2:
                yield command, shell.value(command.plain[1])

    def _handled(self) -> Iterator[str]:
        """The signals that are trapped."""
        for command, action in self._traps():
            for word in command.plain[2:]:
                name = shell.value(word).upper().removeprefix("SIG")
                if action not in ("", "-") and name not in NO_SIGNALS:
                    yield SIGNAL_NUMBERS.get(name, name)

    def requeues(self) -> Iterator[shell.Command]:
        """Where the script queues a job again."""
        for command in self.all_commands:
            if [shell.value(word) for word in command.plain[:2]] == ["scontrol", "requeue"]:
                yield command

    def search(self, pattern: str) -> Iterator[tuple[int, re.Match[str]]]:
        """Matches in the code behind the directives, with their lines."""
        for number, line in enumerate(self.lines, start=1):
            for match in re.finditer(pattern, line):
                yield number, match


Rule = Callable[[BatchScript], Iterator[Finding]]


def examine(text: str) -> list[Finding]:
    """The mistakes of a script, by line."""
    script = BatchScript(text)
    found = {finding for rule in RULES for finding in rule(script)}
    return sorted(found, key=lambda finding: (finding.line, finding.rule))


def _option(words: list[str], *names: str) -> str | None:
    """The value of one of srun's own options, such as --ntasks or -n; None where srun is not given it."""
    expects_value = False
    for at, word in enumerate(words[1:], start=1):
        if not word.startswith("-"):
            if not expects_value:
                return None  # from here on they are the program's
            expects_value = False
            continue
        name, equals, text = word.partition("=")
        if not word.startswith("--"):
            name, text = word[:2], word[2:]
        if name in names:
            return shell.value(text or (words[at + 1] if not equals and at + 1 < len(words) else ""))
        expects_value = not equals and len(word) == len(name)
    return None


# --- what sbatch reads ---


def ignored_directives(script: BatchScript) -> Iterator[Finding]:
    for line, comment in script.comments:
        if line > script.first_command and re.match(r"#SBATCH\s*-", comment):
            yield Finding(
                line, "error", "ignored-directive", f"{comment.strip()} is not read",
                f"sbatch takes no options behind the first command, which is on line {script.first_command}",
                "move the line up",
            )  # fmt: skip


def unexpanded_directives(script: BatchScript) -> Iterator[Finding]:
    for directive in script.directives:
        if "$" in directive.value or directive.value.startswith("~"):
            yield Finding(
                directive.line, "error", "unexpanded-directive",
                f"--{directive.name}={directive.value} is taken as it stands", "no shell reads a #SBATCH line",
                "write the value out, or give it on sbatch's command line; file names know %x, %j, %A, %a and %u",
            )  # fmt: skip


def log_folder(script: BatchScript) -> Iterator[Finding]:
    chdir, named = script.directive("chdir"), script.directive("job-name")
    for directive in filter(None, (script.directive("output"), script.directive("error"))):
        pattern = sbatch.file_name(directive.value, {"%x": named.value} if named else {})
        folder = pattern.rpartition("/")[0]
        # Nobody makes a folder of a job's number before sbatch gives it; one of another pattern may be there.
        numbered = re.search(r"%\d*[Aj]", folder)
        if not folder or "$" in folder or folder.startswith("~"):
            continue
        if NODE_LOCAL.match(directive.value):
            yield Finding(
                directive.line, "warning", "log-on-node", f"the log goes to {folder}",
                "that is a folder of the node, gone or out of reach after the job", "name one that all nodes share",
            )  # fmt: skip
        elif numbered or ("%" not in folder and not (Path(chdir.value if chdir else "") / folder).is_dir()):
            yield Finding(
                directive.line, "error", "log-folder", f"the log's folder {folder} is not there",
                "SLURM does not make it, and the job dies at its start without a word",
                "leave the job's number to the file's name" if numbered else f"mkdir -p {folder} before sbatch",
            )  # fmt: skip


def requeue_truncates(script: BatchScript) -> Iterator[Finding]:
    requeue = script.directive("requeue")
    lines = [*([requeue.line] if requeue else []), *(command.line for command in script.requeues())]
    mode = script.directive("open-mode")
    if lines and (mode is None or not mode.value.startswith("a")):
        yield Finding(
            lines[0], "warning", "log-truncated", "the job comes back without --open-mode=append",
            "on most sites the next start empties the log of the one before, and with it the reason why that ended",
            "add #SBATCH --open-mode=append",
        )  # fmt: skip


def cpus(script: BatchScript) -> Iterator[Finding]:
    asked = any(script.directive(name) for name in ("cpus-per-task", "cpus-per-gpu"))
    exported = any("SRUN_CPUS_PER_TASK" in (name for name, _ in command.assignments) for command in script.commands)
    for command in script.launches:
        if script.is_srun(command) and _option(command.plain, "--cpus-per-task", "-c", "--cpus-per-gpu") is not None:
            continue
        if not asked and (script.is_srun(command) or script.is_agent(command)):
            yield Finding(
                command.line, "warning", "no-cpus", "no --cpus-per-task",
                "a task then gets one core, which all ranks and threads of the node share", "add #SBATCH --cpus-per-task=N",
            )  # fmt: skip
            return
        if script.directive("cpus-per-task") and script.is_srun(command) and not exported:
            yield Finding(
                command.line, "warning", "srun-cpus", "srun is not told --cpus-per-task",
                "since SLURM 22.05 it does not inherit the job's, and its tasks get one core each",
                "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK before srun",
            )  # fmt: skip
            return


# --- ranks and rendezvous ---


def one_agent_a_node(script: BatchScript) -> Iterator[Finding]:
    for command in script.launches:
        if not script.is_srun(command) or not script.is_agent(command):
            continue
        per_node, line = _tasks_per_node(script, command)
        if per_node is not None and per_node > 1:
            yield Finding(
                line, "error", "tasks-per-node", f"{per_node:g} tasks a node, each of which starts a torchrun",
                "each torchrun starts all ranks of its node: there are too many, and several share a GPU",
                "set --ntasks-per-node=1 and let --nproc-per-node count the GPUs",
            )  # fmt: skip


def _tasks_per_node(script: BatchScript, srun: shell.Command) -> tuple[float | None, int]:
    """How many tasks srun starts on each node, None where the script does not tell, and the line that says it."""
    own = {
        name: _option(srun.plain, f"--{name}", *short)
        for name, *short in (("ntasks-per-node",), ("ntasks", "-n"), ("nodes", "-N"))
    }
    nodes = own["nodes"] or str(script.number("nodes") or 1)
    if any(text is not None and not text.isdigit() for text in (*own.values(), nodes)):
        return None, srun.line
    if own["ntasks-per-node"]:
        return int(own["ntasks-per-node"]), srun.line
    if own["ntasks"]:
        return int(own["ntasks"]) / max(1, int(nodes)), srun.line
    for name, share in (("ntasks-per-node", 1), ("ntasks", int(nodes))):
        directive, count = script.directive(name), script.number(name)
        if directive and count is not None:
            return count / max(1, share), directive.line
    return None, srun.line


def expanded_too_early(script: BatchScript) -> Iterator[Finding]:
    tasks = max(script.number("ntasks") or 1, script.number("ntasks-per-node") or 1)
    if not script.may_have_many_nodes and tasks == 1:
        return
    for command in script.commands:
        starts_tasks = script.is_srun(command) or script.runs_python(command)
        words = command.words if starts_tasks else [text for _, text in command.assignments]
        for word in words:
            if match := re.search(r"\$\{?(SLURM_PROCID|SLURM_NODEID|SLURM_LOCALID)\b", shell.expanded_here(word)):
                yield Finding(
                    command.line, "error", "expanded-too-early", f"${match[1]} is expanded by the batch shell",
                    "there it is 0, for every node and every rank",
                    f"let the tasks expand it: srun bash -c '... ${match[1]} ...', in single quotes",
                )  # fmt: skip


def fixed_rendezvous(script: BatchScript) -> Iterator[Finding]:
    standalone = any("--standalone" in line for line in script.lines)
    ports = r"--(?:rdzv[-_]endpoint|master[-_]port)[= ]+(\S+)|\bMASTER_PORT=(\S+)"
    told = set()
    for line, match in script.search(ports):
        port = script.expand(shell.value(match[1] or match[2])).rpartition(":")[2]
        if port.isdigit() and int(port) and not standalone and port not in told:
            told.add(port)
            yield Finding(
                line, "warning", "fixed-port", f"the port is always {port}",
                "two jobs on a node want the same one, and so does a restart before the last start has let go of it",
                "derive it: $((20000 + SLURM_JOB_ID % 12000)); from 32768 on ports are the kernel's to give away",
            )  # fmt: skip
    for line, match in script.search(r"--rdzv[-_]id[= ]+(\S+)"):
        name = script.expand(shell.value(match[1]))
        if not re.search(r"[$`]", name) and not standalone:
            yield Finding(
                line, "warning", "fixed-rdzv-id", f"the rendezvous id is always {name}",
                "nodes of another job, or of the start before, may join this one's", "use $SLURM_JOB_ID and the restart count",
            )  # fmt: skip


def rendezvous_host(script: BatchScript) -> Iterator[Finding]:
    if not script.may_have_many_nodes:
        return
    for before, command in zip(script.commands, script.commands[1:], strict=False):
        words = [shell.value(word) for word in command.plain]
        if before.end == "||" and words[:1] == ["echo"] and words[1:] in (["localhost"], ["127.0.0.1"]):
            yield Finding(
                command.line, "error", "localhost-fallback", f"|| echo {words[1]} hides that the head node was not found",
                "each node then starts a training of its own, or waits for ever", "let the job end: || exit 1",
            )  # fmt: skip
    for line, match in script.search(r"\bhostname\s+(-i|--ip-address)\b"):
        yield Finding(
            line, "warning", "loopback-address", f"hostname {match[1]} asks /etc/hosts",
            "which on Debian and Ubuntu says 127.0.1.1: other nodes cannot connect to that",
            "use the node's name, from scontrol show hostnames",
        )  # fmt: skip


def broken_pipe(script: BatchScript) -> Iterator[Finding]:
    options = [
        shell.value(word)
        for command in script.commands
        if script.program(command) == "set"
        for word in command.plain[1:]
    ]
    exits = any(re.fullmatch(r"-\w*e\w*", word) for word in options) or "errexit" in options
    if not exits or "pipefail" not in options:
        return
    for before, command in zip(script.commands, script.commands[1:], strict=False):
        if before.end == "|" and script.program(command) == "head" and script.program(before) == "scontrol":
            yield Finding(
                command.line, "warning", "broken-pipe", "scontrol ... | head under pipefail",
                "head leaves after its line, scontrol may then die of SIGPIPE, and set -e ends the job, now and then",
                "read all: hosts=$(scontrol show hostnames ...); head=${hosts%%$'\\n'*}",
            )  # fmt: skip


def bad_exit(script: BatchScript) -> Iterator[Finding]:
    if not script.may_have_many_nodes and (script.number("ntasks") or script.number("ntasks-per-node") or 1) == 1:
        return
    if any(name == "SLURM_KILL_BAD_EXIT" for command in script.commands for name, _ in command.assignments):
        return
    for command in filter(script.is_srun, script.launches):
        if _option(command.plain, "--kill-on-bad-exit", "-K") is None:
            yield Finding(
                command.line, "warning", "bad-exit", "srun without --kill-on-bad-exit",
                "where one task dies the others wait for it, and hold the nodes until a timeout",
                "add --kill-on-bad-exit=1",
            )  # fmt: skip


# --- the end of a job ---


def early_signal(script: BatchScript) -> Iterator[Finding]:
    directive = script.directive("signal")
    if directive is None:
        return
    early = sbatch.early_signal(directive.value)
    name = SIGNAL_NUMBERS.get(early.signal, early.signal)
    agents = any(script.is_agent(command) for command in script.launches)
    sources = any(
        script.program(command) in ("source", ".") and not ENVIRONMENTS.search(" ".join(command.plain))
        for command in script.commands
    )
    as_batch = f"--signal=B:{early.signal}@{early.lead_s}"
    if not early.batch_shell_only and name in script.handled:
        yield Finding(
            directive.line, "error", "signal-misses-trap", f"--signal={directive.value} does not reach this script's trap",
            "without B: SLURM signals the tasks of srun alone", f"write {as_batch}",
        )  # fmt: skip
    elif not early.batch_shell_only and agents:
        yield Finding(
            directive.line, "error", "signal-kills-torchrun", f"--signal={directive.value} goes to torchrun and its ranks",
            "torchrun dies of a signal it does not handle, and turns one that it does into a shutdown that fails the job",
            f"write {as_batch}, and let a trap ask for the checkpoint, with a file",
        )  # fmt: skip
    elif early.batch_shell_only and name not in script.handled and not sources:
        yield Finding(
            directive.line, "error", "signal-without-trap", f"nothing traps {name}",
            "with B: only the batch shell gets it, which dies of it, and the job with it",
            f"trap '...' {name}, with srun in the background",
        )  # fmt: skip
    limit = script.directive("time")
    limit_s = sbatch.seconds(limit.value) if limit else None
    if limit_s is not None and limit_s <= early.lead_s:
        yield Finding(
            directive.line, "error", "lead-time", f"the signal comes {early.lead_s} s before the end of {limit_s} s",
            "the job is told to stop as it starts", "raise --time, or lower the number behind @",
        )  # fmt: skip
    elif early.lead_s < LEAST_LEAD_S:
        yield Finding(
            directive.line, "warning", "lead-time", f"the signal comes {early.lead_s} s before the end",
            "a step, a save and a minute to leave in have to fit",
            f"write @300, or what your saves need; {LEAST_LEAD_S} at least",
        )  # fmt: skip


def deaf_to_signals(script: BatchScript) -> Iterator[Finding]:
    if not script.handled:
        return
    waits = [command for command in script.all_commands if script.program(command) == "wait"]
    loops = any({"while", "until", "for"} & set(command.words) for command in script.commands)
    running = [command for command in script.launches if command.background]
    if script.launches and not running and not waits:
        last = script.launches[-1]
        yield Finding(
            last.line, "error", "foreground-srun", f"{script.program(last)} runs in the foreground",
            "bash runs a trap only between commands: the signal's comes when it is over, or never",
            "end the line with &, and wait for it",
        )  # fmt: skip
    elif running and len(waits) == 1 and not loops:
        yield Finding(
            waits[0].line, "error", "waits-once", "one wait",
            "a trap ends it with 128 + the signal's number, and the script goes on or ends while the ranks still save",
            "wait again for as long as kill -0 finds the process",
        )  # fmt: skip


def killed_srun(script: BatchScript) -> Iterator[Finding]:
    srun_pids, last_background = set(), ""
    for command in script.commands:
        for name, text in command.assignments:
            if shell.value(text) == "$!" and last_background == "srun":
                srun_pids.add(name)
        if command.background and command.plain:
            last_background = script.program(command)
    targets = re.compile(
        r"\$(?:" + "|".join(("!", r"\{!\}", *(rf"{name}\b|\{{{name}\}}" for name in srun_pids))) + ")|jobs -p"
    )
    for command in script.all_commands:
        words = [shell.value(word) for word in command.plain]
        if words[:1] != ["kill"] or not any(targets.search(word) for word in words[1:]):
            continue
        own = "$!" not in " ".join(words) and "jobs -p" not in " ".join(words)
        if (own or last_background == "srun") and _sends_term(words[1:]):
            yield Finding(
                command.line, "error", "killed-srun", "srun is told to end by kill -TERM",
                "srun then has its tasks killed at once, without their handlers: nothing is saved",
                "leave a stop-file, or scancel --signal=TERM $SLURM_JOB_ID.0",
            )  # fmt: skip


def _sends_term(arguments: list[str]) -> bool:
    text = " ".join(arguments).upper()
    named = re.search(r"(?:^|\s)-(?:[SN]\s+)?(?:SIG)?([A-Z]+\d*|\d+)\b", text)
    return named is None or named[1] in ("TERM", "15", "INT", "2", "KILL", "9")


def array_requeue(script: BatchScript) -> Iterator[Finding]:
    if script.directive("array") is None:
        return
    for command in script.requeues():
        job = script.expand(" ".join(command.plain[2:]))
        if re.search(r"SLURM_(?:ARRAY_)?JOB_?ID", job) and "SLURM_ARRAY_TASK_ID" not in job:
            yield Finding(
                command.line, "error", "array-requeue", "the whole array is queued again",
                "an element's SLURM_JOB_ID may be the array's own",
                "scontrol requeue ${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}",
            )  # fmt: skip


# --- what is left ---


def results_on_node(script: BatchScript) -> Iterator[Finding]:
    copies = " ".join(
        " ".join(command.plain)
        for command in script.commands
        if script.program(command) in ("cp", "rsync", "mv", "tar")
    )
    told = set()
    for line, text in enumerate(script.lines, start=1):
        for match in RESULTS.finditer(text):
            where = shell.value(script.expand(match[2]))
            copied = match[1] in copies or shell.value(match[2]) in copies
            if NODE_LOCAL.match(where) and not copied and where not in told:
                told.add(where)
                yield Finding(
                    line, "error", "results-on-node", f"{match[1]} is {shell.value(match[2])}",
                    "that is the node's own disk: other nodes do not see it, and checkpoints on it go with the job",
                    "put runs on a disk that all nodes share",
                )  # fmt: skip


def secrets(script: BatchScript) -> Iterator[Finding]:
    for line, text in [*enumerate(script.lines, start=1), *((d.line, d.value) for d in script.directives)]:
        if match := SECRET.search(text):
            yield Finding(
                line, "warning", "secret", f"{match[1]} stands in the script",
                "SLURM keeps scripts and options, and shows them", "read it from a file of mode 0600",
            )  # fmt: skip


RULES: tuple[Rule, ...] = (
    ignored_directives, unexpanded_directives, log_folder, requeue_truncates, cpus, one_agent_a_node, expanded_too_early,
    fixed_rendezvous, rendezvous_host, broken_pipe, bad_exit, early_signal, deaf_to_signals, killed_srun, array_requeue,
    results_on_node, secrets,
)  # fmt: skip
