"""The optimizer's groups and the learning-rate schedule, against their formulas."""

import math
from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from pipeline.config.keys import Config, ModelConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from pipeline.model.language_model import LanguageModel
from train.optimizer.groups import build_optimizer
from train.optimizer.schedule import learning_rate

CONFIG = Config(
    optimizer=OptimizerConfig(lr=1e-3, min_lr=1e-4),
    schedule=ScheduleConfig(warmup_steps=10),
    train=TrainConfig(max_steps=110),
)


@pytest.mark.parametrize(
    ("step", "lr"),
    [
        (0, 1e-4),  # the first step of ten
        (4, 5e-4),
        (9, 1e-3),
        (10, 1e-3),  # the top of the cosine
        (60, (1e-3 + 1e-4) / 2),  # half way down
        (35, 1e-4 + 9e-4 * 0.5 * (1 + math.cos(math.pi / 4))),
        (110, 1e-4),
        (10_000, 1e-4),
    ],
)
def test_learning_rate_warms_up_and_follows_the_cosine(step: int, lr: float) -> None:
    assert learning_rate(step, CONFIG) == pytest.approx(lr, rel=1e-12)


def test_decay_may_end_before_the_run_and_warmup_may_be_left_out() -> None:
    config = replace(CONFIG, schedule=ScheduleConfig(warmup_steps=0, decay_steps=50))
    assert learning_rate(0, config) == 1e-3
    assert learning_rate(50, config) == learning_rate(109, config) == 1e-4


@pytest.mark.parametrize(
    ("cooldown", "decay", "rates"),
    [
        # The last fifth of 110 steps, and exactly min_lr after the last of them.
        (0, 0, {0: 1e-4, 9: 1e-3, 10: 1e-3, 88: 1e-3, 99: 5.5e-4, 109: 1e-4 + 9e-4 / 22, 110: 1e-4, 10_000: 1e-4}),
        (50, 0, {59: 1e-3, 60: 1e-3, 85: 5.5e-4, 110: 1e-4}),
        (20, 70, {50: 1e-3, 60: 5.5e-4, 70: 1e-4, 109: 1e-4}),
        (100, 0, {5: 6e-4, 10: 1e-3, 60: 5.5e-4}),  # right after the warmup
        (1000, 0, {5: 6e-4, 10: 1e-3, 60: 5.5e-4, 110: 1e-4}),  # longer than the run, which was shortened
    ],
)
def test_wsd_is_constant_and_then_falls_linearly(cooldown: int, decay: int, rates: dict[int, float]) -> None:
    schedule = ScheduleConfig(kind="wsd", warmup_steps=10, decay_steps=decay, cooldown_steps=cooldown)
    config = replace(CONFIG, schedule=schedule)
    assert [learning_rate(step, config) for step in rates] == pytest.approx(list(rates.values()), rel=1e-12)


def test_a_run_of_few_steps_has_no_cooldown_by_itself() -> None:
    config = replace(CONFIG, schedule=ScheduleConfig(kind="wsd", warmup_steps=0), train=TrainConfig(max_steps=4))
    assert [learning_rate(step, config) for step in range(5)] == [1e-3, 1e-3, 1e-3, 1e-3, 1e-4]


def test_a_cooldown_changes_nothing_without_wsd() -> None:
    """So that another schedule.kind is enough to leave a preset's wsd."""
    with_cooldown = replace(CONFIG, schedule=replace(CONFIG.schedule, cooldown_steps=50))
    rates = [[learning_rate(step, config) for step in range(110)] for config in (CONFIG, with_cooldown)]
    assert rates[0] == rates[1]


def test_only_matrices_decay_and_every_parameter_is_there_once() -> None:
    model = LanguageModel(ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=16), 100)
    decayed, spared = build_optimizer(model, OptimizerConfig(weight_decay=0.1)).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert {p.ndim for p in decayed["params"]} == {2} and {p.ndim for p in spared["params"]} == {1}
    together = [id(p) for p in (*decayed["params"], *spared["params"])]
    assert sorted(together) == sorted({id(p) for p in model.parameters()})


def test_a_step_equals_adamw_written_out() -> None:
    """Loshchilov and Hutter 2019, algorithm 2, on one matrix and one vector for three steps."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 3)
    config = OptimizerConfig(lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    optimizer = build_optimizer(layer, config)
    expected = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    first = {name: torch.zeros_like(value) for name, value in expected.items()}
    second = {name: torch.zeros_like(value) for name, value in expected.items()}
    for step in range(1, 4):
        optimizer.zero_grad()
        layer(torch.randn(8, 4)).square().sum().backward()
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None
            first[name] = 0.9 * first[name] + 0.1 * parameter.grad
            second[name] = 0.95 * second[name] + 0.05 * parameter.grad**2
            decay = 0.1 if name == "weight" else 0.0
            update = (first[name] / (1 - 0.9**step)) / ((second[name] / (1 - 0.95**step)).sqrt() + 1e-8)
            expected[name] -= 1e-2 * (update + decay * expected[name])
        optimizer.step()
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(parameter.detach(), expected[name])


def test_the_initial_state_is_named_and_shaped_as_torch_makes_it() -> None:
    model = LanguageModel(ModelConfig(n_layer=1, n_head=2, n_embd=32, block_size=16), 100)
    optimizer = build_optimizer(model, OptimizerConfig())
    ids = torch.zeros(1, 8, dtype=torch.long)
    model(ids, ids).backward()
    optimizer.step()
    for parameter in model.parameters():
        initial, made = optimizer.initial_state(parameter), optimizer.state[parameter]
        assert initial.keys() == made.keys()
        for name, value in made.items():
            wanted = (value.shape, value.dtype, value.stride())
            assert (initial[name].shape, initial[name].dtype, initial[name].stride()) == wanted, name
            assert not initial[name].any()


@pytest.mark.parametrize("first", [True, False])
def test_a_rejected_update_changes_nothing(first: bool) -> None:
    """Neither weights nor moments nor the count of steps, also where the gradient is not finite."""
    torch.manual_seed(3)
    model = torch.nn.Linear(3, 2)
    optimizer = build_optimizer(model, OptimizerConfig(lr=0.1, weight_decay=0.1))
    accepted, rejected = torch.tensor(False), torch.tensor(True)
    for gradient in [1.0] if first else []:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step_unless(accepted)
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    states = [
        deepcopy(optimizer.state[parameter] or optimizer.initial_state(parameter)) for parameter in model.parameters()
    ]
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    optimizer.step_unless(rejected)
    for parameter, weight, state in zip(model.parameters(), weights, states, strict=True):
        assert torch.equal(parameter, weight)
        assert optimizer.state[parameter].keys() == state.keys()
        assert all(torch.equal(optimizer.state[parameter][name], value) for name, value in state.items())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step_unless(accepted)
    assert not any(torch.equal(a, b) for a, b in zip(model.parameters(), weights, strict=True))
