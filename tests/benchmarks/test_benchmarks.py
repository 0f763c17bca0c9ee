"""The benchmarks: the work they count, and that they run."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import compare, foraging, mappo_balance, perla_floor, recipe_speed, recorded_steps, sweep, turns
from benchmarks.measure import measure
from marlkit.critics.marginalised import MarginalisedCritic
from marlkit.recipe import load_recipe
from marlkit.spec import Continuous, TeamSpec
from marlkit.testing import fake_batch

SPEC = TeamSpec(n_agents=3, observation=5, action=Continuous(2))


@pytest.mark.parametrize("gradient", [False, True])
def test_the_counted_work_is_what_the_critic_does(gradient: bool) -> None:
    critic = MarginalisedCritic(SPEC, current="sampled", samples=7, exact="never", hidden=[16, 16], chunk=42)
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
def test_the_line_of_mappo_has_the_entries_of_the_reference_programs(capsys: pytest.CaptureFixture[str]) -> None:
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


def test_ratios_compare_entry_by_entry() -> None:
    def line(iteration: float, collect: float, update: float) -> dict[str, float]:
        return {"iteration_s": iteration, "collect_s": collect, "update_s": update}

    lines = {"plain": line(10.0, 3.0, 7.0), "marlkit": line(11.0, 3.6, 7.7), "peer": line(22.0, 9.0, 7.7)}
    over_plain = {"iteration_over_plain": 1.1, "collect_over_plain": 1.2, "update_over_plain": 1.1}
    assert compare.ratios(lines) == over_plain | {
        "iteration_faster_than_peer": 2.0,
        "collect_faster_than_peer": 2.5,
        "update_faster_than_peer": 1.0,
    }
    del lines["peer"]
    assert compare.ratios(lines) == over_plain


TAKES_TURNS = """
import json, sys
from benchmarks.turns import pass_on
name, iterations, log = sys.argv[1], int(sys.argv[2]), open(sys.argv[3], "a")
for i in range(iterations):
    pass_on()
    print(name + str(i), file=log, flush=True)
    print("not the last line")
if name == "b" and len(sys.argv) > 4:
    sys.exit("no luck")
print(json.dumps({"who": name}))
"""


def turn_takers(tmp_path: Path, *more: str) -> dict[str, list[str]]:
    (tmp_path / "program.py").write_text(TAKES_TURNS)
    program = [sys.executable, str(tmp_path / "program.py")]
    return {name: [*program, name, count, str(tmp_path / "log"), *more] for name, count in (("a", "2"), ("b", "4"))}


def test_programs_work_one_at_a_time(tmp_path: Path) -> None:
    assert turns.last_lines(turn_takers(tmp_path)) == {"a": {"who": "a"}, "b": {"who": "b"}}
    assert (tmp_path / "log").read_text().split() == ["a0", "b0", "a1", "b1", "b2", "b3"]


def test_a_program_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"program.py b 4 \S*log fails failed:\nno luck"):
        turns.last_lines(turn_takers(tmp_path, "fails"))


def test_a_program_that_takes_turns_ends_with_the_process_that_schedules_them(tmp_path: Path) -> None:
    alone = subprocess.run(
        turn_takers(tmp_path)["a"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(Path(turns.__file__).parents[1])},
    )
    assert (alone.returncode, alone.stderr) == (1, "the process that schedules the turns has ended\n")


@pytest.mark.parametrize("series", ["environments", "agents", "recipes"])
def test_every_point_of_the_sweep_is_a_recipe_that_fits(series: str) -> None:
    for point in sweep.points(series, None):
        config = load_recipe(point.recipe, point.overrides).config
        assert (config.env.num_envs, config.data.steps) == (point.envs, point.steps)
        assert series != "agents" or config.env.scenario_options.n_agents == point.size
        assert config.data.get("warm_up", 0) == 0


def test_the_sweep_goes_from_few_to_many_up_to_its_limit() -> None:
    assert [point.size for point in sweep.points("environments", None)] == [60, 300, 600, 3000, 6000, 30_000, 60_000]
    assert [(point.envs, point.steps) for point in sweep.points("environments", 700)] == [(60, 100), (300, 100), (600, 100)]
    sizes = [point.size for point in sweep.points("agents", None) if point.line == "local"]
    assert (sizes[0], sizes[-1]) == (3, 256)


def swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: dict[int, dict[str, Any]], *more: str
) -> list[dict[str, str]]:
    """Rows of a sweep over environments whose points give the rows in ``answers``, by number of environments."""
    monkeypatch.setattr(sweep, "_elsewhere", lambda series, number, _: answers[list(sweep.points(series, None))[number].size])
    sweep.main(["--series", "environments", "--out", str(tmp_path), *more])
    with (tmp_path / "sweep.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def figures(seconds: float) -> dict[str, Any]:
    split = {"collect_s": seconds / 2, "annotate_s": 0.1, "estimate_s": 0.0, "learn_s": 0.2, "overhead_s": 0.1}
    return {"iteration_s": seconds, "frames_per_s": 100, "agents": 3, "peak_mib": 500, **split}


def test_larger_points_are_left_out_after_one_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = swept(tmp_path, monkeypatch, {60: figures(1.0), 300: figures(2.0), 600: {"note": "longer than 300 s"}})
    assert [(row["envs"], row["iteration_s"], row["note"]) for row in rows] == [
        ("60", "1.0", ""),
        ("300", "2.0", ""),
        ("600", "", "longer than 300 s"),
    ]
    assert "| mappo | 300 | 3 | 100 | 2.0 | 1.0 |" in (tmp_path / "sweep.md").read_text()
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "versions.json").read_text())["environments"]["device"] == "cpu"


def test_the_rows_of_other_series_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = [{"series": "recipes", "line": "ippo"}, {"series": "environments", "line": "old"}]
    sweep._write(tmp_path / "sweep.csv", before)
    rows = swept(tmp_path, monkeypatch, {60: {"note": "failed"}}, "--largest", "60")
    assert [(row["series"], row["line"]) for row in rows] == [("recipes", "ippo"), ("environments", "mappo")]


@pytest.mark.slow
@pytest.mark.parametrize(("limits", "note"), [(("--limit", "0.2"), "longer than 0.2 s"), ((), "")])
def test_a_point_is_measured_within_its_limits(limits: tuple[str, ...], note: str, tmp_path: Path) -> None:
    sweep.main(["--series", "environments", "--largest", "60", "--threads", "1", "--out", str(tmp_path), *limits])
    with (tmp_path / "sweep.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["note"] == note
    if not note:
        split = [float(row[name]) for name in ("collect_s", "annotate_s", "estimate_s", "learn_s", "overhead_s")]
        assert float(row["iteration_s"]) == pytest.approx(sum(split), abs=1e-3)
        assert float(row["frames_per_s"]) == pytest.approx(6000 / float(row["iteration_s"]), rel=0.01)
        assert 100 < int(row["peak_mib"]) < 8000


@pytest.mark.parametrize(
    ("code", "error", "note"),
    [
        (1, "RuntimeError: DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes", "more than 5 GiB"),
        (-9, "", "more than 5 GiB"),
        (1, "Traceback\nValueError: no", "failed: ValueError: no"),
    ],
)
def test_a_point_without_figures_says_why(code: int, error: str, note: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], code, "", error))
    options = sweep._parser().parse_args(["--memory", "5"])
    assert sweep._elsewhere("environments", 0, options) == {"note": note}


def test_sizes_reach_both_programs_where_the_recipe_has_them() -> None:
    options = compare._parser().parse_args(["--recipes", "maddpg", "--sizes", "envs=8", "epochs=2", "warm_up=3"])
    for command in compare.recipe_commands("maddpg", options).values():
        assert command[-7:] == ["--turns", "--device", "cpu", "--envs", "8", "--warm-up", "3"]
    options.sizes = ["envs=many"]
    with pytest.raises(SystemExit, match="must be name=number"):
        compare.recipe_commands("maddpg", options)


def test_the_comparison_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([1.0, 3.0, 2.0, 2.0, 4.0, 10.0])

    def lines(commands: dict[str, list[str]]) -> dict[str, dict[str, float]]:
        return {name: dict.fromkeys(compare.ENTRIES, next(seconds)) for name in commands}

    monkeypatch.setattr(turns, "last_lines", lines)
    compare.main(["--recipes", "happo", "--rounds", "3", "--out", str(tmp_path / "kept" / "compare.json")])
    kept = json.loads((tmp_path / "kept" / "compare.json").read_text())
    assert kept["happo"]["medians"]["plain"]["collect_s"] == 2.0
    # Of 3, 1 and 2.5; the ratio of the medians would be 1.5.
    assert kept["happo"]["ratios"] == dict.fromkeys(("iteration_over_plain", "collect_over_plain", "update_over_plain"), 2.5)
    assert [each["collect_over_plain"] for each in kept["happo"]["rounds"]] == [3.0, 1.0, 2.5]
    assert kept["device"] == "cpu"
    assert "torch" in kept


@pytest.mark.slow
def test_the_lines_of_a_recipe_and_its_bare_loop_have_the_same_entries() -> None:
    sizes = ["envs=4", "steps=5", "batch=8", "iterations=4", "warm_up=1", "threads=1"]
    options = compare._parser().parse_args(["--recipes", "maddpg", "--sizes", *sizes])
    lines = turns.last_lines(compare.recipe_commands("maddpg", options))
    assert [line["who"] for line in lines.values()] == ["bare loop", "marlkit"]
    for line in lines.values():
        assert {"who", "recipe", "agents", "iteration_s", "collect_s", "update_s", "frames_per_s"} <= set(line)
        assert (line["recipe"], line["agents"]) == ("maddpg", 3)
        assert line["iteration_s"] >= line["collect_s"] + line["update_s"] - 0.001


def test_only_recipes_with_a_bare_loop_are_measured_so() -> None:
    with pytest.raises(SystemExit):
        recipe_speed.main(["ippo"])


def test_each_way_of_stepping_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads, out = torch.get_num_threads(), tmp_path / "steps.json"
    recorded_steps.main(["--scenarios", "transport", "--envs", "3", "5", "--threads", str(threads), "--out", str(out)])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["scenario"], line["envs"]) for line in lines] == [("transport", 3), ("transport", 5)]
    assert all(line["none"] > 0 and line["record"] > 0 and "not recorded" not in line for line in lines)
    assert json.loads(out.read_text())["milliseconds"] == lines


def test_steps_of_foraging_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "foraging.json"
    foraging.main(["--maps", "5x5-2p-1f", "--envs", "2", "5", "--rounds", "1", "--out", str(out)])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["map"], line["envs"]) for line in lines] == [("5x5-2p-1f", 2), ("5x5-2p-1f", 5)]
    assert all(line["marlkit"] > 0 for line in lines)
    kept = json.loads(out.read_text())
    assert kept["steps_per_second"] == lines
    assert kept["threads"] == 1
