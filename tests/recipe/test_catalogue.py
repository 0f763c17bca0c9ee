"""Components read from their source without importing them equal the imported ones."""

from __future__ import annotations

import inspect
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from omegaconf import OmegaConf
from recipe_texts import DATA

from marlkit import keys
from marlkit.component import option_parameters
from marlkit.contract import KINDS, Contract, When
from marlkit.errors import ComponentError
from marlkit.options import PositiveFloat, PositiveInt, problem_with
from marlkit.recipe import catalogue
from marlkit.recipe.catalogue import REQUIRED, Entry, components, find, load_class
from marlkit.recipe.source_reader import KIND_STUBS

OWN = [(section, name) for section, kind in KINDS.items() for name in catalogue.names(kind)]


def _all(items: tuple[Any, ...]) -> list[Any]:
    """Entries of a contract, conditional or not."""
    return [entry for item in items for entry in (item.then if isinstance(item, When) else (item,))]


EVERYTHING = {section: components(section) for section in KINDS}
TRAITS = {section: {t for e in found.values() for t in _all(e.contract.traits)} for section, found in EVERYTHING.items()}


@pytest.fixture(autouse=True)
def _same_search_path_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))


def _static(annotation: Any) -> Any:
    """An annotation with kinds of component as the source reader represents them."""
    if isinstance(annotation, type) and f"{annotation.__module__}.{annotation.__qualname__}" in KIND_STUBS:
        return KIND_STUBS[f"{annotation.__module__}.{annotation.__qualname__}"]
    if get_origin(annotation) in (typing.Union, type(int | str)):
        return typing.Union[tuple(_static(part) for part in get_args(annotation))]  # noqa: UP007
    return annotation


def _assert_same_as_imported(entry: Entry, cls: Any) -> None:
    parameters = option_parameters(cls)
    assert list(entry.options) == list(parameters)
    for name, option in entry.options.items():
        assert option.annotation == _static(parameters[name].annotation), name
        assert option.default == parameters[name].default, name
        assert type(option.default) is type(parameters[name].default), name
    assert entry.contract == cls.contract
    assert entry.docstring == inspect.cleandoc(cls.__doc__)


@pytest.mark.parametrize(("section", "name"), OWN)
def test_every_component_reads_as_it_runs(section: str, name: str) -> None:
    entry = find(section, name)
    _assert_same_as_imported(entry, load_class(entry))


@pytest.mark.parametrize(("section", "name"), OWN)
def test_every_option_is_described(section: str, name: str) -> None:
    undescribed = [option.name for option in find(section, name).options.values() if not option.description]
    assert not undescribed


@pytest.mark.parametrize(("section", "name"), OWN)
def test_every_contract_names_what_there_is(section: str, name: str) -> None:
    entry = EVERYTHING[section][name]
    contract = entry.contract
    for item in (*contract.reads, *contract.writes, *contract.traits):
        for part in item.parts if isinstance(item, When) else ():
            if part.value is not None:
                written = OmegaConf.create(f"value: {part.value}").value
                assert problem_with(written, entry.options[part.name].annotation) is None
            else:
                assert part.name in TRAITS["env"]
    for key in (*_all(contract.reads), *_all(contract.writes)):
        assert keys.describe(key)
    for target, traits in (*contract.needs.items(), *contract.prefers.items()):
        part_kind = entry.options[target].part if target in entry.options else KINDS[target]
        assert part_kind is not None
        assert set(_all(tuple(traits))) <= TRAITS[part_kind.section]
    for option, limits in contract.at_most.items():
        assert option in entry.options
        for section_name, _, limit in (path.partition(".") for product in limits for path in product.split(" * ")):
            assert any(limit in other.options for other in EVERYTHING[section_name].values())
    assert set(_all(contract.predictions)) <= set(_all(contract.writes))
    assert section != "critic" or contract.predictions


@pytest.mark.parametrize("section", KINDS)
def test_every_public_class_with_the_suffix_is_listed(section: str) -> None:
    kind = KINDS[section]
    folder = Path(catalogue.__file__).parents[1] / section_folder(kind.package)
    written = [line for file in folder.glob("[a-z]*.py") for line in file.read_text().splitlines()]
    classes = [
        line for line in written if line.startswith("class ") and f"{kind.suffix}(" in line and not line.startswith("class _")
    ]
    assert len(components(kind)) == len(classes) > 0


def section_folder(package: str) -> str:
    return package.rpartition(".")[2]


@pytest.mark.parametrize("name", ["ActionValueCritic", "ClosedCritic", "DiscreteCritic", "PlainCritic"])
def test_users_components_read_as_they_run(name: str) -> None:
    entry = find("critic", f"example_team.{name}", [DATA])
    _assert_same_as_imported(entry, load_class(entry, [DATA]))


def test_options_with_aliases_constants_and_strings() -> None:
    options = find("critic", "example_team.ActionValueCritic", [DATA]).options
    assert options["mode"].annotation == Literal["slow", "fast"]
    assert (options["levels"].annotation, options["levels"].default) == (PositiveInt, 3)
    assert (options["rate"].annotation, options["rate"].default) == (PositiveFloat, 0.001)


def test_constructor_that_passes_options_on_takes_those_above_too() -> None:
    options = find("critic", "example_team.DiscreteCritic", [DATA]).options
    above = find("critic", "local").options
    assert set(options) == {*above, "temperature"}
    assert above["value_norm"].default is True
    assert options["value_norm"].default is False


def test_constructor_that_passes_nothing_on_takes_its_own_only() -> None:
    assert list(find("critic", "example_team.ClosedCritic", [DATA]).options) == ["bonus"]


def test_class_without_constructor_or_contract_has_those_above() -> None:
    entry, above = find("critic", "example_team.PlainCritic", [DATA]), find("critic", "local")
    assert entry.options == above.options
    assert entry.contract == above.contract
    assert entry.docstring == "The local critic under another name."
    assert entry.trusted


def test_descriptions_come_from_the_docstring() -> None:
    options = find("env", "example_team.TinyEnvironment", [DATA]).options
    assert options["num_envs"].description == "how many at once."
    assert options["pooled"].description == "whether the team shares one reward."


def test_entry_says_where_it_is_written() -> None:
    entry = find("critic", "example_team.ActionValueCritic", [DATA])
    line = (DATA / "example_team.py").read_text().splitlines()[entry.line - 1]
    assert line == "class ActionValueCritic(Critic):"
    assert entry.file == DATA / "example_team.py"
    assert not entry.trusted


def test_option_that_holds_a_component() -> None:
    step = find("update", "sequential").options["step"]
    assert step.part is KINDS["update"]
    assert step.default is REQUIRED
    assert find("update", "example_team.WholeTeamUpdate", [DATA]).options["inner"].part is KINDS["update"]


@pytest.mark.parametrize(
    ("section", "name", "parts"),
    [
        ("critic", "centralized", ["no critic called `centralized`", "Did you mean `centralised`?"]),
        ("critic", "gae", ["belongs in section `estimator`"]),
        ("critic", "example_team.TinyEnvironment", ["component for section `env`, not for `critic`"]),
        ("critic", "example_team.NotAComponent", ["is no component", "marlkit.component.Critic"]),
        ("critic", "example_team.ActionValueCritc", ["no class `ActionValueCritc`", "Did you mean `ActionValueCritic`?"]),
        ("critic", "example_team.LEVELS", ["no class `LEVELS`"]),
        ("critic", "no_such_package.module.Class", ["there is no module `no_such_package.module`"]),
        ("critic", "os.system", ["is no component"]),
        ("critic", "sys.exit", ["is no component", "not a Python file"]),
        ("critic", "torch.nn.Module", ["is no component"]),
        ("critic", "marlkit.component.Critic", ["is no component"]),
        ("critic", "example team.Critic", ["package.module.Class"]),
        ("critic", ".Critic", ["package.module.Class"]),
        ("critic", "__main__.Critic", ["there is no module"]),
    ],
)
def test_names_that_stand_for_no_component(section: str, name: str, parts: list[str]) -> None:
    with pytest.raises(ComponentError) as caught:
        find(section, name, [DATA])
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def _write(folder: Path, body: str, name: str = "mine") -> None:
    head = "from marlkit import keys\nfrom marlkit.component import Critic\nfrom marlkit.contract import Contract, When\n"
    (folder / f"{name}.py").write_text(f"{head}{body}")


@pytest.mark.parametrize(
    ("body", "part"),
    [
        (
            "class MyCritic(Critic):\n    contract = Contract(reads=tuple(open('x')))\n",
            "contract of `mine.MyCritic` cannot be read",
        ),
        ("class MyCritic(Critic):\n    contract = Contract(reading=())\n", "contract of `mine.MyCritic` cannot be read"),
        ("class MyCritic(Critic):\n    contract = Contract(reads=(keys.STAET,))\n", "contract of `mine.MyCritic` cannot be read"),
        ("class MyCritic(Critic):\n    contract = 3\n", "is no Contract"),
        ("class MyCritic(Critic):\n    def __init__(self, spec, *, rate=min(1, 2)): ...\n", "default of option `rate`"),
        ("class MyCritic(Critic:\n", "mine.py:4: is not valid Python"),
        ("MyCritic = MyCritic\n", "no class `MyCritic`"),
    ],
)
def test_components_that_cannot_be_read(tmp_path: Path, body: str, part: str) -> None:
    _write(tmp_path, body)
    with pytest.raises(ComponentError) as caught:
        find("critic", "mine.MyCritic", [tmp_path])
    assert part in str(caught.value), str(caught.value)


def test_relative_imports_and_packages(tmp_path: Path) -> None:
    package = tmp_path / "my_package"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("from .inner.critics import MyCritic\nraise RuntimeError('was run')\n")
    (package / "inner" / "__init__.py").write_text("")
    (package / "names.py").write_text("from marlkit import keys as k\nREADS = (k.STATE, k.following(k.STATE))\n")
    (package / "base.py").write_text(
        "import marlkit.component\nfrom marlkit.contract import Contract\nfrom . import names\n"
        "class Base(marlkit.component.Critic):\n    contract = Contract(reads=names.READS)\n"
    )
    (package / "inner" / "critics.py").write_text("from ..base import Base\nclass MyCritic(Base):\n    'Mine.'\n")
    for dotted in ("my_package.inner.critics.MyCritic", "my_package.MyCritic"):
        entry = find("critic", dotted, [tmp_path])
        assert entry.contract == Contract(reads=(keys.STATE, ("next", "state")))
        assert entry.dotted == "my_package.inner.critics.MyCritic"
        assert entry.docstring == "Mine."


def test_of_a_class_reached_twice_the_nearer_one_decides(tmp_path: Path) -> None:
    _write(
        tmp_path,
        "class Base(Critic):\n    contract = Contract(reads=(keys.STATE,))\n    def __init__(self, spec, *, a=1): ...\n"
        "class Left(Base):\n    'Left.'\n"
        "class Right(Base):\n    contract = Contract(reads=(keys.ALIVE,))\n    def __init__(self, spec, *, a=2): ...\n"
        "class MyCritic(Left, Right): ...\n",
    )
    entry = find("critic", "mine.MyCritic", [tmp_path])
    assert entry.contract.reads == (keys.ALIVE,)
    assert entry.options["a"].default == 2


def test_a_generic_base_class_hands_its_options_on(tmp_path: Path) -> None:
    (tmp_path / "generic.py").write_text(
        "from typing import Any, Generic, TypeVar\nfrom marlkit.critics.local import LocalCritic\n"
        "Kind = TypeVar('Kind')\n"
        "class AnyCritic(LocalCritic, Generic[Kind]):\n    pass\n"
        "class OwnCritic(AnyCritic[int]):\n"
        "    def __init__(self, spec, *, own: int = 3, **options: Any) -> None:\n        super().__init__(spec, **options)\n"
    )
    entry = find("critic", "generic.OwnCritic", [tmp_path])
    assert entry.options["own"].default == 3
    assert set(components("critic")["local"].options) < set(entry.options)
    assert entry.contract == components("critic")["local"].contract


def test_an_option_that_is_handed_on_has_its_nearest_default_and_description(tmp_path: Path) -> None:
    _write(
        tmp_path,
        "class Base(Critic):\n    'Base.\\n\\n    Args:\\n        a: one.\\n        b: two.\\n    '\n"
        "    def __init__(self, spec, *, a: int = 1, b: int = 2): ...\n"
        "class MyCritic(Base):\n    'Mine.\\n\\n    Args:\\n        c: three.\\n        b: mine.\\n    '\n"
        "    def __init__(self, spec, *, b: int = 4, c: int = 3, **options): ...\n",
        "handed_on",
    )
    entry = find("critic", "handed_on.MyCritic", [tmp_path])
    read = [(option.name, option.default, option.description) for option in entry.options.values()]
    assert read == [("c", 3, "three."), ("a", 1, "one."), ("b", 4, "mine.")]
    parameters = option_parameters(load_class(entry, [tmp_path]))
    assert [(name, parameter.default) for name, parameter in parameters.items()] == [row[:2] for row in read]


def test_summary_is_that_of_the_file_unless_it_holds_several(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text(
        '"""What it\ncomputes.\n\nMore."""\nfrom marlkit.component import Critic\nclass OneCritic(Critic):\n    "One."\n'
    )
    assert find("critic", "one.OneCritic", [tmp_path]).summary == "What it computes."
    assert find("critic", "example_team.PlainCritic", [DATA]).summary == "The local critic under another name."


def test_edited_file_is_read_again(tmp_path: Path) -> None:
    _write(tmp_path, "class MyCritic(Critic):\n    def __init__(self, spec, *, rate: int = 1): ...\n", "edited")
    assert find("critic", "edited.MyCritic", [tmp_path]).options["rate"].default == 1
    _write(tmp_path, "class MyCritic(Critic):\n    def __init__(self, spec, *, rate: int = 12): ...\n", "edited")
    assert find("critic", "edited.MyCritic", [tmp_path]).options["rate"].default == 12


def test_unknown_annotation_takes_anything(tmp_path: Path) -> None:
    body = "a: frozenset[int], b, c: Unknown = 1, d: list['int'] = (), e: keys.following = 1, f: 3 = 3, g: Critic | keys = 1"
    _write(tmp_path, f"class MyCritic(Critic):\n    def __init__(self, spec, *, {body}): ...\n")
    assert all(option.annotation is Any for option in find("critic", "mine.MyCritic", [tmp_path]).options.values())


def test_class_is_loaded_from_the_file_that_was_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        _write(folder, "class MyCritic(Critic): ...\n", "twice_written")
    entry = find("critic", "twice_written.MyCritic", [first])
    monkeypatch.setattr(sys, "path", [*sys.path, str(second)])
    with pytest.raises(ComponentError, match="rename one of the two"):
        load_class(entry, [first])


def test_broken_import_is_reported(tmp_path: Path) -> None:
    _write(tmp_path, "import no_such_library\nclass MyCritic(Critic): ...\n", "broken_import")
    with pytest.raises(ComponentError, match="no_such_library"):
        load_class(find("critic", "broken_import.MyCritic", [tmp_path]), [tmp_path])


def test_reading_everything_imports_neither_torch_nor_components() -> None:
    program = (
        "import sys\nfrom marlkit.recipe.catalogue import components, find\nfrom marlkit.contract import KINDS\n"
        "assert all(components(kind) for kind in KINDS)\n"
        f"find('critic', 'example_team.DiscreteCritic', [{str(DATA)!r}])\n"
        "bad = [m for m in sys.modules if m.split('.')[0] in ('torch', 'tensordict', 'vmas', 'example_team')]\n"
        "assert not bad, bad\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(catalogue.__file__).parents[2])
