"""EleutherAI's harness on our model: what it gets is what it gets from transformers on the same folder, and no data runs."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ALPHABET, prose, run_program, tokenizer_named, write_documents
from test_score import ALONE, model_with_opinions, save

from pipeline.checkpoint.folder import write_model
from pipeline.errors import UserError
from pipeline.machine.ranks import World
from pipeline.model.language_model import LanguageModel
from pipeline.vocabulary.char_byte_word import ByteTokenizer
from pipeline.vocabulary.tokenizer import Tokenizer
from score.loss import Scorer
from score.run import EvalOptions, check

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.slow  # the harness takes seconds to import

BLOCK_SIZE = 48
QUESTIONS = [
    {"question": "The answer", "choices": ["is yes", "no", "may well be something longer than that"], "right": 1},
    {"question": "A trailing space ", "choices": [" is kept", "not kept", "?"], "right": 0},
    {"question": "naïve café, 東京", "choices": ["와", "한국", "an emoji 😀"], "right": 2},
    {"question": "too long for the context " * 12, "choices": ["a", "b", "words and more words"], "right": 2},
]
MULTIPLE_CHOICE = """
task: choose
dataset_path: json
dataset_kwargs: {data_files: {test: QUESTIONS}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}:"
doc_to_choice: "{{choices}}"
doc_to_target: right
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
GENERATE = """
task: write
dataset_path: json
dataset_kwargs: {data_files: {test: QUESTIONS}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "x"
generation_kwargs: {until: ["e", "ing"], max_gen_toks: 12}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
ROLLING = """
task: read
dataset_path: json
dataset_kwargs: {data_files: {test: QUESTIONS}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
"""


def write_tasks(folder: Path, **tasks: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    questions = folder / "questions.jsonl"
    questions.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    for name, content in tasks.items():
        (folder / f"{name}.yaml").write_text(content.replace("QUESTIONS", str(questions)))
    return folder


@pytest.fixture(autouse=True)
def _no_network_and_a_cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def harness_model(model: LanguageModel, tokenizer: Tokenizer) -> Any:
    from score.harness import HarnessModel

    return HarnessModel(Scorer(model, torch.float32, 3, ALONE), tokenizer)


def requests_of(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The harness's own model for transformers, and ours, of one folder with a byte-pair vocabulary."""
    from lm_eval.models.huggingface import HFLM

    tokenizer = tokenizer_named("bpe:512")
    model = model_with_opinions(tokenizer.vocab_size, BLOCK_SIZE)
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, model, tokenizer)
    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=2), harness_model(model, tokenizer)


def assert_same_answers(theirs: Any, ours: Any, requests: list[Any]) -> None:
    """Log-probabilities to float32's rounding, and whether greedy decoding would say the same."""
    wanted, found = theirs.loglikelihood(requests), ours.loglikelihood(requests)
    assert [each[0] for each in found] == pytest.approx([each[0] for each in wanted], abs=2e-4)
    assert [each[1] for each in found] == [each[1] for each in wanted]


def test_log_probabilities_are_those_of_transformers(both: tuple[Any, Any]) -> None:
    theirs, ours = both
    text = prose()[0]
    pairs = [
        (text[at : at + length], text[at + length : at + length + 9]) for at in (0, 50) for length in (0, 1, 30, 400)
    ]
    pairs += [("ends in spaces   ", "go on"), ("ends in a line\n", " x"), ("", "from nothing"), ("東京", " 와 한국😀")]
    assert_same_answers(theirs, ours, requests_of("loglikelihood", pairs))
    context = ours.tok_encode("class A")
    likeliest = int(ours.scorer.model.logits(torch.tensor([context]))[:, -1].argmax())
    tokens = [(("", ""), context, [likeliest]), (("", ""), context, [likeliest - 1])]
    assert [greedy for _, greedy in theirs._loglikelihood_tokens(tokens)] == [True, False]
    assert [greedy for _, greedy in ours._loglikelihood_tokens(tokens)] == [True, False]


def test_whole_texts_have_the_log_probability_that_transformers_gives(both: tuple[Any, Any]) -> None:
    theirs, ours = both
    requests = requests_of("loglikelihood_rolling", [(text,) for text in ("", "short", prose()[0][:900], ALPHABET)])
    wanted = theirs.loglikelihood_rolling(requests)
    assert ours.loglikelihood_rolling(requests) == pytest.approx(wanted, rel=1e-5)
    assert wanted[0] == 0 > wanted[1] > wanted[2]


def test_texts_are_those_that_transformers_generates(both: tuple[Any, Any]) -> None:
    theirs, ours = both
    contexts = ["def ", "def main", "class A", "import ", prose()[0][:500], "東京", "x", "return value"]
    options = [{"until": ["e", "\n\n"], "max_gen_toks": 20}, {"until": "the", "max_gen_toks": 9}, {"until": []}]
    options[2]["max_new_tokens"] = 16
    requests = requests_of("generate_until", [(context, each) for each in options for context in contexts])
    found = ours.generate_until(requests)
    assert found == theirs.generate_until(requests)
    assert len(set(found)) > 10 and all("e" not in text for text in found[: len(contexts)])


def test_a_local_task_gets_equal_log_probabilities_request_by_request(both: tuple[Any, Any], tmp_path: Path) -> None:
    from lm_eval.evaluator import evaluate

    from score.tasks import load_tasks, run_tasks

    theirs, ours = both
    folder = write_tasks(tmp_path / "tasks", choose=MULTIPLE_CHOICE, read=ROLLING, write=GENERATE)
    loaded = load_tasks(("choose", "read", "write"), folder)
    found = run_tasks(ours, loaded, limit=None)
    wanted = evaluate(theirs, load_tasks(("choose", "read", "write"), folder), bootstrap_iters=0)["results"]
    for task, metric in (
        ("choose", "acc"),
        ("choose", "acc_norm"),
        ("read", "bits_per_byte"),
        ("write", "exact_match"),
    ):
        assert found[task][metric] == pytest.approx(wanted[task][f"{metric},none"], rel=1e-5), (task, metric)
    assert found["choose"]["documents"] == len(QUESTIONS) and found["choose"]["acc_stderr"] > 0
    instances = loaded["tasks"]["choose"].instances
    assert len(instances) == 3 * len(QUESTIONS)
    assert_same_answers(theirs, ours, instances)


def test_the_command_scores_a_local_task_and_two_ranks_give_the_result_of_one(tmp_path: Path) -> None:
    """Loss and tasks at once; three batches of windows for two ranks, and rank 0 alone prints."""
    write_documents(tmp_path / "data" / "a", {"train": [["tt"]], "val": [["hello world" * 20, "b"], ["some more"]]})
    model = model_with_opinions(block_size=BLOCK_SIZE)
    save(tmp_path / "runs" / "r" / "checkpoints", model, ByteTokenizer(), dataset="a")
    write_tasks(tmp_path / "tasks", choose=MULTIPLE_CHOICE, read=ROLLING)
    arguments = (
        "eval",
        "--ckpt",
        "latest",
        "--data",
        "a",
        "--stride",
        "5",
        "--batch-size",
        "18",
        "--json",
        "--device",
        "cpu",
    )
    tasks = ("--tasks", "choose,read", "--task-dir", "tasks", "--limit", "3")
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    found = [run_program(*arguments, *tasks, cwd=tmp_path, ranks=ranks, **environment) for ranks in (1, 2)]
    assert [result.returncode for result in found] == [0, 0], found
    one, two = (json.loads(result.stdout) for result in found)
    assert two.pop("loss") == pytest.approx(one.pop("loss"), rel=1e-12)
    assert two["tokens"] == one["tokens"] == 11 * 20 + 1 + 9 + 3 - 1
    assert one["tasks"]["choose"]["documents"] == 3 and set(one["tasks"]) == {"choose", "read"}
    for task, metrics in one["tasks"].items():
        assert two["tasks"][task] == pytest.approx(metrics, nan_ok=True), task
    assert all("\r" not in result.stderr for result in found)
    assert "2 rank(s)" in found[1].stderr


# ---- what is refused ----


def load(names: tuple[str, ...], folder: Path) -> Any:
    from score.tasks import load_tasks

    return load_tasks(names, folder)


FUNCTION = "doc_to_text: !function harm.text"
ESCAPE = """doc_to_text: "{{ ''.__class__.__mro__[1].__subclasses__() }}" """


@pytest.mark.parametrize(
    ("line", "change", "said"),
    [
        (
            'doc_to_text: "{{question}}:"',
            FUNCTION,
            "task.yaml could not determine a constructor for the tag '!function'",
        ),
        ('doc_to_text: "{{question}}:"', "doc_to_text: !!python/name:os.system", "task.yaml .*python/name:os.system"),
        ("dataset_path: json", "dataset_path: pandas", "reads dataset_path 'pandas': a task of --task-dir reads csv"),
        ("dataset_path: json", "dataset_path: someone/data", "reads dataset_path 'someone/data'"),
        ('doc_to_text: "{{question}}:"', ESCAPE, "task choose cannot be had .*SecurityError"),
        ("metric: acc,", "metric: ./harm,", "task choose has the metric ./harm, which is not in the harness"),
        ("output_type: multiple_choice", "output_type: multiple_choice\nunsafe_code: true", "choose runs code that"),
        ("test: QUESTIONS", "test: reference::/a.json", "data_files .*reference::.* reads local files only"),
        ("test: QUESTIONS", "test: nowhere.jsonl", "task choose cannot be had .*nowhere.jsonl"),
        ("doc_to_target: right", 'doc_to_target: "{{missing_field}}"', "task choose cannot be had .*missing_field"),
        ("task: choose", "task: [", "task.yaml cannot be read as YAML"),
    ],
)
def test_a_folder_of_tasks_runs_no_code_and_a_mistake_in_it_costs_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, change: str, said: str
) -> None:
    """`harm.py` lies where each of these would find it."""
    monkeypatch.chdir(tmp_path)
    folder = write_tasks(tmp_path / "tasks", task=MULTIPLE_CHOICE.replace(line, change))
    plant_harm(tmp_path, folder, tmp_path, tmp_path / "harm")
    with pytest.raises(UserError, match=said):
        load(("choose",), folder)
    assert not (tmp_path / "it ran").exists()


def plant_harm(tmp_path: Path, *places: Path) -> None:
    for place in places:
        place.mkdir(exist_ok=True)
        (place / "harm.py").write_text(f"open({str(tmp_path / 'it ran')!r}, 'w')\ndef text(document): return 'x'\n")


def test_what_a_task_includes_is_held_to_the_same(tmp_path: Path) -> None:
    folder = write_tasks(tmp_path / "tasks", task=f"include: ../shared_yaml\n{MULTIPLE_CHOICE}")
    plant_harm(tmp_path, tmp_path, folder)
    (tmp_path / "shared_yaml").write_text(FUNCTION)
    with pytest.raises(UserError, match="shared_yaml could not determine a constructor for the tag '!function'"):
        load(("choose",), folder)
    (tmp_path / "shared_yaml").write_text("description: 'Choose.'")
    assert load(("choose",), folder)["tasks"]["choose"].config.description == "Choose."
    assert not (tmp_path / "it ran").exists()


def test_a_well_known_task_on_a_local_copy_of_its_data(tmp_path: Path) -> None:
    """Its own YAML file included, and the functions that come with it; only the data is told to be elsewhere."""
    import lm_eval.tasks

    from score.tasks import run_tasks

    document = {"ind": 1, "activity_label": "Reading", "ctx_a": "A model reads a text.", "ctx_b": "it", "label": "2"}
    document |= {"endings": ["[title] sleeps.", "eats it.", "goes on.", "stops."]}
    (tmp_path / "hellaswag.jsonl").write_text((json.dumps(document) + "\n") * 3)
    its_own = Path(lm_eval.tasks.__file__).parent / "hellaswag" / "hellaswag.yaml"
    data_files = f"dataset_kwargs: {{data_files: {{validation: {tmp_path / 'hellaswag.jsonl'}}}}}"
    (tmp_path / "hellaswag.yaml").write_text(
        f"include: {its_own}\ndataset_path: json\n{data_files}\ntraining_split: null\n"
    )
    loaded = load(("hellaswag",), tmp_path)
    model = model_with_opinions(block_size=64)
    marks = run_tasks(harness_model(model, ByteTokenizer()), loaded, limit=2)["hellaswag"]
    assert marks["documents"] == 2 and marks["acc"] in (0, 1) and marks["n_shot"] == 0
    request = loaded["tasks"]["hellaswag"].instances[0]
    assert request.args == ("Reading: A model reads a text. It", "  sleeps.")
    with pytest.raises(UserError, match=r"no task 'helaswag': did you mean hellaswag"):
        load(("helaswag",), tmp_path)


def asks(kind: str, *arguments: Any) -> None:
    model = harness_model(model_with_opinions(block_size=BLOCK_SIZE), ByteTokenizer())
    getattr(model, kind)(requests_of(kind, [arguments]))


@pytest.mark.parametrize(
    ("kind", "arguments", "said"),
    [
        ("loglikelihood", ("a", "b" * 49), "which has 49 tokens of its own: wanted 1 to 48"),
        ("loglikelihood", ("a", ""), "which has 0 tokens of its own"),
        ("generate_until", ("a", {"until": [], "max_gen_toks": 48}), "48 new tokens, the model's block_size is 48"),
        ("generate_until", ("a", {"until": [], "do_sample": True, "temperature": 1.0}), "at random"),
    ],
)
def test_what_a_model_cannot_do_is_refused_and_never_guessed(kind: str, arguments: tuple[Any, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        asks(kind, *arguments)


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("loglikelihood", ("a", "b" * 9)),
        ("loglikelihood_rolling", ("b" * 9,)),
        ("generate_until", ("a", {"until": [], "max_gen_toks": 20})),
    ],
)
def test_a_damaged_model_gets_no_marks_and_every_rank_hears_of_it(kind: str, arguments: tuple[Any, ...]) -> None:
    from score.harness import HarnessModel

    heard: list[Any] = []

    class First(World):
        def gather(self, value: Any) -> list[Any]:
            heard.append(value)
            return [value, ""]

    model = model_with_opinions(block_size=BLOCK_SIZE)
    with torch.no_grad():
        model.transformer.wpe.weight[6] = torch.nan
    world = First(rank=0, size=2, local_size=2, device=torch.device("cpu"))
    harness = HarnessModel(Scorer(model, torch.float32, 3, world), ByteTokenizer())
    with pytest.raises(UserError, match="logits are not finite"):
        getattr(harness, kind)(requests_of(kind, [arguments]))
    (said,) = heard
    assert "logits are not finite" in said


def test_what_another_rank_could_not_do_is_an_error_here_too() -> None:
    from score.harness import HarnessModel

    class Other(World):
        def gather(self, value: Any) -> list[Any]:
            return [value, "rank 1 found damage"]

    world = Other(rank=0, size=2, local_size=2, device=torch.device("cpu"))
    model = HarnessModel(Scorer(model_with_opinions(), torch.float32, 2, world), ByteTokenizer())
    with pytest.raises(UserError, match="rank 1 found damage"):
        model._share([[0], [1]], lambda batch: batch)


class Second(World):
    """The second of two ranks; the first one's answers are left out."""

    def gather(self, value: Any) -> list[Any]:
        return [{}, value]


def test_a_rank_works_out_its_own_batches_only() -> None:
    from score.harness import HarnessModel

    world = Second(rank=1, size=2, local_size=2, device=torch.device("cpu"))
    model = HarnessModel(Scorer(model_with_opinions(), torch.float32, 2, world), ByteTokenizer())
    assert model._share([[0, 4], [3, 1], [2], [5]], lambda batch: [-number for number in batch]) == [-1, -3, -5]


def test_answers_come_in_the_order_of_the_requests_whatever_their_lengths() -> None:
    pairs = [(f"context {number}", "x" * (number % 7 + 1)) for number in range(11)]
    model = model_with_opinions(block_size=BLOCK_SIZE)
    one = harness_model(model, ByteTokenizer()).loglikelihood(requests_of("loglikelihood", pairs))
    alone = [
        harness_model(model, ByteTokenizer()).loglikelihood(requests_of("loglikelihood", [pair]))[0] for pair in pairs
    ]
    assert [each[0] for each in one] == pytest.approx([each[0] for each in alone], abs=1e-4)
    assert len({each[0] for each in one}) == len(pairs)


def test_without_the_extra_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'gpt-pipeline\[eval\]'"):
        check(EvalOptions("latest", tasks=("hellaswag",)))
