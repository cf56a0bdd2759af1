"""The exported GGUF in llama.cpp itself: a prebuilt one, which npm's node-llama-cpp brings along."""

import json
import math
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import prose, tokenizer_named

from export.gguf import write
from pipeline.config.keys import Config, ModelConfig
from pipeline.model.decoder import Decoder
from pipeline.model.language_model import LanguageModel
from sample.choice import Choice
from sample.generate import generate
from train.optimizer.groups import build_optimizer

PACKAGES = ("node-llama-cpp@3.22.1", "@node-llama-cpp/linux-x64@3.22.1")
SCRIPT = """
import {getLlama} from "node-llama-cpp";
const {path, prompt, count} = JSON.parse(process.argv[2]);
const llama = await getLlama({gpu: false, build: "never", logLevel: "error", maxThreads: 1});
const model = await llama.loadModel({modelPath: path});
// Both are float16 by default, which chooses otherwise where two tokens are 1e-4 apart.
const exact = {flashAttention: false, experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32"};
const sequence = (await model.createContext({contextSize: 64, threads: 1, ...exact})).getSequence();
const ids = [];
for await (const token of sequence.evaluate(prompt, {temperature: 0, yieldEogToken: true})) {
    ids.push(token);
    if (ids.length == count) break;
}
console.log(JSON.stringify(ids));
process.exit(0);
"""


@pytest.fixture(scope="session")
def llama_cpp() -> Path:
    """The program SCRIPT next to its packages, which are installed once a machine."""
    if not (npm := shutil.which("npm")):
        pytest.skip("npm is not installed")
    folder = Path(tempfile.gettempdir()) / f"node-llama-cpp-{os.getuid()}"
    script = folder / "continue.mjs"
    if not (folder / "node_modules").is_dir():
        # Optional ones are the same for GPUs, 700 MB of them.
        options = ("--omit=optional", "--ignore-scripts", "--no-audit", "--no-fund")
        installed = subprocess.run(
            [npm, "install", "--prefix", str(folder), *options, *PACKAGES], capture_output=True, text=True
        )
        if installed.returncode:
            pytest.skip(f"npm cannot install {PACKAGES[0]}: {installed.stderr.strip().splitlines()[:1]}")
    script.write_text(SCRIPT)
    return script


@pytest.mark.campaign
@pytest.mark.parametrize("shape", [{"arch": "gpt2"}, {"arch": "qwen3", "n_kv_head": 2}], ids=["gpt2", "qwen3"])
@pytest.mark.parametrize("tie_weights", [True, False])
def test_llama_cpp_continues_a_text_as_we_do(
    llama_cpp: Path, tmp_path: Path, shape: dict[str, Any], tie_weights: bool
) -> None:
    torch.manual_seed(1)
    tokenizer = tokenizer_named("bpe:512")
    ids = torch.from_numpy(tokenizer.encode("\n".join(prose())).astype("int64"))
    config = ModelConfig(n_layer=3, n_head=4, n_embd=64, block_size=64, tie_weights=tie_weights, **shape)
    model = LanguageModel(config, tokenizer.vocab_size)
    optimizer = build_optimizer(model, Config().optimizer)
    for group in optimizer.param_groups:
        group["lr"] = 3e-3
    for _ in range(150):  # until logits are far from flat
        starts = torch.randint(len(ids) - 64, (8,))
        windows = torch.stack([ids[start : start + 65] for start in starts])
        loss = model(windows[:, :-1], windows[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.75 * math.log(512)
    write(tmp_path / "model.gguf", model.eval(), tokenizer, name="tiny", dtype=torch.float32)
    prompt = ids[:8].tolist()
    ours = [
        step.ids[0]
        for step in generate(Decoder(model, 1), prompt, max_new_tokens=40, choice=Choice(temperature=0), seed=0)
    ]
    request = {"path": str(tmp_path / "model.gguf"), "prompt": prompt, "count": 40}
    answer = subprocess.run(["node", str(llama_cpp), json.dumps(request)], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout.splitlines()[-1]) == ours
    assert len(set(ours)) > 5
