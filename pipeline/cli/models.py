"""The commands that use a model: sample, eval, export."""

import os
from typing import Any

from pipeline.cli.command import Command, Shown

GROUP = "Models"
CKPT = Shown("latest, best, a checkpoint, run or Hugging Face folder, or hf:ORG/NAME.", metavar="CKPT")
RUN_DIR = Shown("Run that latest and best are of; by default the newest.", metavar="DIR")
DEVICE, DTYPE = Shown("auto, cpu, cuda, cuda:N or mps."), Shown("auto, float32, bfloat16 or float16.")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _sample_options() -> type:
    from sample.options import SampleOptions

    return SampleOptions


def _sample(options: Any) -> None:
    from sample.run import run

    run(options)


sample = Command(
    "sample", group=GROUP, callback=_sample, options=_sample_options,
    help="""Generate text from a checkpoint, to stdout.

    A token is drawn from the model's logits after the repetition penalty, temperature, top-k, top-p and min-p, in this
    order. Without a prompt the text starts a new document.""",
    example="pipeline sample --ckpt latest --prompt 'Once upon a time' --temperature 0.8",
    shown={
        "ckpt": CKPT,
        "prompts": Shown("Text to continue; may be repeated.", flag="--prompt"),
        "prompt_files": Shown(
            "File that is a prompt, to its last byte; - for stdin; may be repeated.",
            flag="--prompt-file", metavar="FILE",
        ),
        "interactive": Shown("Ask for prompts; each line is a new one."),
        "num_samples": Shown("Samples for each prompt."),
        "max_new_tokens": Shown("Tokens to add to a prompt, at most."),
        "temperature": Shown("0 takes the most likely token each time."),
        "top_k": Shown("Draw from the K most likely tokens; 0 for all.", metavar="K"),
        "top_p": Shown("Draw from the most likely tokens that hold this probability.", metavar="P"),
        "min_p": Shown("Leave out tokens less than P times as likely as the most likely one.", metavar="P"),
        "repetition_penalty": Shown("Above 1, tokens of the prompt and the text so far become less likely."),
        "stop": Shown("End a sample before this text; may be repeated."),
        "seed": Shown("The same seed gives the same text on the same machine; by default a new one."),
        "device": DEVICE, "dtype": DTYPE,
        "json": Shown(
            "Print one JSON object a sample: prompt, text, token_ids, log_probabilities (natural logarithms of the "
            "model's own probabilities, before all filters), finish_reason (length, end_of_text or stop)."
        ),
        "run_dir": RUN_DIR,
    },
)  # fmt: skip


def _eval_options() -> type:
    from score.options import EvalOptions

    return EvalOptions


def _evaluate(options: Any) -> None:
    os.environ["TQDM_DISABLE"] = "1"  # before anything imports it: the harness would draw bars into log files
    from score.run import run

    run(options)


evaluate = Command(
    "eval", group=GROUP, callback=_evaluate, options=_eval_options,
    help="""Measure loss, perplexity and bits per byte over a whole split.

    Tasks of EleutherAI's lm-evaluation-harness can be run too. Works under torchrun.""",
    example="pipeline eval --ckpt best --json",
    shown={
        "ckpt": CKPT,
        "data": Shown("Name or path of a dataset; by default what the checkpoint was trained on.", metavar="NAME"),
        "data_dir": Shown("Folder of all datasets; by default the one of training.", metavar="DIR"),
        "split": Shown("val or train."),
        "stride": Shown(
            "Tokens from one window to the next; by default block_size, so that windows do not overlap. A smaller one "
            "gives every token at least block_size - stride tokens of context."
        ),
        "batch_size": Shown("Windows, or requests of a task, that a rank takes at a time."),
        "tasks": Shown(
            "Tasks, such as hellaswag,lambada_openai; the loss is then measured only with --data.",
            metavar="NAMES", kind=_names,
        ),
        "task_dir": Shown("Folder with YAML files of your tasks.", metavar="DIR"),
        "limit": Shown("Only the first N documents of each task."),
        "device": DEVICE, "dtype": DTYPE,
        "json": Shown("Print one JSON object."),
        "run_dir": RUN_DIR,
    },
)  # fmt: skip


def _export_options() -> type:
    from export.options import ExportOptions

    return ExportOptions


def _export(options: Any) -> None:
    from export.run import run

    run(options)


export = Command(
    "export", group=GROUP, callback=_export, options=_export_options,
    help="""Write a checkpoint as a folder, or GGUF file, to share.

    It holds weights, config, tokenizer and a model card, and no training state.""",
    example="pipeline export --ckpt best --to my-model --dtype bfloat16",
    shown={
        "ckpt": CKPT,
        "to": Shown("A new folder; with --format gguf also a new file.gguf.", metavar="DIR"),
        "dtype": Shown("Type of the weights: float32, bfloat16 or float16."),
        "format": Shown("safetensors (a Hugging Face folder) or gguf."),
        "run_dir": RUN_DIR,
    },
)  # fmt: skip
