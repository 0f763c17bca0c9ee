"""What cannot be compared is named with its folder and a remedy, and never averaged in silence."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from synthetic_runs import write_run

from marlkit.comparison.grouping import By, Task, tasks_of
from marlkit.comparison.loading import load_runs, refuse_single
from marlkit.errors import OptionError, RunError

RETURNS = {2: 1.0, 4: 3.0}


def load(
    *paths: Path, metric: str = "evaluation/return", frames: int | None = None, by: By = "override"
) -> tuple[list[Task], list[str]]:
    runs, notes = load_runs(paths, metric, frames=frames, trust=False)
    refuse_single(runs)
    tasks, told = tasks_of(runs, by)
    return tasks, [*notes, *told]


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return write_run(tmp_path, seed=0, returns=RETURNS), write_run(tmp_path, seed=1, returns=RETURNS)


def test_a_folder_stands_for_the_runs_in_it_and_a_run_counts_once(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for paths in ((tmp_path,), (tmp_path / "mappo",), pair, (tmp_path, *pair)):
        ((task,), notes) = load(*paths)
        assert [run.seed for run in task.groups["mappo"]] == [0, 1]
        assert notes == []


def test_folders_that_are_no_runs_are_named_together(pair: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError) as caught:
        load(*pair, tmp_path / "empty", tmp_path / "nowhere")
    first, second = str(caught.value).splitlines()
    assert f"{tmp_path / 'empty'}: is not a run and holds none" in first
    assert f"{tmp_path / 'nowhere'}: there is no such folder" in second


@pytest.mark.parametrize("name", ["x" * 300, "nul\0", "file"])
def test_paths_that_are_no_folders_are_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="there is no such folder"):
        load(tmp_path / name)


def test_one_run_only_is_refused(tmp_path: Path) -> None:
    folder = write_run(tmp_path, seed=3, returns=RETURNS)
    with pytest.raises(RunError, match=r"is one run only.*marlkit train mappo seed=4.*marlkit evaluate"):
        load(folder)


def test_a_run_that_was_stopped_is_left_out_and_told(pair: tuple[Path, Path], tmp_path: Path) -> None:
    stopped = write_run(tmp_path, seed=2, returns=RETURNS, iterations=10)
    ((task,), notes) = load(*pair, stopped)
    assert [run.seed for run in task.groups["mappo"]] == [0, 1]
    assert notes == [
        f"left out: {stopped}: has 4 of 10 iterations; it was stopped, or trains still. `marlkit resume {stopped}` ends it, and "
        "--frames N compares what all runs have."
    ]
    ((task,), notes) = load(*pair, stopped, frames=4000)
    assert [run.seed for run in task.groups["mappo"]] == [0, 1, 2]
    assert notes == []


def test_a_run_that_has_just_begun_is_left_out(pair: tuple[Path, Path], tmp_path: Path) -> None:
    begun = write_run(tmp_path, seed=2, returns=RETURNS)
    (begun / "metrics.csv").write_text("iteration\n")
    _, notes = load(*pair, begun)
    assert [note.partition(";")[0] for note in notes] == [f"left out: {begun}: has 0 of 4 iterations"]


def test_nothing_left_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no run is left to compare\.\nleft out: .*4 of 10 iterations"):
        load(write_run(tmp_path, returns=RETURNS, iterations=10))


def test_other_budgets_are_refused_and_can_be_cut(pair: tuple[Path, Path], tmp_path: Path) -> None:
    longer = write_run(tmp_path, "ippo", seed=0, returns={**RETURNS, 6: 9.0})
    with pytest.raises(RunError, match=r"do not come after equal budgets.*--frames 4000") as caught:
        load(*pair, longer)
    assert f"{longer}: 6,000 frames" in str(caught.value)
    ((task,), _) = load(*pair, longer, frames=4000)
    assert task.groups["ippo"][0].values.tolist() == [1.0, 3.0]
    assert task.budget == 4000


def test_budgets_may_differ_by_the_length_of_an_iteration(tmp_path: Path) -> None:
    write_run(tmp_path, "mappo", returns={100: 1.0})
    write_run(tmp_path, "ippo", returns={100: 1.0}, frames=1005)
    ((task,), _) = load(tmp_path)
    assert set(task.groups) == {"ippo", "mappo"}


def test_too_few_frames_are_refused(pair: tuple[Path, Path]) -> None:
    with pytest.raises(RunError, match="has no evaluation/return within 1,000 frames"):
        load(*pair, frames=1000)


def test_a_seed_that_is_there_twice_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    again = write_run(tmp_path, seed=1, returns=RETURNS)
    with pytest.raises(RunError, match="seed 1 of mappo on balance is there 2 times") as caught:
        load(*pair, again)
    assert str(again) in str(caught.value)
    assert str(pair[1]) in str(caught.value)


def test_missing_seeds_are_told(pair: tuple[Path, Path], tmp_path: Path) -> None:
    write_run(tmp_path, "ippo", seed=1, returns=RETURNS)
    _, notes = load(tmp_path)
    assert notes == [
        "balance: ippo lacks seeds 0, which others have; train them for equal numbers.",
        "balance: ippo has one run only, and so no interval; train more seeds.",
    ]


def test_another_metric_is_named_with_those_that_there_are(pair: tuple[Path, Path]) -> None:
    with pytest.raises(RunError) as caught:
        load(*pair, metric="evaluation/returns")
    message = str(caught.value).splitlines()[0]
    assert f"{pair[0] / 'metrics.csv'}: has no values of `evaluation/returns`" in message
    assert "Did you mean `evaluation/return`?" in message
    assert "It has evaluation/return, evaluation/length, episode/return." in message


def lines(path: Path, change: Callable[[list[str]], list[str]]) -> None:
    path.write_text("".join(change(path.read_text().splitlines(keepends=True))))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("metrics.csv", lambda rows: [*rows[:2], *rows[3:]], "lacks the rows of iterations 1"),
        ("metrics.csv", lambda rows: [*rows, rows[2]], "repeated or out of order"),
        ("metrics.csv", lambda rows: [*rows[:2], "1,2000,x,1,1\n", *rows[3:]], r"metrics\.csv:3: is not a row"),
        ("metrics.csv", lambda rows: [*rows[:3], rows[3].replace("3000", "10"), *rows[4:]], "`frames` does not rise"),
        ("metrics.csv", lambda rows: [*rows[:4], "3,4000,nan,100.0,1\n"], "`evaluation/return` is no number at iterations 3"),
        ("metrics.csv", lambda rows: [*rows[:4], "3,4000,inf,100.0,1\n"], "`evaluation/return` is no number at iterations 3"),
        ("metrics.csv", lambda rows: [], "is not a metrics file"),
        ("episodes.csv", lambda rows: [*rows[:2], "3,4000,7.0,9.0\n"], "over the episodes of iteration 3 is 8, but 3"),
        ("episodes.csv", lambda rows: ["a,b\n"], "is not a metrics file"),
        ("recipe.yaml", lambda rows: [*rows, "crit: 3\n"], r"recipe\.yaml:\d+: crit"),
        ("recipe.yaml", lambda rows: [":"], r"recipe\.yaml"),
    ],
)  # fmt: skip
def test_a_damaged_run_is_refused(
    pair: tuple[Path, Path], file: str, change: Callable[[list[str]], list[str]], message: str
) -> None:
    lines(pair[1] / file, change)
    with pytest.raises(RunError, match=message) as caught:
        load(*pair)
    assert str(pair[1] / file) in str(caught.value)


def test_a_lost_file_is_named(pair: tuple[Path, Path]) -> None:
    (pair[0] / "metrics.csv").unlink()
    with pytest.raises(RunError, match=r"metrics\.csv: no metrics can be read"):
        load(*pair)


def test_a_run_without_episodes_has_its_means(pair: tuple[Path, Path]) -> None:
    (pair[0] / "episodes.csv").unlink()
    ((task,), _) = load(*pair)
    assert [run.episodes for run in task.groups["mappo"]] == [([1.0], [3.0]), ([0.0, 2.0], [2.0, 4.0])]


@pytest.mark.parametrize("options", [{"by": "seed"}, {"frames": 0}])
def test_values_of_options_are_checked(pair: tuple[Path, Path], options: dict[str, object]) -> None:
    from marlkit import compare

    with pytest.raises(OptionError, match=next(iter(options))):
        compare(pair, **options)  # type: ignore[arg-type]


def test_bad_input_is_refused_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom marlkit.cli import main\n"
        f"code = main(['compare', {str(tmp_path / 'nowhere')!r}, '--out', {str(tmp_path / 'out')!r}])\n"
        "print(code, sorted({'torch', 'lightning', 'tensordict'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "2 []\n", done.stderr
    assert "there is no such folder" in done.stderr
    assert list(tmp_path.iterdir()) == []
