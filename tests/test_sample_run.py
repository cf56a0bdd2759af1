"""`pipeline sample` as its user meets it: real checkpoints, real processes, and every refusal."""

import json
from pathlib import Path

import pytest
import torch
from conftest import run_program, tiny_config, write_dataset

from pipeline.errors import UserError
from pipeline.tokenizer import ByteTokenizer
from sample import run as sample
from sample.run import SampleOptions
from train.run import run as train


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs/run in it, trained for ten steps on the bytes A to r."""
    folder = tmp_path_factory.mktemp("trained")
    write_dataset(folder / "data" / "tiny")
    train(tiny_config(folder))
    return folder


@pytest.fixture
def inside(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(trained)
    return trained


@pytest.mark.slow
def test_text_goes_to_stdout_and_talk_to_stderr(trained: Path) -> None:
    options = ("--prompt", "ABC", "--seed", "1", "--max-new-tokens", "30")
    result = run_program("sample", "--ckpt", "latest", *options, cwd=trained)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("ABC") and len(result.stdout) > 20
    assert "step_00000010" in result.stderr and "seed 1" in result.stderr
    assert run_program("sample", "--ckpt", "best", *options, cwd=trained).stdout == result.stdout


def test_json_is_one_object_a_sample_whose_ids_decode_to_its_text(
    inside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample.run(SampleOptions("latest", ["A", "BC"], num_samples=3, max_new_tokens=12, seed=3, json=True))
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in rows] == ["A"] * 3 + ["BC"] * 3
    for row in rows:
        assert ByteTokenizer().decode_bytes(row["token_ids"]).decode(errors="replace") == row["text"]
        assert len(row["token_ids"]) <= 12


def test_a_seed_repeats_the_text_and_no_seed_does_not(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in (1, 1, 2, None, None):
        sample.run(SampleOptions("latest", ["A"], max_new_tokens=40, seed=seed))
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert len(set(texts)) == 4


def test_prompts_come_from_a_file_too_and_samples_are_set_apart(
    inside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (inside / "prompt.txt").write_text("from a file ")
    sample.run(
        SampleOptions("latest", ["A"], prompt_file=inside / "prompt.txt", num_samples=2, max_new_tokens=5, seed=1)
    )
    out = capsys.readouterr().out
    assert out.count("from a file ") == 2 and out.count("\n---------------\n") == 3


def test_end_of_text_ends_a_sample_and_is_not_shown(
    inside: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sample, "generate", lambda *_: iter([[72], [105], [256], [33]]))
    sample.run(SampleOptions("latest", ["A"], seed=1))
    assert capsys.readouterr().out == "AHi\n"


def test_a_character_is_never_shown_half(inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    ids = [[byte] for byte in "é東🙂".encode()] + [[0xF0]]  # and one cut off by the end
    monkeypatch.setattr(sample, "generate", lambda *_: iter(ids))
    monkeypatch.setattr("sys.stdout.write", shown.append)
    sample.run(SampleOptions("latest", ["A"], seed=1))
    assert [piece for piece in shown if piece] == ["A", "é", "東", "🙂", "\N{REPLACEMENT CHARACTER}\n"]


def test_a_foreign_hugging_face_folder_is_sampled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=32)
    twin = transformers.GPT2LMHeadModel(config).eval()
    twin.save_pretrained(tmp_path)
    sample.run(
        SampleOptions(str(tmp_path), ["Hello world"], max_new_tokens=8, temperature=0, dtype="float32", json=True)
    )
    found = json.loads(capsys.readouterr().out)["token_ids"]
    inputs = torch.tensor([[15496, 995]])
    wanted = twin.generate(
        inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=8, do_sample=False, pad_token_id=0
    )
    assert found == wanted[0, 2:].tolist()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (SampleOptions("latest", [""]), "the prompt has no tokens"),
        (SampleOptions("nowhere"), "no checkpoint at nowhere"),
        (SampleOptions("latest", ["a"], prompt_file=Path("missing.txt")), "--prompt-file missing.txt cannot be read"),
        (SampleOptions("latest", num_samples=0), "--num-samples 0 is out of range: wanted 1 or more"),
        (SampleOptions("latest", max_new_tokens=0), "--max-new-tokens 0"),
        (SampleOptions("latest", temperature=-1.0), "--temperature -1.0"),
        (SampleOptions("latest", temperature=float("nan")), "--temperature nan"),
        (SampleOptions("latest", top_k=-1), "--top-k -1"),
        (SampleOptions("latest", top_p=0.0), "--top-p 0.0"),
        (SampleOptions("latest", dtype="int8"), "--dtype 'int8' is not one of auto, float32"),
        (SampleOptions("latest", device="tpu"), "unknown device 'tpu'"),
        (SampleOptions("latest", dtype="float16", device="cpu"), "float16 works on CUDA only"),
    ],
)
def test_bad_input_is_one_line(inside: Path, options: SampleOptions, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        sample.run(options)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA GPU")
def test_cuda_where_there_is_none_is_one_line(inside: Path) -> None:
    result = run_program("sample", "--ckpt", "latest", "--device", "cuda", cwd=inside)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and "sees no CUDA GPU" in result.stderr
    result = run_program("train", "quickstart", "run.device=cuda", cwd=inside)
    assert result.returncode == 2 and "sees no CUDA GPU" in result.stderr
