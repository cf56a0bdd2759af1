"""docs/scaling.md: its tables are what the plan's arithmetic gives. `PYTHONPATH=. python tests/test_scaling.py` writes them."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import pytest
from tree import ROOT

from pipeline import budget
from pipeline.config.keys import Config
from pipeline.config.load import load_config
from pipeline.machine.gpus import Hardware, hardware
from pipeline.model.footprint import Footprint

PAGE = ROOT / "docs" / "scaling.md"
BEGIN, END = "<!-- scaling -->", "<!-- end of scaling -->"
RANKS, STRATEGIES = (8, 64, 1024), ("ddp", "fsdp", "hsdp")
# With the loss in nats at which published runs end: nanoGPT's of 124M, and OpenAI's 1558M fine-tuned on OpenWebText.
PRESETS = {"gpt2-124m": 2.85, "gpt2-1558m": 2.54}
NOTICEABLE = 0.1  # of a step
VOCABULARY = 50_257


@dataclass(frozen=True)
class Plan:
    """A preset's step on so many H100s, as `pipeline plan` has it: with the nearest batch that divides."""

    wanted: Config
    config: Config
    hardware: Hardware
    footprint: Footprint
    time: budget.StepTime


@cache
def plan(preset: str, strategy: str, ranks: int) -> Plan:
    wanted, machine = load_config(preset, [f"parallel.strategy={strategy}"]), hardware(f"h100x{ranks}")
    config = budget.nearest_batch(wanted, ranks)
    footprint = budget.footprint(config, VOCABULARY, budget.setting(config, machine))
    return Plan(wanted, config, machine, footprint, time=budget.step_time(footprint, machine, VOCABULARY))


def critical_batch(loss: float) -> float:
    """Tokens a step at which twice the tokens save no more than half of the steps (Kaplan et al. 2020, equation 5.3)."""
    return 2.1e8 / loss ** (1 / 0.21)


def tokens_factor(loss: float, tokens_per_step: int) -> float:
    """How many times the tokens of a very small batch such a batch takes to the same loss (McCandlish et al. 2018)."""
    return 1 + tokens_per_step / critical_batch(loss)


def speed(found: Plan) -> float:
    """Tokens a second and rank."""
    return found.config.train.tokens_per_step / found.time.total_s / found.hardware.ranks


def limits(found: Plan, loss: float) -> Iterator[str]:
    """What keeps more GPUs from helping."""
    if found.footprint.memory().total > budget.usable_bytes(found.hardware):
        yield "does not fit"
    if found.time.exposed_s > NOTICEABLE * found.time.total_s:
        yield f"{found.time.exposed_s / found.time.total_s:.0%} of a step waits for the links"
    fixed = found.time.update_s + max(0.0, found.time.launch_s - found.time.compute_s - found.time.traffic_s)
    if fixed > NOTICEABLE * found.time.total_s:
        yield f"{fixed / found.time.total_s:.0%} is update and launches"
    train, model = found.config.train, found.config.model
    if train.tokens_per_step > found.wanted.train.tokens_per_step:
        yield "less than a sequence a rank: the batch had to grow"
    elif train.tokens_per_step < found.hardware.ranks * found.wanted.train.micro_batch_size * model.block_size:
        yield f"{train.tokens_per_step // found.hardware.ranks // model.block_size} sequences a rank, less than a micro-batch"
    if train.tokens_per_step > critical_batch(loss):
        yield "batch above the critical one"


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f} ms" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def step_table(preset: str, loss: float) -> Iterator[str]:
    yield row("GPUs", "strategy", "tokens a step", "micro-batches", "collectives", "GB", "exchange", "exposed", "step",
              "tokens/s a GPU", "hours", "limit")  # fmt: skip
    yield "|---" * 12 + "|"
    steps = load_config(preset, []).train.max_steps * load_config(preset, []).train.tokens_per_step
    for ranks in RANKS:
        for strategy in STRATEGIES:
            found = plan(preset, strategy, ranks)
            time, train = found.time, found.config.train
            sent = budget.exchanges(found.footprint)
            # As many tokens as the preset's, and more where a larger batch makes worse use of them.
            factor = tokens_factor(loss, train.tokens_per_step) / tokens_factor(
                loss, found.wanted.train.tokens_per_step
            )
            hours = steps * factor / train.tokens_per_step * time.total_s / 3600
            yield row(
                f"{ranks:,}", strategy, f"{train.tokens_per_step:,}", f"{found.footprint.setting.accumulation}",
                f"{sum(each.count for each in sent):,}", f"{sum(each.size for each in sent) / 1e9:.3g}",
                milliseconds(time.exchange_s), milliseconds(time.exposed_s), milliseconds(time.total_s),
                f"{speed(found):,.0f}", f"{hours:,.3g}", "; ".join(limits(found, loss)),
            )  # fmt: skip


def end_table() -> Iterator[str]:
    """Where a GPU more is worth half of one of the first eight."""
    yield row("preset", "strategy", "most GPUs at half of the speed that each of 8 has", "critical batch, tokens",
              "as many GPUs, a micro-batch each")  # fmt: skip
    yield "|---|---|---|---|---|"
    for preset, loss in PRESETS.items():
        for strategy in STRATEGIES:
            base = speed(plan(preset, strategy, 8))
            most = max(
                ranks for ranks in (8 << n for n in range(11)) if speed(plan(preset, strategy, ranks)) > base / 2
            )
            config = load_config(preset, [])
            ranks = critical_batch(loss) / config.model.block_size / config.train.micro_batch_size
            yield row(preset, strategy, f"{most:,}", f"{critical_batch(loss) / 1e6:.1f} million", f"{ranks:,.0f}")


def tables() -> str:
    lines = [line for preset, loss in PRESETS.items() for line in ("", f"### {preset}", "", *step_table(preset, loss))]
    return "\n".join([*lines[1:], "", "### Where it ends", "", *end_table()])


def with_tables(text: str) -> str:
    before, _, after = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{tables()}\n{END}{after.partition(END)[2]}"


def test_the_tables_are_the_plans() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text == with_tables(text), "PYTHONPATH=. python tests/test_scaling.py writes them anew"


def test_the_critical_batch_is_kaplans() -> None:
    """About a million tokens at GPT-2's losses; there, twice the tokens of small batches."""
    assert critical_batch(2.85) == pytest.approx(1.4e6, rel=0.05)
    assert tokens_factor(2.85, round(critical_batch(2.85))) == pytest.approx(2)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_more_ranks_never_make_a_rank_faster(preset: str, strategy: str) -> None:
    """But for accumulation: a rank that gathers weights for fewer micro-batches has less to do."""
    speeds = [speed(plan(preset, strategy, ranks)) for ranks in RANKS]
    assert all(after < 1.05 * before for before, after in pairwise(speeds))


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
