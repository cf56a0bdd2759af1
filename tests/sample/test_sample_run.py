"""`pipeline sample` as its user meets it: real checkpoints, real processes, and every refusal."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, run_program

from pipeline import log
from pipeline.cli import main as cli
from pipeline.config.load import load_config
from pipeline.errors import UserError
from pipeline.vocabulary.char_byte_word import ByteTokenizer
from sample import run as sample
from sample.generate import Tokens
from sample.options import SampleOptions
from train.run import run as train


@pytest.mark.slow
def test_text_goes_to_stdout_and_the_log_to_stderr(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--prompt", "ABC", "--seed", "1", "--max-new-tokens", "30")
    result = run_program("sample", "--ckpt", "runs/run", *options, cwd=inside)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("ABC") and len(result.stdout) > 20
    assert "step_00000010" in result.stderr and "seed 1" in result.stderr
    assert written(SampleOptions(ckpt="best", prompts=["ABC"], seed=1, max_new_tokens=30), capsys) == result.stdout


@pytest.mark.slow
def test_a_pipe_carries_utf8_both_ways_whatever_the_locale(trained: Path) -> None:
    lines = "\ufeff東京\nnaïve\n".encode()
    command = [sys.executable, "-m", "pipeline", "sample", "--ckpt", "latest", "--max-new-tokens", "3", "--seed", "1"]
    variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "latin-1"}
    result = subprocess.run(
        [*command, "--interactive"], input=lines, cwd=trained, env=variables, capture_output=True, check=False
    )
    assert result.returncode == 0, result.stderr
    first, second = result.stdout.decode().split(sample.SEPARATOR)
    assert first.startswith("東京") and second.startswith("naïve")


@pytest.mark.parametrize(("at_terminal", "wanted"), [(True, b"na\xefve \\u6771"), (False, "naïve 東".encode())])
def test_a_terminal_without_a_sign_for_a_character_shows_it_escaped(
    monkeypatch: pytest.MonkeyPatch, at_terminal: bool, wanted: bytes
) -> None:
    out = io.TextIOWrapper(io.BytesIO(), "latin-1")
    monkeypatch.setattr(out, "isatty", lambda: at_terminal)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "argv", ["pipeline", "sample", "--ckpt", "latest"])
    monkeypatch.setattr(log, "configure", lambda: None)
    monkeypatch.setattr(sample, "run", lambda _: out.write("naïve 東"))
    cli.main()
    out.flush()
    assert out.buffer.getvalue() == wanted  # type: ignore[attr-defined]


def written(options: SampleOptions, capsys: pytest.CaptureFixture[str]) -> str:
    sample.run(options)
    return capsys.readouterr().out


def objects(options: SampleOptions, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in written(options, capsys).splitlines()]


def dictate(monkeypatch: pytest.MonkeyPatch, *steps: list[int]) -> None:
    """Let the model of every later run say these tokens, one of each list a sample."""

    def said(*_: object, **__: object) -> Iterator[Tokens]:
        return (Tokens(ids, [-1.0] * len(ids)) for ids in steps)

    monkeypatch.setattr(sample, "generate", said)


def test_every_option_reaches_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    line = (
        "sample --ckpt best --prompt a --prompt b --prompt-file - --prompt-file f --interactive --num-samples 2 "
        "--max-new-tokens 3 --temperature 0.5 --top-k 4 --top-p 0.6 --min-p 0.7 --repetition-penalty 1.8 --stop c --stop d "
        "--seed 9 --device cpu --dtype float32 --json --run-dir r"
    )
    found: list[SampleOptions] = []
    monkeypatch.setattr(sample, "run", found.append)
    monkeypatch.setattr(sys, "argv", ["pipeline", *line.split()])
    monkeypatch.setattr(log, "configure", lambda: None)
    cli.main()
    wanted = SampleOptions(
        ckpt="best", prompts=["a", "b"], prompt_files=[Path("-"), Path("f")], interactive=True, num_samples=2,
        max_new_tokens=3, temperature=0.5, top_k=4, top_p=0.6, min_p=0.7, repetition_penalty=1.8, stop=["c", "d"],
        seed=9, device="cpu", dtype="float32", json=True, run_dir=Path("r"),
    )  # fmt: skip
    assert found == [wanted]


def test_json_is_one_object_a_sample_whose_ids_decode_to_its_text(
    inside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = objects(
        SampleOptions(ckpt="latest", prompts=["A", "BC"], num_samples=3, max_new_tokens=12, seed=3, json=True), capsys
    )
    assert [row["prompt"] for row in rows] == ["A"] * 3 + ["BC"] * 3
    for row in rows:
        assert row.keys() == {"prompt", "text", "token_ids", "log_probabilities", "finish_reason"}
        assert ByteTokenizer().decode_bytes(row["token_ids"]).decode(errors="replace") == row["text"]
        assert len(row["token_ids"]) == len(row["log_probabilities"]) <= 12
        assert all(number < 0 for number in row["log_probabilities"])
        assert row["finish_reason"] == ("length" if len(row["token_ids"]) == 12 else "end_of_text")


def test_a_seed_repeats_the_text_and_no_seed_does_not(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [
        written(SampleOptions(ckpt="latest", prompts=["A"], max_new_tokens=40, seed=seed), capsys)
        for seed in (1, 1, 2, None, None)
    ]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 4


def test_a_text_follows_from_its_seed_prompt_and_number_alone(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    together = objects(
        SampleOptions(ckpt="latest", prompts=["B", "A"], num_samples=4, max_new_tokens=20, seed=1, json=True), capsys
    )
    alone = objects(
        SampleOptions(ckpt="latest", prompts=["A"], num_samples=2, max_new_tokens=20, seed=1, json=True), capsys
    )
    assert [row["token_ids"] for row in alone] == [row["token_ids"] for row in together[4:6]]


def test_prompts_come_from_files_and_stdin_too_and_samples_are_set_apart(
    inside: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (inside / "prompt.txt").write_text("from a file ")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("from stdin é\n".encode())))
    files = [inside / "prompt.txt", Path("-")]
    out = written(
        SampleOptions(ckpt="latest", prompts=["A"], prompt_files=files, num_samples=2, max_new_tokens=5, seed=1), capsys
    )
    assert out.startswith("A")
    assert out.count("from a file ") == 2 and out.count("from stdin é\n") == 2
    assert out.count("\n---------------\n") == 5


@pytest.mark.parametrize("json_wanted", [False, True])
def test_a_stop_string_ends_a_sample_and_is_not_shown(
    inside: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], json_wanted: bool
) -> None:
    dictate(monkeypatch, *([byte] for byte in b"one, two. three"))
    out = written(SampleOptions(ckpt="latest", prompts=["A"], stop=["two", ". t"], seed=1, json=json_wanted), capsys)
    if not json_wanted:
        assert out == "Aone, \n"
        return
    row = json.loads(out)
    assert (row["text"], row["finish_reason"]) == ("one, ", "stop")
    assert row["token_ids"] == list(b"one, two") and len(row["log_probabilities"]) == 8


def test_samples_that_end_do_not_spoil_the_others(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = SampleOptions(ckpt="latest", prompts=["A"], num_samples=6, max_new_tokens=30, seed=3, json=True)
    free = objects(options, capsys)
    options = replace(options, stop=[free[0]["text"][9:12], free[1]["text"][19:22]])
    rows = objects(options, capsys)
    assert {row["finish_reason"] for row in rows} == {"stop", "length"}
    for row, without in zip(rows, free, strict=True):
        assert without["text"].startswith(row["text"])
        assert not any(stop in row["text"] for stop in options.stop)
        assert row["finish_reason"] == ("stop" if any(stop in without["text"] for stop in options.stop) else "length")


def test_nothing_is_generated_once_every_sample_has_ended(
    inside: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*_: object, **__: object) -> Iterator[Tokens]:
        for ids in ([72, 256], [256, 33]):
            yield Tokens(ids, [-1.0, -1.0])
        pytest.fail("a third token was asked for")

    monkeypatch.setattr(sample, "generate", said)
    rows = objects(SampleOptions(ckpt="latest", num_samples=2, max_new_tokens=10**9, seed=1, json=True), capsys)
    assert [(row["text"], row["finish_reason"]) for row in rows] == [("H", "end_of_text"), ("", "end_of_text")]


def test_end_of_text_ends_a_sample_and_is_not_shown(
    inside: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dictate(monkeypatch, [72], [105], [256], [33])
    assert written(SampleOptions(ckpt="latest", prompts=["A"], seed=1), capsys) == "AHi\n"


def test_a_character_is_never_shown_half(inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    dictate(monkeypatch, *([byte] for byte in "é東🙂".encode()), [0xF0])  # and one cut off by the end
    monkeypatch.setattr("sys.stdout.write", shown.append)
    sample.run(SampleOptions(ckpt="latest", prompts=["A"], seed=1))
    assert [piece for piece in shown if piece] == ["A", "é", "東", "🙂", "\N{REPLACEMENT CHARACTER}", "\n"]


@pytest.mark.parametrize("at_terminal", [False, True])
def test_what_a_model_writes_commands_no_terminal_and_a_pipe_gets_it_exactly(
    inside: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], at_terminal: bool
) -> None:
    text = "\x1b[2J\x07\r\x9b1m\ta\u00a0b\u202e\n"
    dictate(monkeypatch, *([byte] for byte in text.encode()))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: at_terminal)
    out = written(SampleOptions(ckpt="latest", prompts=["\x1bc"], seed=1), capsys)
    assert out == ("\\x1bc\\x1b[2J\\x07\\r\\x9b1m\ta\u00a0b\\u202e\n\n" if at_terminal else f"\x1bc{text}\n")


@pytest.mark.slow
def test_a_prompt_with_an_end_of_text_written_out_is_noted(inside: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "pipeline"):
        sample.run(SampleOptions(ckpt="latest", prompts=["<|endoftext|>"], max_new_tokens=2, seed=1))
        assert "note: <|endoftext|> in a prompt is ordinary text" in caplog.text
        caplog.clear()
        sample.run(SampleOptions(ckpt="latest", prompts=["A"], max_new_tokens=2, seed=1))
        assert "ordinary text" not in caplog.text


def test_a_text_longer_than_the_context_is_noted_once(inside: Path, caplog: pytest.LogCaptureFixture) -> None:
    told = "a text of 41 tokens is longer than the model's context of 16"
    with caplog.at_level("INFO", "pipeline"):
        sample.run(SampleOptions(ckpt="latest", prompts=["A", "B"], max_new_tokens=40, seed=1, num_samples=2, top_k=1))
        assert caplog.text.count(told) == 1
        caplog.clear()
        sample.run(SampleOptions(ckpt="latest", prompts=["A"], max_new_tokens=16, seed=1, top_k=1))
        assert "longer than" not in caplog.text, "the last token was drawn with all others in sight"
        sample.run(SampleOptions(ckpt="latest", prompts=["A"], max_new_tokens=17, seed=1, top_k=1))
        assert "a text of 18 tokens is longer than the model's context of 16" in caplog.text


def test_a_foreign_hugging_face_folder_is_sampled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=32)
    twin = transformers.GPT2LMHeadModel(config).eval()
    twin.save_pretrained(tmp_path)
    sample.run(
        SampleOptions(
            ckpt=str(tmp_path), prompts=["Hello world"], max_new_tokens=8, temperature=0, dtype="float32", json=True
        )
    )
    found = json.loads(capsys.readouterr().out)["token_ids"]
    inputs = torch.tensor([[15496, 995]])
    wanted = twin.generate(
        inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=8, do_sample=False, pad_token_id=0
    )
    assert found == wanted[0, 2:].tolist()


def test_log_probabilities_equal_transformers_of_the_same_folder(
    inside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers")
    options = SampleOptions(
        ckpt="latest", prompts=["ABC"], num_samples=3, max_new_tokens=12, temperature=0.7, top_k=5, repetition_penalty=1.3,
        seed=1, json=True, dtype="float32",
    )  # fmt: skip
    twin = transformers.AutoModelForCausalLM.from_pretrained(inside / "runs/run/checkpoints/step_00000010").eval()
    for row in objects(options, capsys):
        ids = torch.tensor([[*b"ABC", *row["token_ids"]]])
        own = twin(ids).logits.log_softmax(dim=-1)[0, 2:-1].gather(1, ids[0, 3:, None])
        torch.testing.assert_close(torch.tensor(row["log_probabilities"]), own[:, 0], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (SampleOptions(ckpt="latest", prompts=[""]), "the prompt has no tokens"),
        (SampleOptions(ckpt="nowhere"), "no checkpoint at nowhere"),
        (
            SampleOptions(ckpt="latest", prompts=["a"], prompt_files=[Path("missing.txt")]),
            "--prompt-file missing.txt cannot be read",
        ),
        (SampleOptions(ckpt="latest", num_samples=0), "invalid --num-samples 0: expected 1 or more"),
        (SampleOptions(ckpt="latest", max_new_tokens=0), "--max-new-tokens 0"),
        (SampleOptions(ckpt="latest", temperature=-1.0), "--temperature -1.0"),
        (SampleOptions(ckpt="latest", temperature=float("nan")), "--temperature nan"),
        (SampleOptions(ckpt="latest", top_k=-1), "--top-k -1"),
        (SampleOptions(ckpt="latest", top_p=0.0), "--top-p 0.0"),
        (
            SampleOptions(ckpt="latest", temperature=1e-30),
            "--temperature 1e-30: expected 0 .the likeliest token., or at least 0.001",
        ),
        (SampleOptions(ckpt="latest", min_p=1.5), "--min-p 1.5: expected 0 .off. to 1"),
        (
            SampleOptions(ckpt="latest", repetition_penalty=1e-40),
            "--repetition-penalty 1e-40: expected 0.01 to 100; 1 is off",
        ),
        (SampleOptions(ckpt="latest", repetition_penalty=101.0), "--repetition-penalty 101.0"),
        (SampleOptions(ckpt="latest", repetition_penalty=float("nan")), "--repetition-penalty nan"),
        (SampleOptions(ckpt="latest", seed=-1), "--seed -1"),
        (SampleOptions(ckpt="latest", stop=["a", ""]), "invalid --stop '': expected some text"),
        (
            SampleOptions(ckpt="latest", top_k=-1, min_p=-1.0, dtype="x"),
            "--top-k -1: .*; invalid --min-p -1.0: .*; invalid --dtype 'x': expected",
        ),
        (
            SampleOptions(ckpt="latest", prompts=["a"], interactive=True),
            "--interactive reads prompts line by line .*: remove --prompt",
        ),
        (
            SampleOptions(ckpt="latest", prompt_files=[Path("-")], json=True, interactive=True),
            "remove --prompt-file and --json",
        ),
        (SampleOptions(ckpt="latest", dtype="int8"), "--dtype 'int8': expected auto, float32"),
        (SampleOptions(ckpt="latest", device="tpu"), "unknown device 'tpu'"),
        (SampleOptions(ckpt="latest", dtype="float16", device="cpu"), "float16 works on CUDA only"),
    ],
)
def test_bad_input_is_one_line(inside: Path, options: SampleOptions, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        sample.run(options)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA GPU")
def test_cuda_where_there_is_none_is_one_line(inside: Path) -> None:
    with pytest.raises(UserError, match="sees no CUDA GPU"):
        sample.run(SampleOptions(ckpt="latest", device="cuda"))
    with pytest.raises(UserError, match="sees no CUDA GPU"):
        train(load_config("quickstart", ["run.device=cuda"]))
