"""The commands that use a model: sample, eval, export."""

import os
from typing import Any

import click

from pipeline.cli.command import Command, Shown
from pipeline.config.keys import KEYS

GROUP = "Models"
CKPT: Shown = {
    "metavar": "CKPT", "type": click.Path(),
    "help": "latest, best, average, a run, the folder of a checkpoint or a Hugging Face model, or hf:ORG/NAME.",
}  # fmt: skip
RUN_DIR: Shown = {"metavar": "DIR", "help": "Run of latest, best and average, or folder of runs. [default: runs]"}
DEVICE = f"{KEYS['run.device'].metadata['text']}."
DTYPE = f"{', '.join(KEYS['run.dtype'].metadata['choices'])}."


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


@click.command(
    cls=Command, group=GROUP, options="sample.options:SampleOptions",
    example="pipeline sample --ckpt latest --prompt 'Once upon a time' --temperature 0.8",
    shown={
        "ckpt": CKPT,
        "prompts": {"flag": "--prompt", "help": "Text to continue; may be repeated."},
        "prompt_files": {
            "flag": "--prompt-file", "metavar": "FILE",
            "help": "File that is a prompt, to its last byte; - for stdin; may be repeated.",
        },
        "interactive": "Ask for prompts; each line is a new one.",
        "num_samples": "Samples for each prompt.",
        "max_new_tokens": "Tokens to add to a prompt, at most.",
        "temperature": "0 takes the most likely token each time.",
        "top_k": {"metavar": "K", "help": "Draw from the K most likely tokens; 0 for all."},
        "top_p": {"metavar": "P", "help": "Draw from the most likely tokens that hold this probability."},
        "min_p": {"metavar": "P", "help": "Leave out tokens less than P times as likely as the most likely one."},
        "repetition_penalty": "Above 1, tokens of the prompt and the text so far become less likely.",
        "stop": "End a sample before this text; may be repeated.",
        "seed": "The same seed gives the same text on the same machine; by default a new one.",
        "device": DEVICE, "dtype": DTYPE,
        "json": "Print one JSON object a sample: prompt, text, token_ids, log_probabilities (natural logarithms of the "
                "model's own probabilities, before all filters), finish_reason (length, end_of_text or stop).",
        "run_dir": RUN_DIR,
    },
)  # fmt: skip
def sample(options: Any) -> None:
    """Generate text from a checkpoint, to stdout.

    A token is drawn from the model's logits after the repetition penalty, temperature, top-k, top-p
    and min-p, in this order. Without a prompt the text starts a new document.
    """
    from sample.run import run

    run(options)


@click.command(
    "eval", cls=Command, group=GROUP, options="score.options:EvalOptions", on_ranks=True,
    example="pipeline eval --ckpt best --json",
    shown={
        "ckpt": CKPT,
        "data": {"metavar": "NAME", "help": "Name or path of a dataset; by default what the checkpoint was trained on."},
        "data_dir": {"metavar": "DIR", "help": "Folder of all datasets; by default the one of training."},
        "split": "val or train.",
        "stride": "Tokens from one window to the next; by default block_size, so that windows do not overlap. A smaller "
                  "one gives every token at least block_size - stride tokens of context.",
        "batch_size": "Windows, or requests of a task, that a rank takes at a time.",
        "tasks": {
            "metavar": "NAMES", "type": _names, "multiple": False,
            "help": "Tasks, such as hellaswag,lambada_openai; the loss is then measured only with --data.",
        },
        "task_dir": {
            "metavar": "DIR",
            "help": "Folder with YAML files of your tasks. Python functions that they name with !function are run.",
        },
        "limit": "Only the first N documents of each task.",
        "device": DEVICE, "dtype": DTYPE,
        "json": "Print one JSON object.",
        "run_dir": RUN_DIR,
        "follow": {
            "metavar": "RUN",
            "help": "Evaluate each checkpoint of a run that trains, as it appears, and write rows to its evals.jsonl.",
        },
    },
)  # fmt: skip
def evaluate(options: Any) -> None:
    """Measure loss, perplexity and bits per byte over a whole split.

    Tasks of EleutherAI's lm-evaluation-harness can be run too. The ranks of torchrun or srun share
    a split; tasks are scored by the first rank alone.
    """
    os.environ["TQDM_DISABLE"] = "1"  # before anything imports it: the harness would draw bars into log files
    if options.follow:
        from score.follow import follow as run
    else:
        from score.run import run

    run(options)


@click.command(
    cls=Command, group=GROUP, options="export.options:ExportOptions",
    example="pipeline export --ckpt best --to my-model --dtype bfloat16",
    shown={
        "ckpt": CKPT,
        "to": {"metavar": "DIR", "help": "A new folder; with --format gguf also a new file.gguf."},
        "dtype": "Type of the weights: float32, bfloat16 or float16.",
        "format": "safetensors (a Hugging Face folder) or gguf.",
        "run_dir": RUN_DIR,
    },
)  # fmt: skip
def export(options: Any) -> None:
    """Write a checkpoint as a folder, or GGUF file, to share.

    It holds weights, config, tokenizer and a model card, and no training state.
    """
    from export.run import run

    run(options)
