"""`pipeline submit`: what a login node can check of a job, then the script with a site's values, printed or submitted.

A job waits for hours and then dies within seconds of a misspelt key, a missing dataset or a batch that does not divide. All
of that is known before, from files and arithmetic: no GPU is needed, and torch, slow to read from a shared disk, neither.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

from pipeline.budget import accumulation_steps
from pipeline.config.keys import Config, ModelConfig
from pipeline.config.load import config_from_arguments
from pipeline.dataset.shards import Manifest, load_manifest
from pipeline.errors import UserError
from pipeline.files import holder
from pipeline.log import logger
from slurm import filesystems as places
from slurm import mistakes, sbatch

# Float32 weights and AdamW's two moments.
CHECKPOINT_BYTES_PER_PARAMETER = 12
LEAVING_S = 60
SLURMS_LOG = "slurm-%j.out"
# A rank computes on one and reads ahead on another; the rest is for NCCL's threads and for saving.
CORES_PER_GPU = 4
# How what --sbatch may not set begins, as the checks rest on it, and what sets it here.
_OWN = {f"{name}=": f"--{name}" for name in ("job-name", "cpus-per-task", "time", "partition", "account")}
_OF_TRAIN = {
    **_OWN, "nodes=": "--nodes", "gpus": "--gpus-per-node", "gres=gpu": "--gpus-per-node", "array=": "--array",
    "dependency=": "--after",
}  # fmt: skip
_OF_PREPARE = {**_OWN, "nodes=": "--tasks", "array=": "--tasks"}
# Of what SLURM tells a job, all that is not of that job alone.
_OF_THE_CLUSTER = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_WORKING_CLUSTER")


@dataclass(frozen=True)
class Job:
    """What SLURM is told; what is empty stays as the script or the site has it."""

    time: str
    nodes: int = 1
    gpus_per_node: str = "0"  # [TYPE:]N
    cpus_per_task: int | None = None
    partition: str = ""
    account: str = ""
    job_name: str = ""
    array: str = ""
    after: str = ""  # the job that has to end well before
    others: tuple[str, ...] = ()  # OPTION=VALUE, as the site wants them

    @property
    def options(self) -> dict[str, str]:
        """By sbatch's names."""
        every = {
            "job-name": self.job_name, "nodes": str(self.nodes), "gpus-per-node": self.gpus_per_node if self.gpus else "",
            "cpus-per-task": str(self.cpus_per_task or ""), "time": self.time, "partition": self.partition,
            "account": self.account, "array": self.array, "dependency": self.after and f"afterok:{self.after}",
            # Else it would wait for ever once that job has failed, and take the place of the next try.
            "kill-on-invalid-dep": self.after and "yes",
        }  # fmt: skip
        others = {name: value for name, _, value in (other.partition("=") for other in self.others)}
        return {name: value for name, value in every.items() if value} | others

    @property
    def gpus(self) -> int:
        """How many on each node, of whatever type."""
        match = re.fullmatch(r"(?:[\w.-]+:)?(\d+)", self.gpus_per_node)
        if match is None:
            raise UserError(
                f"--gpus-per-node {self.gpus_per_node} is no number of GPUs: wanted N or TYPE:N, such as 8 or h100:4"
            )
        return int(match[1])

    @property
    def ranks(self) -> int:
        """Processes that train, as train.sbatch starts them: one for each GPU, or one on a node without."""
        told = os.environ.get("RANKS_PER_NODE") or str(self.gpus or 1)
        if not told.isdigit() or int(told) < 1:
            raise UserError(f"RANKS_PER_NODE={told} is no number of processes: unset it, or set it to 1 or more")
        return self.nodes * int(told)


@dataclass(frozen=True)
class Script:
    """One of our batch scripts, filled in: the options its text holds, and that text."""

    options: dict[str, str]
    text: str

    def log(self, job_id: str) -> str:
        """Where SLURM writes the log, `*` standing for the number of an array's element."""
        pattern = sbatch.values(self.text).get("output", SLURMS_LOG)
        return sbatch.file_name(pattern, {"%x": self.options["job-name"], "%j": job_id, "%A": job_id, "%a": "*"})


def train(arguments: list[str], config_arguments: list[str], stage: str | None, job: Job, dry_run: bool) -> None:
    """Check a training job, then print its script or submit it. Raises UserError with all faults.

    `arguments` are those of `pipeline train`; `config_arguments` what of them makes the config, `stage` their --stage.
    """
    runs, faults = _runs(config_arguments, job.array)
    if stage is not None and not stage.startswith(("/", "$")):
        faults.append(
            f"--stage {stage!r} is no whole path of a folder on the nodes' own disks, nor '$VARIABLE' of theirs"
        )
    # Of seed-0, seed-1 ... the job is named seed.
    shared_name = os.path.commonprefix([run.run.name for run in runs])  # noqa: RUF071
    job = replace(job, cpus_per_task=job.cpus_per_task or _cpus_for(job))
    named = replace(job, job_name=job.job_name or shared_name.rstrip("-_.") or "train")
    script = _fill("train.sbatch", named, arguments, max(map(_measured_lead_s, runs), default=0))
    folders = [Path(), *(run.run_dir for run in runs)]
    faults += [*_job_faults(job, _OF_TRAIN, script, dry_run), *places.unwritable(folders), *_taken(script, runs)]
    faults += [fault for run in _alike(runs) for fault in _run_faults(run, job)]
    if faults:
        raise UserError("; ".join(dict.fromkeys(faults)))
    data = [run.dataset_dir(entry.dataset) for run in runs for entry in run.datasets]
    _warn(script, [*folders, *data, *_interpreter()])
    if (cores := _cpus(script.text)) * job.nodes < job.ranks:
        logger.warning(
            "warning: %d core(s) for the %d ranks of a node: each trains and reads its data on a part of one; "
            "raise --cpus-per-task", cores, job.ranks // job.nodes,
        )  # fmt: skip
    for run in _alike(runs):
        logger.info("%s", "\n".join(_arithmetic(run, job)))
    if dry_run:
        sys.stdout.write(script.text)
        return
    job_id = _submit(script)
    _say(job_id, [
        f"job {job_id} ({named.job_name}) is in the queue{_waiting(job)}",
        f"follow   tail -F {script.log(job_id)}",
        f"run      {runs[0].run_dir}{f' and {len(runs) - 1} more' if runs[1:] else ''}: status.json, metrics.jsonl, tb/",
        f"stop     scancel --batch --signal=TERM {job_id}     saves, and does not come back",
        "go on    the same command again; at the time limit the job does that by itself",
    ])  # fmt: skip


def prepare(arguments: list[str], dataset: Path, sources: list[Path], tasks: int, job: Job, dry_run: bool) -> None:
    """Check a preparation job, then print its script or submit it; as an array, with the job that joins and verifies.

    `arguments` are those of `pipeline prepare`, found right by it; `sources` the local ones.
    """
    job = replace(job, job_name=job.job_name or dataset.name, array=f"0-{tasks - 1}" if tasks > 1 else "")
    script = _fill("prepare.sbatch", job, arguments)
    faults = [
        *_job_faults(job, _OF_PREPARE, script, dry_run),
        *places.unwritable([Path(), dataset]),
        *_taken(script, []),
    ]
    if holding := holder(dataset):
        faults.append(f"{dataset} is being written by {holding}: wait for it, or choose another --name")
    if faults:
        raise UserError("; ".join(faults))
    _warn(script, [Path(), dataset, *sources, *_interpreter()])
    logger.info("%d job(s) make %s, each for %s at a time", tasks, dataset, _walltime(job.time))
    merge = replace(job, array="", job_name=f"{job.job_name}-merge")
    if dry_run:
        sys.stdout.write(script.text)
        if tasks > 1:
            command = shlex.join([str(sbatch.find("merge.sbatch")), str(dataset)])
            logger.info("then, with the number that sbatch prints: sbatch --dependency=afterany:JOB %s", command)
        return
    first_id = last_id = _submit(script)
    lines = [f"job {first_id} ({job.job_name}) is in the queue", f"follow   tail -F {script.log(first_id)}"]
    if tasks > 1:
        merging = _fill("merge.sbatch", merge, [str(dataset)])
        try:
            last_id = _submit(merging, f"--dependency=afterany:{first_id}")
        except UserError as error:
            raise UserError(
                f"job {first_id} is in the queue, the one that joins what it does is not: {error}; "
                f"when it has ended, run pipeline merge {dataset}"
            ) from None
        lines.append(f"then     job {last_id} joins and verifies: tail -F {merging.log(last_id)}")
    _say(last_id, [
        *lines,
        f"stop     scancel {first_id}     what is done is kept, and the same command goes on",
        f"train    pipeline submit train data.dataset={dataset.name} ... --after {last_id}",
    ])  # fmt: skip


def _waiting(job: Job) -> str:
    return f", and waits for job {job.after}: if that fails, SLURM cancels this one" if job.after else ""


def _say(job_id: str, lines: list[str]) -> None:
    """The number to stdout, for scripts; the rest to people."""
    sys.stdout.write(f"{job_id}\n")
    sys.stdout.flush()
    logger.info("%s", "\n".join(lines))


# --- the script ---


def _fill(name: str, job: Job, arguments: list[str], lead_s: int = 0) -> Script:
    text = sbatch.find(name).read_text(encoding="utf-8")
    options = job.options
    values = sbatch.values(text) | options
    if job.array:
        options["output"] = values.get("output", SLURMS_LOG).replace("%j", "%A_%a")
    if "signal" in values and lead_s > sbatch.early_signal(values["signal"]).lead_s:
        options["signal"] = f"{values['signal'].partition('@')[0]}@{lead_s}"
    prologue = [
        "# Filled in by `pipeline submit`. More arguments may follow the file's name on sbatch's command line.",
        f"export PYTHON={shlex.quote(_python())}",
        f'set -- {shlex.join(arguments)} "$@"',
        "",
    ]
    return Script(options, sbatch.fill(text, options, prologue))


def _python() -> str:
    """The interpreter of the job, which is this one unless the user names another."""
    return os.environ.get("PYTHON") or sys.executable


def _interpreter() -> list[Path]:
    """Its folder, where it is named with one, and not found by each node for itself.

    Not the file, which in a virtual environment is a link to a Python that each node may well have of its own.
    """
    return [Path(_python()).parent] if Path(_python()).is_absolute() else []


def _submit(script: Script, *extra: str) -> str:
    # On the command line too, since SBATCH_* variables of the environment win over a script's own lines.
    options = [f"--{name}={value}" for name, value in script.options.items()]
    done = subprocess.run(
        ["sbatch", "--parsable", *options, *extra],
        input=script.text, env=_environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    said = " ".join(line.removeprefix("sbatch: ").removeprefix("error: ") for line in done.stderr.splitlines())
    if done.returncode:
        raise UserError(f"sbatch refuses the job: {said or f'exit code {done.returncode}'}")
    if said:
        logger.warning("warning: sbatch says: %s", said)
    return done.stdout.strip().partition(";")[0]  # behind it the cluster's name, where there are several


def _environment() -> dict[str, str]:
    """This one without what SLURM says of the job, or the shell of salloc, in which submit runs.

    sbatch hands it on, and the new job's SLURM neither sets nor unsets what does not concern it: an array's number, a
    restart count, the memory or the cores of a step would be taken for the new job's own.
    """
    if "SLURM_JOB_ID" not in os.environ:
        return dict(os.environ)
    return {
        name: value for name, value in os.environ.items() if not name.startswith("SLURM_") or name in _OF_THE_CLUSTER
    }


def _warn(script: Script, paths: list[Path]) -> None:
    findings = [_in_words(finding) for finding in mistakes.examine(script.text) if finding.level == "warning"]
    for text in [*findings, *places.not_shared(paths)]:
        logger.warning("warning: %s", text)


# --- what can be wrong ---


def _runs(arguments: list[str], array: str) -> tuple[list[Config], list[str]]:
    """The config of the job, or of each element of an array, and what is wrong with them."""
    runs, faults = [], []
    for element in map(str, sbatch.elements(array)) if array else [""]:
        try:
            runs.append(config_from_arguments([argument.replace("%a", element) for argument in arguments]))
        except UserError as error:
            faults.append(str(error))
            break  # the others would say the same
    if not runs and not faults:
        faults.append(f"--array {array} names no elements: wanted numbers such as 0-7, 1,3,5 or 0-15%4")
    if len({run.run_dir for run in runs}) < len(runs):
        faults.append(f"elements of --array {array} would share {runs[0].run_dir}: add run.name=NAME-%a")
    return runs, faults


def _alike(runs: list[Config]) -> list[Config]:
    """One of the runs that differ in name and seed alone."""
    return list({replace(run, run=replace(run.run, name="", seed=0)): run for run in runs}.values())


def _job_faults(job: Job, own: dict[str, str], script: Script, dry_run: bool) -> Iterator[str]:
    if not dry_run and shutil.which("sbatch") is None:
        yield "there is no sbatch here: submit on a login node, or print the script with --dry-run"
    limit_s = sbatch.seconds(job.time)
    if limit_s is None and job.time.upper() not in ("INFINITE", "UNLIMITED"):
        yield f"--time {job.time} is no time: wanted minutes, h:mm:ss or days-h:mm:ss, such as 24:00:00"
    if "/" in job.job_name:
        yield f"--job-name {job.job_name}: the log is named after it, and would lie in a folder that is not there"
    for other in job.others:
        if instead := next((option for start, option in own.items() if other.startswith(start)), ""):
            yield f"--sbatch {other} is not taken, as submit has an option for it: give {instead}"
        elif not re.fullmatch(r"[a-z][a-z-]+=\S.*", other):
            yield f"--sbatch {other} is no option of sbatch's: wanted OPTION=VALUE, such as qos=long"
    # The script is ours, but a site may have changed it.
    yield from (_in_words(finding) for finding in mistakes.examine(script.text) if finding.level == "error")
    yield from _partition_faults(job, limit_s, _cpus(script.text))


def _cpus(text: str) -> int:
    """What a script, which has one task a node, asks of each node; 1 where it does not say."""
    count = sbatch.values(text).get("cpus-per-task", "")
    return int(count) if count.isdigit() else 1


def _cpus_for(job: Job) -> int:
    """What the script asks for, or more where the GPUs of a node need it."""
    return max(_cpus(sbatch.find("train.sbatch").read_text(encoding="utf-8")), CORES_PER_GPU * job.gpus)


def _in_words(finding: mistakes.Finding) -> str:
    return f"{finding.what}: {finding.why} (line {finding.line} of the script); {finding.mend}"


def _walltime(time: str) -> str:
    limit_s = sbatch.seconds(time)
    return sbatch.in_words(limit_s) if limit_s else "unlimited time"


def _partition_faults(job: Job, limit_s: int | None, cpus: int) -> Iterator[str]:
    """What SLURM, where it is at hand, has against the partition; a job too large for it would wait for ever."""
    # --all: a hidden partition takes jobs as any other.
    listed = _ask("sinfo", "--all", "--noheader", "--exact", "--format=%P|%l|%D|%c")
    rows = re.findall(r"^(\S+?)(\*?)\|(\S+)\|(\d+)\|(\d+)$", listed, flags=re.MULTILINE)
    limits = {name: limit for name, _, limit, _, _ in rows}
    default = next((name for name, star, *_ in rows if star), "")
    chosen = (job.partition or os.environ.get("SBATCH_PARTITION") or default).split(",")
    if unknown := [name for name in chosen if limits and name not in limits]:
        yield f"there is no partition {', '.join(unknown)}: there are {', '.join(limits)}"
    if len(chosen) > 1 or chosen[0] not in limits:  # of several SLURM takes one that has room
        return
    (name,) = chosen
    most_s = sbatch.seconds(limits[name])
    nodes = sum(int(count) for other, _, _, count, _ in rows if other == name)
    most_cpus = max(int(count) for other, *_, count in rows if other == name)
    if most_s and limit_s and limit_s > most_s:
        yield f"--time {job.time} is over the limit of partition {name}, {limits[name]}"
    if job.nodes > nodes:
        yield f"--nodes {job.nodes} is more than the {nodes} of partition {name}"
    if cpus > most_cpus:
        yield f"--cpus-per-task {cpus} is more than a node of partition {name} has, {most_cpus}"


def _ask(*command: str) -> str:
    """What a command of SLURM's prints; nothing where there is none, or it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _taken(script: Script, runs: list[Config]) -> Iterator[str]:
    """Another job, or another process, at the same work."""
    name = script.options.get("job-name", "")
    ours = ("--all", f"--user={os.getuid()}", f"--name={name}")
    queue = _ask("squeue", "--noheader", *ours, "--format=%A|%T|%Z") if name else ""
    same = {tuple(line.split("|")[:2]) for line in queue.splitlines() if line.split("|")[2:] == [str(Path.cwd())]}
    for job_id, state in sorted(same):
        yield (
            f"job {job_id}, named {name} and submitted from here, is {state.lower()} already: wait for it, "
            f"scancel {job_id}, or choose another --job-name, and another run.name if it trains"
        )
    if not same:
        for run in runs:
            if holding := holder(run.run_dir):
                yield f"{run.run_dir} is being written by {holding}: wait for it, or choose another run.name"


def _run_faults(config: Config, job: Job) -> Iterator[str]:
    """The plan and the data of one run."""
    try:
        accumulation_steps(config, job.ranks)
    except UserError as error:
        yield str(error)
    if config.run.device.startswith("cuda") and not job.gpus:
        yield f"run.device={config.run.device} with --gpus-per-node 0: ask for GPUs, or leave run.device at auto"
    if not job.after:
        yield from _data_faults(config)


def _data_faults(config: Config) -> Iterator[str]:
    splits = ["train", "val"] if config.eval.every_steps else ["train"]
    tokenizers = []
    for entry in config.datasets:
        folder = config.dataset_dir(entry.dataset)
        try:
            manifest = load_manifest(folder)
        except UserError as error:
            yield str(error)
            continue
        tokenizers.append(manifest.tokenizer)
        for split in splits:
            if (tokens := manifest.count(split, "tokens")) <= config.model.block_size:
                yield (
                    f"{folder}'s {split} split has {tokens} tokens, fewer than one block of {config.model.block_size} and "
                    f"its target: prepare more text, {'with a larger --val-fraction, ' if split == 'val' else ''}"
                    "or lower model.block_size"
                )
    if any(tokenizer != tokenizers[0] for tokenizer in tokenizers):
        names = ", ".join(str(tokenizer["name"]) for tokenizer in tokenizers)
        yield f"data.mixture has several vocabularies ({names}): prepare all with one tokenizer"


# --- what the run will need ---


def _arithmetic(config: Config, job: Job) -> Iterator[str]:
    """How the step, the run and the disk add up, with every factor."""
    gpus = f"{job.gpus} GPU(s) each" if job.gpus else "no GPUs"
    accumulation = accumulation_steps(config, job.ranks)
    yield f"{job.nodes} node(s), {gpus}: {job.ranks} rank(s), for {_walltime(job.time)} at a time"
    yield (
        f"tokens_per_step {config.train.tokens_per_step:,} = micro_batch_size {config.train.micro_batch_size} x block_size "
        f"{config.model.block_size} x accumulation {accumulation} x {job.ranks} rank(s)"
    )
    if job.after:  # what it makes is not there yet
        return
    weights = sum(entry.weight for entry in config.datasets)
    for entry in config.datasets:
        tokens = config.train.max_steps * config.train.tokens_per_step * entry.weight / weights
        there = _manifest(config, entry.dataset).count("train", "tokens")
        yield (
            f"data {config.dataset_dir(entry.dataset)}: {there:,} train tokens; {config.train.max_steps:,} steps take "
            f"{tokens:,.0f} tokens, {tokens / there:.2f} epoch(s)"
        )
    vocab_size = _manifest(config, config.datasets[0].dataset).tokenizer["vocab_size"]
    one = CHECKPOINT_BYTES_PER_PARAMETER * parameters(config.model, vocab_size)
    needed = one * (config.checkpoint.keep + 2)  # the best one, and the one being written
    yield f"checkpoints of about {one / 1e6:,.1f} MB, {needed / 1e6:,.1f} MB of them at a time"
    there = sum(file.stat().st_size for file in (config.run_dir / "checkpoints").glob("*/*") if file.is_file())
    free = shutil.disk_usage(places.nearest(config.run_dir)).free
    if free + there < needed:
        yield (
            f"warning: {config.run_dir} has {free / 1e6:,.0f} MB free: lower checkpoint.keep, or choose another run.dir"
        )


def _manifest(config: Config, dataset: str) -> Manifest:
    return load_manifest(config.dataset_dir(dataset))


def parameters(model: ModelConfig, vocab_size: int) -> int:
    """GPT-2's number of parameters, without building it."""
    width = model.n_embd
    norm = width * (2 if model.bias else 1)
    block = 12 * width * width + (9 * width if model.bias else 0) + 2 * norm
    embeddings = (vocab_size * (1 if model.tie_weights else 2) + model.block_size) * width
    return embeddings + model.n_layer * block + norm


def _measured_lead_s(config: Config) -> int:
    """Seconds that a step, a save and leaving took in an earlier start of this run; 0 where there was none."""
    try:
        rows = (config.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        saves = re.findall(r"saved .* in ([\d.]+) s", (config.run_dir / "log.txt").read_text(encoding="utf-8"))
        step_s = config.train.tokens_per_step / float(json.loads(rows[-1])["tokens_per_s"])
        return ceil(step_s + float(saves[-1]) + LEAVING_S)
    except (OSError, ValueError, LookupError, TypeError, ZeroDivisionError):
        return 0
