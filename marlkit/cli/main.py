"""The command ``marlkit``; every subcommand calls one function of the library.

``check``, ``list`` and ``show --no-sizes`` import no torch.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from marlkit.cli import report
from marlkit.cli.listing import print_list
from marlkit.errors import Interrupted, MarlkitError, Problem, RecipeError, TrustError, WriteError
from marlkit.interrupts import end_process, listening
from marlkit.recipe import Recipe, load_recipe
from marlkit.recipe.fit import advice, check_fit
from marlkit.recipe.trust import require_trust
from marlkit.recipe.wiring import mermaid

UNWRITABLE = 1
"""Exit code after a failure to write: the input was right, and the same command may succeed later."""

INTERRUPTED = 130
"""Exit code after control-C, by the convention of shells."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: of the command; ``None``: those of this process, which then ends on a signal, without an exception.

    Returns:
        0 if it succeeded, 1 if a file cannot be written, 2 if its input has to be corrected, 128 and the signal's number if a
        signal ended it.
    """
    with listening(owner=arguments is None) as interrupts, report.plain_warnings():
        code = _run(_parse(sys.argv[1:] if arguments is None else arguments))
        if interrupts.owner and interrupts.received:
            end_process(code)
    return code


def _run(parsed: argparse.Namespace) -> int:
    try:
        parsed.function(parsed)
    except MarlkitError as error:
        report.print_error(error)
        return UNWRITABLE if isinstance(error, WriteError) else 2
    except Interrupted as stop:
        report.print_interrupted(str(stop))
        return stop.code
    except SystemExit as stop:  # of all ranks but the first, after a signal
        return int(stop.code or 0)
    except KeyboardInterrupt:
        report.print_interrupted("interrupted.")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe, such as `head`, has closed it. Nothing may be written to it, not even while Python exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _parser()
    # argparse takes no positional arguments after an option, but `marlkit check mappo --run seed=3` should work.
    parsed, rest = parser.parse_known_args(arguments)
    if getattr(parsed, "recipe", "") is None:
        parser.error(f"which recipe? `marlkit {parsed.command} mappo`, say; `marlkit list recipes` shows those there are")
    changes = [text for text in rest if "=" in text and not text.startswith("-")]
    if changes and "overrides" not in parsed:
        parser.error(f"`{parsed.command}` takes no overrides: set {changes[0]} in the run's recipe.yaml")
    if any(text.startswith("-") or "overrides" not in parsed for text in rest):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        parsed.overrides = [*parsed.overrides, *rest]
    return parsed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("marlkit", description="Multi-agent reinforcement learning from one-screen recipes.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    train = _with_recipe(commands, "train", _train, "train a recipe")
    train.add_argument("--root", type=Path, default=Path("runs"), help="folder of the run folders (runs)")
    _with_progress(train)
    _with_trust(train)
    check = _with_recipe(commands, "check", _check, "check a recipe before it runs")
    check.add_argument("--run", action="store_true", help="also take a few steps with every component")
    _with_trust(check)
    show = _with_recipe(commands, "show", _show, "show a completed recipe and which component reads and writes which key")
    show.add_argument("--mermaid", action="store_true", help="only the wiring, as a Mermaid flowchart")
    show.add_argument("--no-sizes", action="store_true", help="no shapes and parameter counts, which need all components built")
    _with_trust(show)
    listing = _command(commands, "list", _list, "list recipes and components")
    listing.add_argument(
        "what",
        nargs="?",
        help="`recipes`, `scenarios`, `combinations`, `traits`, `keys`, `rules`, a recipe, a section or one component "
        "(`critic.local`)",
    )
    evaluate = _with_run(commands, "evaluate", _evaluate, "play episodes with a trained team and report the return")
    evaluate.add_argument("overrides", nargs="*", default=[], help="changes of the environment: env.scenario_options.n_agents=16")
    evaluate.add_argument("--episodes", type=int, help="number of episodes (as during training)")
    play = _with_run(commands, "play", _play, "draw an episode of a trained team as an animation")
    play.add_argument("--output", type=Path, help="the file to write (team.gif in the run folder)")
    play.add_argument("--fps", type=float, default=15, help="pictures per second (15)")
    _with_comparison(_command(commands, "compare", _compare, "compare runs: figures, tables and a page"))
    resume = _command(commands, "resume", _resume, "continue a run that was stopped")
    resume.add_argument("folder", type=Path, help="a run folder: runs/<recipe>/<time>-seed<k>")
    _with_progress(resume)
    _with_trust(resume)
    return parser


Function = Callable[[argparse.Namespace], None]


def _command(commands: Any, name: str, function: Function, text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    parser.set_defaults(function=function)
    return parser


def _with_recipe(commands: Any, name: str, function: Function, text: str) -> argparse.ArgumentParser:
    parser = _command(commands, name, function, text)
    parser.add_argument("recipe", nargs="?", help="name of a shipped recipe, or path of a YAML file")
    parser.add_argument("overrides", nargs="*", default=[], help="changes: critic=marginalised critic.samples=100 seed=3")
    return parser


def _with_run(commands: Any, name: str, function: Function, text: str) -> argparse.ArgumentParser:
    parser = _command(commands, name, function, text)
    parser.add_argument("folder", type=Path, help="a run folder: runs/<recipe>/<time>-seed<k>")
    parser.add_argument("--seed", type=int, help="seed of the episodes (as during training)")
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best", help="which parameters (best)")
    _with_trust(parser)
    return parser


def _with_comparison(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", type=Path, nargs="+", help="run folders, or folders of them such as runs/mappo")
    parser.add_argument("--metric", default="evaluation/return", help="a column of metrics.csv (evaluation/return)")
    by = "what makes a group: the recipe and all that its runs differ in but the seed (override), or the recipe alone"
    parser.add_argument("--by", choices=("override", "recipe"), default="override", help=by)
    parser.add_argument("--frames", type=int, help="compare what was reached within so many frames (the whole trainings)")
    parser.add_argument("--out", type=Path, default=Path("comparison"), help="the folder of the results (comparison)")
    skipped = "compare last evaluations, and play nothing"
    parser.add_argument("--no-absolute", action="store_true", help=skipped)
    _with_trust(parser)


def _with_progress(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    parser.add_argument("--profile", action="store_true", help="show the time of each step, during training and at the end")


def _with_trust(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trust", action="store_true", help="run the code outside of marlkit that it names, now and later on")


def _load(parsed: argparse.Namespace, fit: bool = True) -> Recipe:
    recipe = load_recipe(parsed.recipe, parsed.overrides, fit=fit, trust=parsed.trust)
    report.print_notes(recipe.notes)
    return recipe


def _train(parsed: argparse.Namespace) -> None:
    recipe = _load(parsed)
    from marlkit import run

    _print_once(run.train(recipe, parsed.root, progress=not parsed.no_progress, profile=parsed.profile))


def _check(parsed: argparse.Namespace) -> None:
    recipe = _load(parsed)
    if parsed.run:
        from marlkit.training.dry_run import dry_run

        dry_run(recipe)
    report.print_ok(recipe, ran=parsed.run)
    report.print_warnings(advice(recipe))


def _show(parsed: argparse.Namespace) -> None:
    recipe = _load(parsed, fit=False)
    problems = check_fit(recipe)
    if parsed.mermaid:
        print(mermaid(recipe), end="")
    else:
        print(recipe.to_yaml())
        sizes, parameters = ({}, {}) if parsed.no_sizes or problems else _sizes(recipe)
        report.print_wiring(recipe, sizes, parameters)
    _refuse(problems)
    report.print_warnings(advice(recipe))


def _sizes(recipe: Recipe) -> tuple[dict[str, int], dict[str, int]]:
    """Sizes and parameter counts; none, after a note, where components would have to be built that are not trusted."""
    try:
        require_trust(recipe)
    except TrustError as error:
        report.print_notes([f"no shapes and parameter counts, because components are not built. {error}"])
        return {}, {}
    from marlkit.training.assembly import sizes

    return sizes(recipe)


def _refuse(problems: Sequence[Problem]) -> None:
    if problems:
        raise RecipeError(problems)


def _list(parsed: argparse.Namespace) -> None:
    print_list(parsed.what)


def _evaluate(parsed: argparse.Namespace) -> None:
    from marlkit import run

    found = run.evaluate(
        parsed.folder,
        episodes=parsed.episodes,
        seed=parsed.seed,
        checkpoint=parsed.checkpoint,
        overrides=parsed.overrides,
        trust=parsed.trust,
    )
    report.print_metrics(found)


def _play(parsed: argparse.Namespace) -> None:
    from marlkit import run

    shown = {"seed": parsed.seed, "checkpoint": parsed.checkpoint, "fps": parsed.fps}
    print(run.play(parsed.folder, path=parsed.output, trust=parsed.trust, **shown))


def _compare(parsed: argparse.Namespace) -> None:
    from marlkit import comparison
    from marlkit.comparison.comparing import refuse_unwritable_folder

    refuse_unwritable_folder(parsed.out)
    options = {name: getattr(parsed, name) for name in ("metric", "by", "frames", "trust")}
    found = comparison.compare(parsed.folders, absolute=not parsed.no_absolute, tell=report.print_step, **options)
    report.print_notes(found.notes)
    report.print_comparison(found)
    print(found.write(parsed.out))


def _resume(parsed: argparse.Namespace) -> None:
    from marlkit import run

    _print_once(run.resume(parsed.folder, progress=not parsed.no_progress, profile=parsed.profile, trust=parsed.trust))


def _print_once(folder: Path) -> None:
    """Print the run folder once, also where several processes have trained it."""
    from marlkit.ranks import is_first

    if is_first():
        print(folder)
