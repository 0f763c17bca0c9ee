"""The benchmarks: the work they count, and that they run."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import compare, mappo_balance, perla_floor
from benchmarks.measure import measure
from marlkit.critics.marginalised import MarginalisedCritic
from marlkit.spec import Continuous, TeamSpec
from marlkit.testing import fake_batch

SPEC = TeamSpec(n_agents=3, observation=5, action=Continuous(2))


@pytest.mark.parametrize("gradient", [False, True])
def test_the_counted_work_is_what_the_critic_does(gradient: bool) -> None:
    critic = MarginalisedCritic(SPEC, samples=7, exact="never", hidden=[16, 16], chunk=42)
    batch = fake_batch(SPEC, [4], keys=critic.reads)
    work = perla_floor.critic_work(agents=3, action_features=2, state=SPEC.state_size, samples=7, width=16)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(gradient):
        values = critic.predict(batch)
        if gradient:
            values.sum().backward()
    assert counter.get_total_flops() == 4 * (work.forward + (work.repeated + work.backward if gradient else 0))


def test_the_work_of_an_iteration_by_hand() -> None:
    work = perla_floor.Work(forward=10, repeated=9, backward=25)
    # 6 rows and 2 next states are annotated; in 3 epochs each row is evaluated, evaluated again and differentiated.
    assert work.iteration(6, 2, 3, repeat=True) == 80 + 6 * 3 * 44
    assert work.iteration(6, 2, 3, repeat=False) == 80 + 6 * 3 * 35


def test_measuring_needs_an_iteration_to_count() -> None:
    with pytest.raises(ValueError, match="at least 3 iterations"):
        measure("mappo", [], iterations=2, device="cpu")
    with pytest.raises(ValueError, match="at least 7 iterations: 5 to warm up"):
        measure("mappo", [], iterations=6, warm_up=5, device="cpu")


@pytest.mark.slow
def test_the_line_of_mappo_has_the_entries_of_the_measuring_sticks(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    mappo_balance.main(["balance", "--envs", "4", "--steps", "5", "--minibatch", "20", "--iterations", "3", "--epochs", "1"])
    torch.set_num_threads(threads)
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (line["who"], line["scenario"], line["agents"]) == ("marlkit", "balance", 3)
    assert line["frames_per_s"] == pytest.approx(4 * 5 / line["iteration_s"], rel=0.05)
    assert line["iteration_s"] >= line["collect_s"] + line["update_s"] - 0.01
    assert line["update_s"] >= line["annotate_s"] + line["estimate_s"]


def test_the_rate_of_a_product_is_positive_and_finite() -> None:
    rate = perla_floor.product_rate(64, width=32, repeats=3)
    assert 0 < rate < float("inf")


def test_ratios_compare_medians_entry_by_entry() -> None:
    def line(iteration: float, collect: float, update: float) -> dict[str, float]:
        return {"iteration_s": iteration, "collect_s": collect, "update_s": update}

    lines = {
        "plain": [line(10.0, 3.0, 7.0), line(99.0, 99.0, 99.0), line(9.0, 2.0, 7.0)],
        "marlkit": [line(11.0, 3.6, 7.7)],
        "peer": [line(22.0, 9.0, 7.7)],
    }
    assert compare.ratios(lines) == {
        "iteration_over_plain": 1.1,
        "collect_over_plain": 1.2,
        "update_over_plain": 1.1,
        "iteration_faster_than_peer": 2.0,
        "collect_faster_than_peer": 2.5,
        "update_faster_than_peer": 1.0,
    }
