"""What the text of a recipe means: words as values, files that are no recipes, and completed recipes that read back."""

from __future__ import annotations

import json
import os
import random
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf
from recipe_texts import DATA, TEAM, problem, problems, read

from marlkit.errors import RecipeError
from marlkit.recipe import Recipe, load_recipe
from marlkit.recipe.interpolation import literal, literals, meant
from marlkit.recipe.located_yaml import Place, read_text


def with_extra(text: str) -> str:
    """A recipe whose environment takes `text` as an option."""
    return TEAM.replace("num_envs: 8", f"extras: {{a: {text}}}")


def extra(recipe: Recipe) -> Any:
    return recipe.options("env")["extras"]["a"]


# --- words ----------------------------------------------------------------------------------------------------------------

MEANT = {
    "0": 0, "-0": 0, "7": 7, "+5": 5, "-12": -12, "1_000": 1000, "0x1F": 31, "-0xff": -255, "0b101": 5,
    ".5": 0.5, "1.": 1.0, "-.5e-3": -0.0005, "1e3": 1000.0, "1e-4": 1e-4, "1E5": 1e5, "010.5": 10.5, "1_000.5": 1000.5,
    ".inf": float("inf"), "-.INF": float("-inf"),
    "true": True, "Yes": True, "on": True, "FALSE": False, "no": False, "off": False, "~": None, "null": None, "NULL": None,
    "!!str 12": "12", "!!int '7'": 7, "!!float 3": 3.0, "!!null ''": None, "'010'": "010", '"1:30"': "1:30",
    "2024-01-01": "2024-01-01", "1.2.3": "1.2.3", "inf": "inf", "nan": "nan", "y": "y", "e3": "e3", "1e": "1e", "=": "=",
}  # fmt: skip


@pytest.mark.parametrize("text", MEANT)
@pytest.mark.parametrize("override", [False, True])
def test_words_mean_what_a_reader_takes_them_for(tmp_path: Path, text: str, override: bool) -> None:
    if override:
        found = extra(read(tmp_path, overrides=[f"env.extras={{a: {text}}}"]))
    else:
        found = extra(read(tmp_path, with_extra(text)))
    assert found == MEANT[text]
    assert type(found) is type(MEANT[text])


@pytest.mark.parametrize(
    ("text", "message", "remedy"),
    [
        ("010", "more than one number", "`10` for the number"),
        ("-08", "more than one number", "`-8` for the number"),
        ("0_200", "more than one number", "`200` for the number"),
        ("1__0", "more than one number", "`10` for the number"),
        ("1_", "more than one number", "`1` for the number"),
        ("0o17", "more than one number", "the number in decimals"),
        ("1:30", "to the base of 60", '`"1:30"` for the word'),
        ("-1:30:00.5", "to the base of 60", "the number in decimals"),
        ("!!float abc", "`!!float abc` is not a number", "without a tag"),
        ("!!int abc", "`!!int abc` is not a whole number", "without a tag"),
        ("!!bool maybe", "`!!bool maybe` is not true or false", "without a tag"),
        ("!!null x", "`!!null x` is not null", "without a tag"),
        ("!!timestamp 2024-01-01", "has the tag `!!timestamp`", "without it"),
        ("!!binary aGk=", "has the tag `!!binary`", "without it"),
        ("!!set {x}", "has the tag `!!set`", "without it"),
        ("!!omap []", "has the tag `!!omap`", "without it"),
        ("!own {b: 1}", "has the tag `!own`", "without it"),
        ("9" * 400, "is a number of 400 digits", "64 bits"),
        ("9" * 5000, "is a number of 5000 digits", "64 bits"),
        (str(2**63), "is a whole number of 64 bits", "at most 64"),
        ("1e999", "larger than any number", "`.inf`"),
        ("-1e999", "larger than any number", "`-.inf`"),
        (".nan", "must be finite, got nan", "`null`"),
        ('"\\0"', "control character U+0000", "Remove it"),
        ('"\\ud800"', "control character U+D800", "Remove it"),
        ('"${oops"', "interpolation that cannot be read", r"`\${`"),
        (f'"{"x" * 1000}${{env}}"', "1006 characters", r"`\${`"),
        ("{? [1] : 2}", "a key that is no word", "`key: value`"),
        ('{"": 1}', "a key that is no word", "`key: value`"),
        ('{"\\ud800": 1}', "a key that is no word", "`key: value`"),
        ("{<<: 3}", "merges something that is no mapping", "`<<: *anchor`"),
        ("???", "has no value", "Replace `???`"),
    ],
)
@pytest.mark.parametrize("override", [False, True])
def test_words_that_mean_nothing_or_two_things_are_refused(
    tmp_path: Path, text: str, message: str, remedy: str, override: bool
) -> None:
    if text == "???":
        text = '"???"'
    found = problem(tmp_path, overrides=[f"env.extras={{a: {text}}}"]) if override else problem(tmp_path, with_extra(text))
    assert found.line == (None if override else 1)
    assert found.where == "env.extras.a"
    assert message in found.message
    assert remedy in found.remedy


def test_keys_are_the_words_that_are_written(tmp_path: Path) -> None:
    recipe = read(tmp_path, with_extra("{1: a, true: b, null: c, 010: d, on: e, 1.0: f}"))
    assert extra(recipe) == {"1": "a", "true": "b", "null": "c", "010": "d", "on": "e", "1.0": "f"}


def test_a_word_that_reads_as_another_value_is_to_be_quoted(tmp_path: Path) -> None:
    assert "Quote" in problem(tmp_path, TEAM + "name: off\n").remedy
    assert "Quote" in problem(tmp_path, overrides=["name=1"]).remedy


# --- overrides ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "run #1",
        "a: b",
        "@x",
        "*x",
        "&a b",
        "!x",
        "!!int x",
        "- x",
        "%x",
        "`x",
        "|",
        "> x",
        "? x",
        "x, y",
        "a]",
        "}",
        "b: [c",
        "#",
    ],
)
def test_an_override_is_the_whole_text(tmp_path: Path, text: str) -> None:
    assert extra(read(tmp_path, overrides=[f"env.extras.a={text}"])) == text
    if text != "#":
        assert repr(text) in problem(tmp_path, overrides=[f"name={text}"]).message


@pytest.mark.parametrize(
    "text", ["[x", "{", "{a: b", "[a] # b", "{a: b}: c", '"a" b', '"a": b', "'a", '"a" # b', " x", "x ", "[*a]", "{a: 1,, b: 2}"]
)
def test_an_override_that_is_half_yaml_is_to_be_quoted_and_the_example_passes(tmp_path: Path, text: str) -> None:
    found = problem(tmp_path, overrides=[f"env.extras.a={text}"])
    assert found.where == "env.extras.a"
    (example,) = shlex.split(found.remedy[found.remedy.index("'env") :].rstrip("."))
    assert extra(read(tmp_path, overrides=[example])) == text


@pytest.mark.parametrize(
    ("text", "value"),
    [("[1, a, {b: 2}]", [1, "a", {"b": 2}]), ('"a # b"', "a # b"), ("'it''s'", "it's"), ("{}", {}), (" 8 ", 8), ('""', "")],
)
def test_collections_and_quoted_texts_in_overrides(tmp_path: Path, text: str, value: Any) -> None:
    assert extra(read(tmp_path, overrides=[f"env.extras.a={text}"])) == value


@pytest.mark.parametrize(
    "override", ["name=\0", "name=\ud800", "name=a\nb", f"{'a.' * 3000}b=1", f"name={'x' * 300}", "name=con"]
)
def test_odd_overrides_are_refused_in_one_line(tmp_path: Path, override: str) -> None:
    said = str(problem(tmp_path, overrides=[override]))
    assert said.isprintable()
    assert len(said) < 600


@pytest.mark.parametrize("name", ["..", "a/b", "a\\b", ".hidden", "-x", "end.", "NUL", "com1.txt", "x" * 101, "é", ""])
def test_names_that_cannot_be_folders_everywhere(tmp_path: Path, name: str) -> None:
    assert "can name a folder" in problem(tmp_path, f"name: {json.dumps(name)}\n{TEAM}").message


# --- files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "line", "message", "remedy"),
    [
        (TEAM.encode("utf-16"), None, "in UTF-16", "Save it as UTF-8."),
        (TEAM.encode("utf-16-be"), 1, "control character U+0000", "Remove it."),
        (TEAM.encode() + "# café\n".encode("cp1252"), 11, "the byte 0xe9", "Save it as UTF-8."),
        (TEAM.encode() + b"name: \x07\n", 11, "control character U+0007", "Remove it."),
        (TEAM.encode() + "# x\x85critic: local\n".encode(), 11, "control character U+0085", "Remove it."),
        (TEAM.encode() + "# x\u2028critic: local\n".encode(), 11, "control character U+2028", "Remove it."),
        (TEAM.encode() + b"\tname: x\n", 11, "cannot start any token", "instead of tabs"),
        (TEAM.encode() + b"---\nseed: 1\n", 11, "another document", "remove the second"),
        (TEAM.encode() + b'name: "\\U99999999"\n', 11, "is not YAML", ""),
        (TEAM.encode() + b"name: *nobody\n", 11, "undefined alias", "Name it with `&`"),
        (TEAM.encode() + b"name: @x\n", 11, "cannot start any token", "Quote"),
        (b"%YAML 2.0\n---\n" + TEAM.encode(), 1, "incompatible YAML", ""),
        (b"<<: &a {<<: *a}\n" + TEAM.encode(), 1, "recursive aliases", "Write the values out."),
    ],
)
def test_files_that_are_no_text_or_no_yaml(tmp_path: Path, content: bytes, line: int | None, message: str, remedy: str) -> None:
    file = tmp_path / "team.yaml"
    file.write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        load_recipe(file, folders=[DATA])
    (found,) = caught.value.problems
    assert found.line == line
    assert message in found.message
    assert remedy in found.remedy


@pytest.mark.parametrize("ending", ["\r\n", "\r"])
def test_ends_of_lines_of_other_systems(tmp_path: Path, ending: str) -> None:
    file = tmp_path / "team.yaml"
    file.write_bytes(b"\xef\xbb\xbf" + TEAM.replace("gamma: 0.9", "gamma: 9").replace("\n", ending).encode())
    with pytest.raises(RecipeError) as caught:
        load_recipe(file, folders=[DATA])
    assert [(p.where, p.line) for p in caught.value.problems] == [("estimator.gamma", 5)]


def test_paths_that_are_no_recipes(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "loop.yaml").symlink_to(tmp_path / "loop.yaml")
    (tmp_path / "large.yaml").write_bytes(b"#" * 3_000_000)
    cases: dict[str | Path, str] = {
        "~nouser/x.yaml": "home directory",
        "~nouser": "home directory",
        "x" * 300: "File name too long",
        "a\0b.yaml": "null",
        "/dev/zero": "a pipe or a device",
        tmp_path / "pipe.yaml": "a pipe or a device",
        tmp_path / "loop.yaml": "symbolic links",
        tmp_path / "large.yaml": "too large for a recipe",
    }
    for name, message in cases.items():
        with pytest.raises(RecipeError) as caught:
            load_recipe(name)
        (found,) = caught.value.problems
        assert message in found.message
        assert found.remedy


# --- bounds ---------------------------------------------------------------------------------------------------------------


def chain(links: int, form: str) -> str:
    """Options of which each is made of the next."""
    named = ("${env.extras.v" + str(link + 1) + "}" for link in range(links))
    return ", ".join(f"v{link}: {form.replace('*', name)}" for link, name in enumerate(named)) + f", v{links}: x"


@pytest.mark.parametrize(
    ("extras", "message"),
    [
        (chain(20, '"***"'), "interpolations stand for more than"),
        (chain(20, '{x: "*", y: "*"}'), "interpolations stand for more than"),
        (chain(20, '["*", "*"]'), "interpolations stand for more than"),
        (chain(100, '"*"'), "over more than 50 steps"),
        ('v: "${.v}${.v}"', "in a circle through `env.extras.v`"),
        ('v: {x: "${env.extras.v}", y: "${env.extras.v}"}', "in a circle"),
        ('v: "${env}"', "in a circle"),
        ('v: "${env.${name}}"', "inside the name of another"),
        ('v: "${oc.select:env}"', "cannot use the function `oc.select`"),
        ("v: \"${oc.decode:'${name}'}\"", "cannot use the function `oc.decode`"),
        (chain(20, '"***${oc.env:HOME}"'), "interpolations stand for more than"),
        ('v: "${.v}${oc.env:HOME}"', "in a circle through `env.extras.v`"),
        (
            ", ".join(["v0: &v0 [x]", *(f"v{i}: &v{i} [{f'*v{i - 1},' * 10}]" for i in range(1, 10))]),
            "aliases that stand for more",
        ),
        (
            ", ".join(["v0: &v0 {x: 1}", *(f"v{i}: &v{i} {{<<: [{f'*v{i - 1},' * 3}]}}" for i in range(1, 20))]),
            "aliases that stand",
        ),
        (f"v: [{'1,' * 15_000}]", "more than 15000 values"),
        (f"v: {'[' * 5000}{']' * 5000}", "deeper than 50 levels"),
        (f"v: {'x' * 200_000}", "characters of text"),
        ("v: &v {w: *v}", "recursive aliases"),
    ],
)
def test_small_texts_that_stand_for_much_are_refused(tmp_path: Path, extras: str, message: str) -> None:
    found = problems(tmp_path, TEAM.replace("num_envs: 8", f"extras: {{{extras}}}"))
    assert any(message in p.message and p.remedy for p in found), "\n".join(map(str, found))


def test_interpolations_within_the_bounds(tmp_path: Path) -> None:
    extras = 'a: "${.b}-${..num_envs}", b: 3, c: [1, "${.[0]}", "${data}"], d: "${.b}${oc.env:MARLKIT_NO_SUCH,7}"'
    recipe = read(tmp_path, TEAM.replace("num_envs: 8", f"num_envs: 8, extras: {{{extras}}}"))
    found = {"a": "3-8", "b": 3, "c": [1, 1, {"type": "rollout", "steps": 10}], "d": "${.b}${oc.env:MARLKIT_NO_SUCH,7}"}
    assert recipe.options("env")["extras"] == found
    assert recipe.arguments("env")["extras"] == found | {"d": "37"}


# --- reading back ---------------------------------------------------------------------------------------------------------

PIECES = [
    "${x}", "\\${env.num_envs}", "$", "{", "}", "\\", "\\\\", "???", "a", "Z", " ", "  ", "\n", "\t", ":", ": ", "#", " #",
    "'", "\"", "-", "- ", ",", "[", "]", "&", "*", "!", "!!int", "|", ">", "%", "@", "`", "<<", "=", "~", "null", "true",
    "no", "010", "1:30", "0x1F", "1e-4", ".5", "1_0", ".inf", "2024-01-01", "é", "漢", "😀", "\u2028", "\xa0", "\u200b", "---",
    "...",
]  # fmt: skip


def any_value(draw: random.Random, depth: int = 3) -> Any:
    """A value of a mapping of options."""
    kind = draw.choice(("text", "text", "text", "number", "other", *(("list", "mapping") if depth else ())))
    if kind == "text":
        return "".join(draw.choices(PIECES, k=draw.choice((0, 1, 1, 2, 3, 20))))
    if kind == "number":
        whole = draw.choice((0, 1, -1, 10, 2**53 + 1, 2**63 - 1, -(2**63)))
        return draw.choice((whole, float(whole), 1e-05, 1e16, 1e22, 5e-324, -1.5e300, 0.1, float("inf"), float("-inf")))
    if kind == "other":
        return draw.choice((True, False, None))
    size = draw.randrange(4)
    if kind == "list":
        return [any_value(draw, depth - 1) for _ in range(size)]
    keys = [
        "".join(draw.choices([piece for piece in PIECES if piece.isprintable()], k=draw.choice((1, 1, 3, 40))))
        for _ in range(size)
    ]
    return {key: any_value(draw, depth - 1) for key in keys}


def written(value: Any) -> str:
    """A value as a file has it, where `${` in a text is an interpolation."""
    text = json.dumps(literals(value), ensure_ascii=False).replace("Infinity", ".inf")
    return text.replace("\u2028", "\\L").replace("\x7f", "\\x7f")


@pytest.mark.parametrize("variable", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_a_completed_recipe_reads_back_as_it_was(tmp_path: Path, seed: int, variable: bool) -> None:
    draw = random.Random(seed)
    extras = {f"v{i}": any_value(draw) for i in range(60)} | {"???": "???", "\\???": "\\???", "${x}": "${x}"}
    text, read_for_the_constructor = TEAM.replace("num_envs: 8", f"extras: {written(extras)}"), dict(extras)
    if variable:
        extras["variable"] = "${oc.env:MARLKIT_NO_SUCH,7}"
        read_for_the_constructor["variable"] = "7"
        text = text.replace("extras: {", f'extras: {{"variable": "{extras["variable"]}", ')
    recipe = read(tmp_path, text)
    assert recipe.options("env")["extras"] == extras
    assert recipe.arguments("env")["extras"] == read_for_the_constructor
    again = tmp_path / "again.yaml"
    again.write_text(recipe.to_yaml(), encoding="utf-8")
    reread = load_recipe(again, folders=[DATA])
    assert reread.config == recipe.config
    assert reread.options("env") == recipe.options("env")
    assert reread.to_yaml() == recipe.to_yaml()


def test_a_table_of_thousands_of_entries_reads_back(tmp_path: Path) -> None:
    table = [0, 1] * 5001
    recipe = read(tmp_path, with_extra(json.dumps(table)))
    again, found = read_text(recipe.to_yaml(), Place("again"))
    assert not found
    assert again.plain()["env"]["extras"]["a"] == table


def test_any_text_is_read_back_by_omegaconf_as_it_was() -> None:
    draw = random.Random(0)
    for _ in range(1000):
        text = "".join(draw.choices(["\\", "$", "{", "}", "${", "???", "a", ":", "'"], k=draw.randrange(8)))
        config = OmegaConf.create({"text": literal(text)})
        assert config.text == text
        assert meant(OmegaConf.to_container(config)) == {"text": text}


def test_no_word_is_written_as_another_value(tmp_path: Path) -> None:
    words = [piece for piece in (*PIECES, *MEANT, "08", "1__0", "0b12", "+.5", "1.e3", "-.inf", "YES") if piece.isprintable()]
    recipe = read(tmp_path, with_extra(written(words)))
    assert extra(recipe) == words
    assert literals(words) == yaml.safe_load(recipe.to_yaml())["env"]["extras"]["a"], "YAML 1.1 agrees"
