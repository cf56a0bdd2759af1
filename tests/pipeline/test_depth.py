"""`--depth N`: one number for shape, optimizer, batch and steps, by the rules of docs/recipes.md."""

import json
import operator
from itertools import pairwise

import pytest
from click.testing import CliRunner

from pipeline.budget import accumulation_steps, parameters
from pipeline.cli.looks import plan
from pipeline.cli.training import config_arguments
from pipeline.config.depth import MOST_LAYERS, with_depth
from pipeline.config.keys import Config
from pipeline.config.load import config_from_arguments
from pipeline.errors import UserError

DEPTHS = (1, 2, 3, 5, 8, 12, 20, 36, MOST_LAYERS)


def config_of(depth: int, *arguments: str) -> Config:
    return config_from_arguments(with_depth(arguments, depth))


@pytest.mark.parametrize("depth", DEPTHS)
def test_every_depth_is_a_run_of_twenty_tokens_a_parameter_on_one_to_eight_ranks(depth: int) -> None:
    config = config_of(depth)
    blocks = parameters(config.model, 0)
    tokens = config.train.max_steps * config.train.tokens_per_step
    # The rule counts 12 C^2 a layer; the MLP's width is rounded, which a narrow model notices.
    assert tokens / blocks == pytest.approx(20, rel=0.3 if depth < 4 else 0.05)
    assert config.optimizer.lr * config.optimizer.weight_decay * config.train.max_steps == pytest.approx(1.3, rel=0.1)
    assert config.train.max_steps >= 400 * 0.7
    for ranks in (1, 2, 4, 8):
        if config.train.tokens_per_step >= ranks * config.model.block_size:
            assert accumulation_steps(config, ranks) >= 1


def test_deeper_is_wider_takes_more_tokens_a_step_and_a_lower_rate() -> None:
    configs = [config_of(depth) for depth in DEPTHS]
    for smaller, larger in pairwise(configs):
        assert larger.model.n_embd > smaller.model.n_embd
        assert larger.train.tokens_per_step >= smaller.train.tokens_per_step
        assert larger.optimizer.lr < smaller.optimizer.lr


def test_twelve_layers_are_the_shape_of_gpt2_124m() -> None:
    config = config_of(12)
    assert (config.model.n_embd, config.model.n_head, config.train.tokens_per_step) == (768, 12, 524_288)
    assert (config.optimizer.lr, config.optimizer.weight_decay) == (4e-3, 0.1)


def test_given_keys_win_and_the_rest_of_the_config_stays() -> None:
    config = config_of(4, "quickstart", "optimizer.lr=1e-3", "run.name=mine")
    assert (config.optimizer.lr, config.run.name) == (1e-3, "mine")
    quickstart = config_from_arguments(["quickstart"])
    assert (config.data, config.eval, config.model.block_size) == (quickstart.data, quickstart.eval, 128)
    # A depth and a preset have a folder of their own, so that neither resumes the other.
    assert config_of(4, "quickstart").run.name == "quickstart-depth-4"
    assert config_of(4).run.name == "depth-4"


@pytest.mark.parametrize("change", ["model.n_kv_head=4", "model.n_embd=1024", "schedule.cooldown_steps=100"])
def test_a_change_has_to_fit_the_depth_and_not_what_it_replaces(change: str) -> None:
    key, value = change.split("=")
    assert operator.attrgetter(key)(config_of(8, change)) == int(value)


def test_a_value_may_have_the_number_of_an_array_job() -> None:
    assert with_depth(["optimizer.lr=%ae-3", "model.block_size = 256"], 8)[-2] == "optimizer.lr=%ae-3"


def test_shapes_of_the_config_do_not_stay() -> None:
    assert "model.head_dim=0" in with_depth([], 8) and "model.n_inner=0" in with_depth([], 8)


def test_a_depth_and_another_run_contradict_each_other() -> None:
    with pytest.raises(UserError, match="--from mine and --depth 4"):
        config_arguments([], None, "mine", 4)


def test_plan_takes_it() -> None:
    result = CliRunner().invoke(plan, ["--depth", "4", "--on", "h100x8", "--json"])
    found = json.loads(result.stdout)
    assert found["tokens_per_step"] == config_of(4).train.tokens_per_step
    blocks, head = 12 * 4 * 256**2, 50_257 * 256  # which is not shared with the embedding
    assert found["parameters_without_embeddings"] == pytest.approx(blocks + head, rel=0.05)


@pytest.mark.parametrize("depth", ["0", "-1", "1.5", "1000"])
def test_another_depth_is_refused(depth: str) -> None:
    assert CliRunner().invoke(plan, ["--depth", depth]).exit_code == 2
