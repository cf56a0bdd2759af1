"""The command line: parse, import the stage, run it, and turn what the user can mend into one line."""

import errno
import os
import shlex
import sys
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

import pipeline
from pipeline import launch, log
from pipeline.config.keys import help_text
from pipeline.config.load import DEFAULT_CONFIG, config_from_arguments, load_config
from pipeline.errors import EXIT_DIVERGED, EXIT_INTERRUPTED, EXIT_USER, Diverged, UserError
from pipeline.vocabulary.specs import TOKENIZER_NAMES

# A full disk, a quota, missing permission, an endless name: no bug of ours.
THE_MACHINES_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG)

app = typer.Typer(
    help="Train a GPT from raw text: prepare it, train on it, sample from what was learnt.",
    add_completion=False,
    pretty_exceptions_enable=False,  # each of eight ranks would draw its own coloured traceback
    rich_markup_mode=None,
)


def main() -> None:
    """Run one command. Exit codes: 0 done, 2 the user can mend it (one line on stderr), 3 diverged, 1 our bug."""
    log.configure()
    _settle_encoding()
    try:
        if app(standalone_mode=False) == EXIT_INTERRUPTED:  # how the parser reports Ctrl-C
            _leave("interrupted", EXIT_INTERRUPTED)
    except UserError as error:
        _leave(str(error), EXIT_USER)
    except Diverged as error:
        if not launch.rank():  # every rank comes to the same verdict
            _leave(str(error), EXIT_DIVERGED)
        launch.leave(EXIT_DIVERGED)
    except OSError as error:
        if error.errno not in THE_MACHINES_FAULTS:
            raise
        _leave(
            f"{error.strerror}: {error.filename or 'while writing'}; make room or choose another place, then go on",
            EXIT_USER,
        )
    except Exception as error:
        # The parser's own complaints, whichever copy of click this typer carries.
        if not hasattr(error, "format_message"):
            raise
        _leave(f"{error.format_message()} (see pipeline --help)", EXIT_USER)


def _settle_encoding() -> None:
    """Text on stdout is UTF-8 in a file or a pipe, whatever the locale; a terminal shows what it has no sign for escaped."""
    if isinstance(sys.stdout, TextIOWrapper):
        at_terminal = sys.stdout.isatty()
        sys.stdout.reconfigure(
            encoding=None if at_terminal else "utf-8", errors="backslashreplace" if at_terminal else None
        )


def _leave(message: str, code: int) -> NoReturn:
    log.logger.error("error: %s", log.printable(" ".join(message.splitlines())))
    launch.leave(code)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pipeline {pipeline.__version__}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Options that stand before a command's name."""


@app.command()
def prepare(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="openwebtext, fineweb-edu, tinystories, shakespeare, stdlib, hf:ORG/NAME[:CONFIG][@REVISION], a .txt .md .py "
            ".jsonl .json .parquet file, also .gz or .zst, a folder, a glob, a URL (s3://...), or - for stdin.",
            show_default=False,
        ),
    ],
    name: Annotated[str, typer.Option(help="The dataset's name; by default the source's.")] = "",
    data_dir: Annotated[str, typer.Option(help="Where datasets live.")] = "data",
    tokenizer: Annotated[str, typer.Option(help=", ".join(TOKENIZER_NAMES) + ".")] = "gpt2",
    text_field: Annotated[str, typer.Option(help="The field or column that holds the text.")] = "text",
    val_fraction: Annotated[
        float | None, typer.Option(help="Share of the documents for val; by default by the corpus's size.")
    ] = None,
    shard_tokens: Annotated[int, typer.Option(help="Tokens after which a shard is closed.")] = 100_000_000,
    workers: Annotated[int | None, typer.Option(help="Processes; by default one a core.")] = None,
    limit_docs: Annotated[int | None, typer.Option(help="Take only the first N documents.")] = None,
    seed: Annotated[int, typer.Option(help="Chooses which documents are val.")] = 0,
    dedup: Annotated[bool, typer.Option("--dedup", help="Leave out exact duplicates of earlier documents.")] = False,
    task_id: Annotated[
        int | None, typer.Option(help="This job's number, from 0, among --tasks; by default SLURM's array index.")
    ] = None,
    tasks: Annotated[
        int | None, typer.Option(help="How many jobs share the dataset; by default the size of SLURM's array.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a dataset of the same name, or what was begun of it.")
    ] = False,
) -> None:
    """Turn text into a dataset: shards of token ids and a manifest, in DATA_DIR/NAME. Killed, it goes on where it was."""
    from prepare.options import PrepareOptions
    from prepare.run import run

    if task_id is None and tasks is None:
        task_id, tasks = _slurm_array()
    run(
        PrepareOptions(
            sources, name, data_dir, tokenizer, text_field, val_fraction, shard_tokens, workers, limit_docs, seed, dedup,
            task_id, tasks, force,
        )
    )  # fmt: skip


def _slurm_array() -> tuple[int | None, int | None]:
    """This job's number in its SLURM array, from 0, and the array's size; nothing outside one."""
    index, size = os.environ.get("SLURM_ARRAY_TASK_ID"), os.environ.get("SLURM_ARRAY_TASK_COUNT")
    if index is None or size is None:
        return None, None
    return int(index) - int(os.environ.get("SLURM_ARRAY_TASK_MIN", "0")), int(size)


@app.command()
def merge(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The dataset's folder, such as data/openwebtext.")],
    workers: Annotated[int | None, typer.Option(help="Processes; by default one a core.")] = None,
) -> None:
    """Make the dataset of what the jobs of `prepare --tasks` have done, where the last of them did not."""
    from prepare.run import merge as merge_tasks

    merge_tasks(folder, workers)


@app.command()
def fetch(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A named corpus, hf:ORG/NAME[:CONFIG][@REVISION], or a URL.")
    ],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where copies lie; it may hold several.")],
    tokenizer: Annotated[str, typer.Option(help="Fetch this vocabulary too; gpt2 ships with the program.")] = "gpt2",
) -> None:
    """Bring a corpus into a folder that `prepare` reads without a network; prints what to set there."""
    from prepare.sources.fetch import run

    if tokenizer not in TOKENIZER_NAMES:
        raise UserError(f"unknown tokenizer {tokenizer!r}: there are {', '.join(TOKENIZER_NAMES)}")
    for name, value in run(source, folder, tokenizer).items():
        typer.echo(f"export {name}={shlex.quote(value)}")


@app.command(epilog=help_text())
def train(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG] [SECTION.KEY=VALUE]...",
            help=f"A preset's name or a TOML file (by default {DEFAULT_CONFIG}), then changes to it.",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        str | None, typer.Option(help="auto, must, never or a checkpoint's name: the same as checkpoint.resume=...")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and say what would run.")] = False,
    stage: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Copy the datasets to this folder on each node's own disk, such as '$SLURM_TMPDIR', and read them there.",
            show_default=False,
        ),
    ] = None,
    print_run_dir: Annotated[
        bool, typer.Option("--print-run-dir", help="Print the run's folder, for scripts, and do nothing else.")
    ] = False,
) -> None:
    """Train a model on a prepared dataset. Each process of torchrun, or task of srun, is a rank: torchrun -m pipeline train."""
    try:
        config = config_from_arguments(_config_arguments(arguments, resume))
    except UserError:
        if launch.rank():  # rank 0 reads the same arguments and says it
            launch.leave_to_first()
        raise
    if print_run_dir:
        typer.echo(config.run_dir.absolute())
        return
    from sample.preview import preview
    from train.run import run

    run(config, dry_run, None if stage is None else Path(stage), preview)


def _config_arguments(arguments: list[str] | None, resume: str | None) -> list[str]:
    return [*(arguments or []), *([] if resume is None else [f"checkpoint.resume={resume}"])]


@app.command()
def sample(
    ckpt: Annotated[str, typer.Option(help="latest, best, a checkpoint or Hugging Face GPT-2 folder, or hf:ORG/NAME.")],
    prompt: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Text to go on from; may be given several times.")
    ] = None,
    prompt_file: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", help="A file that is a prompt, to its last byte; - for stdin; may be given several times."
        ),
    ] = None,
    interactive: Annotated[
        bool, typer.Option("--interactive", help="Ask for prompts; each line is a new one.")
    ] = False,
    num_samples: Annotated[int, typer.Option(help="Samples for each prompt.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add to a prompt.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Choose among the K likeliest tokens; 0 for all.")] = 50,
    top_p: Annotated[float, typer.Option(help="Choose among the likeliest tokens that hold this probability.")] = 1.0,
    min_p: Annotated[
        float, typer.Option(help="Leave out tokens less than this times as likely as the likeliest.")
    ] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1, tokens of the prompt and the text so far become less likely.")
    ] = 1.0,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="End a sample before this text; may be given several times."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="The same seed gives the same text, on the same machine; by default a new one.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="One JSON object a sample: prompt, text, token_ids, their log_probabilities (natural logarithms of what "
            "the model gave them, before temperature and all filters), finish_reason (length, end_of_text or stop).",
        ),
    ] = False,
    run_dir: Annotated[Path | None, typer.Option(help="The run of latest and best; by default the newest.")] = None,
) -> None:
    """Write text from a checkpoint to stdout. What a token is drawn from: the model's logits, after the repetition penalty,
    temperature, top-k, top-p and min-p, in this order.
    """
    from sample.options import SampleOptions
    from sample.run import run

    run(
        SampleOptions(
            ckpt, prompt or [], prompt_file or [], interactive, num_samples, max_new_tokens, temperature, top_k, top_p,
            min_p, repetition_penalty, stop or [], seed, device, dtype, json, run_dir,
        )
    )  # fmt: skip


@app.command(name="eval")
def evaluate(
    ckpt: Annotated[str, typer.Option(help="latest, best, a checkpoint or Hugging Face GPT-2 folder, or hf:ORG/NAME.")],
    data: Annotated[
        str, typer.Option(help="The dataset's name or path; by default what the checkpoint was trained on.")
    ] = "",
    data_dir: Annotated[str, typer.Option(help="Where datasets live; by default where they were for training.")] = "",
    split: Annotated[str, typer.Option(help="val or train.")] = "val",
    stride: Annotated[
        int | None,
        typer.Option(
            help="Tokens from one window to the next; by default block_size, so that windows do not overlap. A smaller one "
            "gives every token at least block_size - stride tokens of context.",
            show_default=False,
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Windows, or requests of a task, that a rank takes at once.")] = 8,
    tasks: Annotated[
        str,
        typer.Option(
            help="Tasks of EleutherAI's lm-evaluation-harness, such as hellaswag,lambada_openai; the loss is then "
            "measured only with --data."
        ),
    ] = "",
    task_dir: Annotated[Path | None, typer.Option(help="A folder with YAML files of tasks of your own.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first N documents of each task.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    run_dir: Annotated[Path | None, typer.Option(help="The run of latest and best; by default the newest.")] = None,
) -> None:
    """Measure a checkpoint: loss, perplexity and bits per byte over a whole split, and tasks. Runs under torchrun, too."""
    os.environ["TQDM_DISABLE"] = "1"  # before anything imports it: the harness would draw bars into log files
    from score.options import EvalOptions
    from score.run import run

    names = tuple(name.strip() for name in tasks.split(",") if name.strip())
    run(
        EvalOptions(
            ckpt, data, data_dir, split, stride, batch_size, names, task_dir, limit, device, dtype, json, run_dir
        )
    )


@app.command()
def export(
    ckpt: Annotated[str, typer.Option(help="latest, best, a checkpoint or Hugging Face GPT-2 folder, or hf:ORG/NAME.")],
    to: Annotated[Path, typer.Option(metavar="DIR", help="A new folder; with --format gguf also a new file.gguf.")],
    dtype: Annotated[str, typer.Option(help="The type of the numbers: float32, bfloat16 or float16.")] = "float32",
    format: Annotated[str, typer.Option(help="safetensors, a Hugging Face folder; or gguf.")] = "safetensors",
    run_dir: Annotated[Path | None, typer.Option(help="The run of latest and best; by default the newest.")] = None,
) -> None:
    """Write a checkpoint as a folder to hand on: weights, config, tokenizer and a model card, no training state."""
    from export.run import ExportOptions, run

    run(ExportOptions(ckpt, to, dtype, format, run_dir))


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A dataset, a shard, or a checkpoint or Hugging Face GPT-2 folder.")],
    json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Show what is in a dataset, shard or checkpoint: counts, lengths, frequent tokens, decoded beginnings."""
    from observe.inspect import run

    run(path, json)


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(help="A dataset, a shard or a checkpoint.")],
) -> None:
    """Read every byte of it again and check every promise its manifest makes; exit code 2 if one is broken."""
    from observe.verify import run

    run(path)


@app.command()
def doctor(
    slurm: Annotated[Path, typer.Option(metavar="FILE", help="A batch script: is anything in it known to go wrong?")],
    json: Annotated[bool, typer.Option("--json", help="One JSON list of what was found.")] = False,
) -> None:
    """Find the classic mistakes of a batch script, yours or ours; exit code 2 if one of them is an error."""
    from slurm.doctor import run

    run(slurm, json)


submit = typer.Typer(
    help="Check a SLURM job on the login node, then submit it, or print its script.", rich_markup_mode=None
)
app.add_typer(submit, name="submit")

Walltime = Annotated[
    str, typer.Option("--time", help="At most so long at a time: minutes, h:mm:ss or days-h:mm:ss.", show_default=False)
]
CpusPerTask = Annotated[
    int | None,
    typer.Option(min=1, help="Cores on each node; by default the script's number, or 4 a GPU if that is more."),
]
Partition = Annotated[str, typer.Option(help="The partition.")]
Account = Annotated[str, typer.Option(help="Who pays.")]
Others = Annotated[
    list[str] | None,
    typer.Option(
        "--sbatch",
        metavar="OPTION=VALUE",
        help="Any other option of sbatch, such as qos=long or mem=0; may be given several times.",
        show_default=False,
    ),
]
PrintOnly = Annotated[
    bool, typer.Option("--dry-run", help="Check, and print the script instead: sbatch takes it as it is.")
]


@submit.command("train", context_settings={"ignore_unknown_options": True})
def submit_train(
    time: Walltime,
    nodes: Annotated[int, typer.Option(min=1, help="How many nodes.", show_default=False)],
    gpus_per_node: Annotated[
        str, typer.Option(metavar="[TYPE:]N", help="GPUs on each, 0 for none.", show_default=False)
    ],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG] [SECTION.KEY=VALUE]... [OPTION]...", help="As for pipeline train.", show_default=False
        ),
    ] = None,
    cpus_per_task: CpusPerTask = None,
    partition: Partition = "",
    account: Account = "",
    sbatch: Others = None,
    array: Annotated[
        str, typer.Option(help="Many runs: 0-7, 1,3,5 or 0-15%4. %a in the arguments is each one's number.")
    ] = "",
    after: Annotated[
        str, typer.Option(help="Only when this job has ended well; its dataset may not be there yet.")
    ] = "",
    job_name: Annotated[str, typer.Option(help="By default the run's name.")] = "",
    dry_run: PrintOnly = False,
) -> None:
    """Submit a training run, which saves and comes back at its time limit. Its number goes to stdout."""
    from slurm import submit as submission

    parsed = _parsed("train", arguments or [])
    job = submission.Job(
        time, nodes, gpus_per_node, cpus_per_task, partition, account, job_name, array, after, tuple(sbatch or [])
    )
    config_arguments = _config_arguments(parsed["arguments"], parsed["resume"])
    submission.train(arguments or [], config_arguments, parsed["stage"], job, dry_run)


@submit.command("prepare", context_settings={"ignore_unknown_options": True})
def submit_prepare(
    time: Walltime,
    arguments: Annotated[
        list[str], typer.Argument(metavar="SOURCE... [OPTION]...", help="As for pipeline prepare.", show_default=False)
    ],
    tasks: Annotated[int, typer.Option(min=1, help="Jobs that share the work, and one more that joins it.")] = 1,
    cpus_per_task: CpusPerTask = None,
    partition: Partition = "",
    account: Account = "",
    sbatch: Others = None,
    job_name: Annotated[str, typer.Option(help="By default the dataset's name.")] = "",
    dry_run: PrintOnly = False,
) -> None:
    """Submit a preparation, or several that share a dataset. The number of the job that ends last goes to stdout."""
    from prepare.options import PrepareOptions
    from prepare.run import check_before
    from slurm import submit as submission

    dataset, sources = check_before(PrepareOptions(**_parsed("prepare", arguments)), tasks)
    job = submission.Job(time, 1, "0", cpus_per_task, partition, account, job_name, others=tuple(sbatch or []))
    submission.prepare(arguments, dataset, sources, tasks, job, dry_run)


def _parsed(command: str, arguments: list[str]) -> dict[str, Any]:
    """What another command makes of its arguments, without running it."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    context = commands[command].make_context(f"pipeline {command}", list(arguments))
    parameters: dict[str, Any] = context.params
    return parameters


@app.command()
def quickstart() -> None:
    """See it work in a few minutes: prepare the Python library's own source, train on it, sample from it."""
    from prepare.options import PrepareOptions
    from prepare.run import run as run_prepare
    from sample.options import SampleOptions
    from sample.preview import preview
    from sample.run import run as run_sample
    from train.run import run as run_train

    config = load_config("quickstart", [])
    log.logger.info("1/3 prepare: the standard library's source, one token a byte")
    run_prepare(PrepareOptions(["stdlib"], name=config.data.dataset, tokenizer="byte"))
    log.logger.info("2/3 train: a small GPT, a few minutes on two cores")
    if run_train(config, preview=preview):
        return  # stopped on request; the same command goes on
    log.logger.info("3/3 sample: what it writes after 'def '")
    run_sample(SampleOptions("best", ["def "], max_new_tokens=400, temperature=0.7, seed=1, run_dir=config.run_dir))
    log.logger.info(
        "What to try next:\n"
        "  pipeline sample --ckpt best --prompt 'class ' --num-samples 3      more text from this model\n"
        "  pipeline eval --ckpt best                                          its loss on all the text it never saw\n"
        "  pipeline train quickstart run.name=longer train.max_steps=10000    train it for longer\n"
        "  tensorboard --logdir runs                                          its curves\n"
        "  pipeline prepare my-texts/ --name mine --tokenizer byte            your own text ...\n"
        "  pipeline train quickstart data.dataset=mine run.name=mine          ... and a model of it"
    )
