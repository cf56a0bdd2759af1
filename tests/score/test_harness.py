"""Tasks of EleutherAI's harness: its scores are those of plain loops over our model, and only --task-dir's functions run."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import prose, run_program, tokenizer_named, write_documents
from test_score import ALONE, model_with_opinions, save

from pipeline.checkpoint.folder import DESCRIPTION, read_description, write_description, write_model
from pipeline.errors import UserError
from pipeline.model.language_model import LanguageModel
from pipeline.vocabulary.char_byte_word import ByteTokenizer
from pipeline.vocabulary.tokenizer import Tokenizer
from score.loss import Scorer
from score.options import EvalOptions, check_options
from score.run import run

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.slow  # the harness takes seconds to import

BLOCK_SIZE = 48
QUESTIONS = [
    {"question": "The answer", "choices": ["is yes", "no", "may well be something longer than that"], "right": 1},
    {"question": "A trailing space ", "choices": [" is kept", "not kept", "?"], "right": 0},
    {"question": "naïve café, 東京", "choices": ["와", "한국", "an emoji 😀"], "right": 2},
    {"question": "too long for the context " * 12, "choices": ["a", "b", "words and more words"], "right": 2},
]
DATA = """
dataset_path: json
dataset_kwargs: {data_files: {test: QUESTIONS}}
test_split: test
"""
MULTIPLE_CHOICE = f"""
task: choose{DATA}
output_type: multiple_choice
doc_to_text: "{{{{question}}}}:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: right
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
GENERATE = f"""
task: write{DATA}
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "x"
generation_kwargs: {{until: ["e", "ing"], max_gen_toks: 12}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
ROLLING = f"""
task: read{DATA}
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list:
  - {{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}}
"""


def write_tasks(folder: Path, **tasks: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    questions = folder / "questions.jsonl"
    questions.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    for name, content in tasks.items():
        (folder / f"{name}.yaml").write_text(content.replace("QUESTIONS", str(questions)))
    return folder


@pytest.fixture(autouse=True)
def _no_network_and_an_empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LanguageModel, Tokenizer]:
    tokenizer = tokenizer_named("bpe:512")
    model = model_with_opinions(tokenizer.vocab_size, BLOCK_SIZE)
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, model, tokenizer)
    return folder, model, tokenizer


def evaluate(capsys: pytest.CaptureFixture[str], folder: Path, *tasks: str, **options: Any) -> dict[str, Any]:
    """The scores that --json prints."""
    run(EvalOptions(ckpt=str(folder), tasks=tasks, device="cpu", dtype="float32", json=True, **options))
    scores: dict[str, Any] = json.loads(capsys.readouterr().out)["tasks"]
    return scores


def log_probabilities(model: LanguageModel, context: list[int], continuation: list[int]) -> torch.Tensor:
    """Natural logarithms, one for each token of the continuation; the context loses its beginning if it is too long."""
    ids = (context + continuation)[-BLOCK_SIZE - 1 :]
    with torch.inference_mode():
        found = model.logits(torch.tensor([ids[:-1]])).log_softmax(dim=-1)[0]
    return found[range(len(ids) - 1), ids[1:]][-len(continuation) :]


def score_of_choice(model: LanguageModel, tokenizer: Tokenizer, context: str, choice: str) -> float:
    """As the harness defines it: encoded together, split where the context ends, whose last spaces the choice gets."""
    stripped = context.rstrip()
    before = tokenizer.encode(stripped).tolist()
    together = tokenizer.encode(context + choice).tolist()
    return log_probabilities(model, before, together[len(before) :]).sum().item()


def test_scores_are_those_of_plain_loops_over_our_model(
    checkpoint: tuple[Path, LanguageModel, Tokenizer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, model, tokenizer = checkpoint
    tasks = write_tasks(tmp_path / "tasks", choose=MULTIPLE_CHOICE, read=ROLLING, write=GENERATE)
    found = evaluate(capsys, folder, "choose", "read", "write", task_dir=tasks, batch_size=3)
    right, right_by_length, bits, text_bytes = 0, 0, 0.0, 0
    for question in QUESTIONS:
        text, choices = str(question["question"]), list(map(str, question["choices"]))  # type: ignore[call-overload]
        scores = [score_of_choice(model, tokenizer, f"{text}:", f" {choice}") for choice in choices]
        right += max(range(3), key=scores.__getitem__) == question["right"]
        right_by_length += max(range(3), key=lambda i: scores[i] / len(choices[i])) == question["right"]
        ids, done = tokenizer.encode(text).tolist(), 0
        while done < len(ids):  # windows that predict block_size tokens each, the last one with more context
            window = ids[done : done + BLOCK_SIZE]
            context = [tokenizer.end_of_text, *ids][: done + 1]
            bits -= log_probabilities(model, context, window).sum().item() / torch.log(torch.tensor(2.0)).item()
            done += len(window)
        text_bytes += len(text.encode())
    assert found["choose"]["acc"] == right / len(QUESTIONS)
    assert found["choose"]["acc_norm"] == right_by_length / len(QUESTIONS)
    assert found["choose"]["documents"] == len(QUESTIONS) and found["choose"]["acc_stderr"] > 0
    assert found["choose"]["n_shot"] == 0
    assert found["read"]["bits_per_byte"] == pytest.approx(bits / text_bytes, rel=1e-5)
    assert found["write"]["exact_match"] == 0


def requests_of(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


def test_requests_are_answered_as_by_our_model(checkpoint: tuple[Path, LanguageModel, Tokenizer]) -> None:
    from score.harness import open_model

    folder, model, tokenizer = checkpoint
    theirs = open_model(folder, Scorer(model, torch.float32, 3, ALONE))
    text = prose()[0]
    pairs = [(text[at : at + length], text[at + length : at + length + 9]) for at in (0, 50) for length in (1, 30, 400)]
    pairs += [("ends in spaces   ", "go on"), ("ends in a line\n", " x"), ("東京", " 와 한국😀")]
    found = theirs.loglikelihood(requests_of("loglikelihood", pairs), disable_tqdm=True)
    assert [each[0] for each in found] == pytest.approx(
        [score_of_choice(model, tokenizer, *pair) for pair in pairs], abs=2e-4
    )
    context = tokenizer.encode("def main").tolist()
    for _ in range(12):
        context.append(int(model.logits(torch.tensor([context]))[0, -1].argmax()))
    (written,) = theirs.generate_until(requests_of("generate_until", [("def main", {"until": [], "max_gen_toks": 12})]))
    assert "def main" + written == tokenizer.decode_bytes(context).decode(errors="replace")


def test_the_command_gives_the_same_scores_from_two_ranks_as_from_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Loss and tasks together; three batches of windows for two ranks, and rank 0 alone prints."""
    write_documents(tmp_path / "data" / "a", {"train": [["tt"]], "val": [["hello world" * 20, "b"], ["some more"]]})
    model = model_with_opinions(block_size=BLOCK_SIZE)
    folder = save(tmp_path / "runs" / "r" / "checkpoints", model, ByteTokenizer(), dataset="a")
    tasks = write_tasks(tmp_path / "tasks", choose=MULTIPLE_CHOICE, read=ROLLING)
    shared = ("--data", "a", "--stride", "5", "--batch-size", "18", "--json", "--device", "cpu")
    chosen = ("--tasks", "choose,read", "--task-dir", "tasks", "--limit", "3")
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    result = run_program("eval", "--ckpt", "latest", *shared, *chosen, cwd=tmp_path, ranks=2, **environment)
    assert result.returncode == 0, result.stderr
    two = json.loads(result.stdout)
    one = evaluate(capsys, folder, "choose", "read", task_dir=tasks, limit=3, batch_size=18)
    assert two["tokens"] == 11 * 20 + 1 + 9 + 3 - 1 and two["loss"] > 0
    assert one["choose"]["documents"] == 3 and set(one) == {"choose", "read"}
    assert two["tasks"] == {name: pytest.approx(metrics, nan_ok=True) for name, metrics in one.items()}
    assert "\r" not in result.stderr and "2 rank(s)" in result.stderr
    assert result.stderr.count("with !function are run") == 1


@pytest.mark.parametrize("name", ["char", "word", "byte"])
def test_every_vocabulary_of_ours_is_opened(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = tokenizer_named(name)
    model = model_with_opinions(tokenizer.vocab_size, BLOCK_SIZE)
    folder = save(tmp_path / "run", model, tokenizer)
    tasks = write_tasks(tmp_path / "tasks", choose=MULTIPLE_CHOICE)
    (tasks / "questions.jsonl").write_text(json.dumps(QUESTIONS[0]) + "\n")
    scores = [score_of_choice(model, tokenizer, "The answer:", f" {choice}") for choice in QUESTIONS[0]["choices"]]  # type: ignore[attr-defined]
    found = evaluate(capsys, folder, "choose", task_dir=tasks)
    assert found["choose"]["acc"] == (max(range(3), key=scores.__getitem__) == QUESTIONS[0]["right"])


def test_a_well_known_task_on_a_local_copy_of_its_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its YAML file is included, with the functions that it names; the data alone lies elsewhere."""
    import lm_eval.tasks

    document = {"ind": 1, "activity_label": "Reading", "ctx_a": "A model reads a text.", "ctx_b": "it", "label": "2"}
    document |= {"endings": ["[title] sleeps.", "eats it.", "goes on.", "stops."]}
    (tmp_path / "hellaswag.jsonl").write_text((json.dumps(document) + "\n") * 3)
    original = Path(lm_eval.tasks.__file__).parent / "hellaswag" / "hellaswag.yaml"
    data_files = f"dataset_kwargs: {{data_files: {{validation: {tmp_path / 'hellaswag.jsonl'}}}}}"
    (tmp_path / "hellaswag.yaml").write_text(
        f"include: {original}\ndataset_path: json\n{data_files}\ntraining_split: null\n"
    )
    model = model_with_opinions(block_size=BLOCK_SIZE)
    folder = save(tmp_path / "run", model, ByteTokenizer())
    found = evaluate(capsys, folder, "hellaswag", task_dir=tmp_path, limit=2)["hellaswag"]
    endings = (" Reading sleeps.", " eats it.", " goes on.", " stops.")
    prompt = "Reading: A model reads a text. It"
    scores = [score_of_choice(model, ByteTokenizer(), prompt, f" {ending}") for ending in endings]
    assert found["documents"] == 2 and found["n_shot"] == 0
    assert found["acc"] == (max(range(4), key=scores.__getitem__) == 2)
    with pytest.raises(UserError, match=r"^unknown task 'helaswag': did you mean hellaswag.*\?$"):
        evaluate(capsys, folder, "helaswag", task_dir=tmp_path)


# ---- what runs, and what does not ----


def harm(tmp_path: Path) -> str:
    return f"open({str(tmp_path / 'it ran')!r}, 'w')\ndef text(document): return document['question']\n"


def test_a_function_of_the_task_folder_runs(
    checkpoint: tuple[Path, LanguageModel, Tokenizer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    question = 'doc_to_text: "{{question}}:"'
    task = MULTIPLE_CHOICE.replace(question, "doc_to_text: !function harm.text")
    folder = write_tasks(tmp_path / "tasks", choose=task, plain=MULTIPLE_CHOICE.replace("task: choose", "task: plain"))
    (folder / "harm.py").write_text(harm(tmp_path).replace("['question']", "['question'] + ':'"))
    found = evaluate(capsys, checkpoint[0], "choose", "plain", task_dir=folder)
    assert (tmp_path / "it ran").exists()
    assert found["choose"] == found["plain"]


@pytest.mark.parametrize(
    ("line", "change", "reason"),
    [
        ("dataset_path: json", "dataset_path: pandas", "pandas"),
        ("dataset_path: json", "dataset_path: script", ""),
        ("dataset_path: json", "dataset_path: someone/data", "someone/data"),
        ("output_type: multiple_choice", "output_type: multiple_choice\nunsafe_code: true", "marked as unsafe"),
        ("test: QUESTIONS", "test: nowhere.jsonl", "nowhere.jsonl"),
        ("doc_to_target: right", 'doc_to_target: "{{missing_field}}"', "missing_field"),
        ("max_gen_toks: 12", "max_gen_toks: 48", "48"),
    ],
)
def test_what_is_refused_costs_one_line_and_runs_nothing(
    checkpoint: tuple[Path, LanguageModel, Tokenizer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    line: str,
    change: str,
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "script").mkdir()
    (tmp_path / "script" / "script.py").write_text(harm(tmp_path))
    original = MULTIPLE_CHOICE if line in MULTIPLE_CHOICE else GENERATE.replace("task: write", "task: choose")
    folder = write_tasks(tmp_path / "tasks", task=original.replace(line, change))
    with pytest.raises(UserError, match=rf"cannot score choose \(.*{reason}") as caught:
        evaluate(capsys, checkpoint[0], "choose", task_dir=folder)
    assert "\n" not in str(caught.value) and not (tmp_path / "it ran").exists()


def test_a_metric_is_never_fetched_as_a_script(
    checkpoint: tuple[Path, LanguageModel, Tokenizer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "harm").mkdir()
    (tmp_path / "harm" / "harm.py").write_text(harm(tmp_path))
    folder = write_tasks(tmp_path / "tasks", write=GENERATE.replace("metric: exact_match", "metric: ./harm"))
    with pytest.raises(UserError, match=r"cannot score write \("):
        evaluate(capsys, checkpoint[0], "write", task_dir=folder)
    assert not (tmp_path / "it ran").exists()


def test_a_damaged_model_gets_no_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = model_with_opinions(block_size=BLOCK_SIZE)
    with torch.no_grad():
        model.transformer.wpe.weight[6] = torch.nan
    folder = save(tmp_path / "run", model, ByteTokenizer())
    with pytest.raises(UserError, match="has weights that are not finite, so it is damaged"):
        evaluate(capsys, folder, "choose", task_dir=write_tasks(tmp_path / "tasks", choose=MULTIPLE_CHOICE))


def test_a_checkpoint_with_model_code_runs_none_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save(tmp_path / "run", model_with_opinions(block_size=BLOCK_SIZE), ByteTokenizer())
    (folder / "harm.py").write_text(harm(tmp_path))
    remote = {"AutoConfig": "harm.Config", "AutoModelForCausalLM": "harm.Model"}
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "harm", "auto_map": remote}
    (folder / "config.json").write_text(json.dumps(config))
    description = read_description(folder)
    (folder / DESCRIPTION).unlink()
    write_description(folder, description)
    with pytest.raises(UserError, match=r"cannot score choose \(.*trust_remote_code"):
        evaluate(capsys, folder, "choose", task_dir=write_tasks(tmp_path / "tasks", choose=MULTIPLE_CHOICE))
    assert not (tmp_path / "it ran").exists()


def test_without_the_extra_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'gpt-pipeline\[eval\]'"):
        check_options(EvalOptions("latest", tasks=("hellaswag",)))
