"""README and docs against the program: options, commands, Python and links in them are tried, not only read."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from mfptq.cli.main import main
from mfptq.observation import evaluate
from tests.calibration.files import calibrate as write_calibration
from tests.calibration.files import described, layers_of
from tests.conftest import digests
from tests.generate_cli_docs import PAGE, commands, options, page

ROOT = Path(__file__).parents[1]
SITE = "https://github.com/mfptq/mfptq/blob/main/"
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHERS = {"pip", "python", "python3", "vllm", "ruff", "mypy", "just", ":"}  # commands of other programs: not run here
QWEN = "Qwen/Qwen3.5-27B"


def blocks(path: Path, language: str) -> list[str]:
    """Return the fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)


def shell_lines(block: str) -> Iterator[list[str]]:
    """Yield the commands of a block as words, without their comments."""
    for line in block.replace("\\\n", " ").splitlines():
        for part in line.split("&&"):
            if words := shlex.split(part, comments=True):
                yield words


def everywhere(language: str) -> list:
    """Return every block of a language as a parameter."""
    return [
        pytest.param(path, block, id=f"{path.name}-{number}")
        for path in DOCUMENTS
        for number, block in enumerate(blocks(path, language), 1)
    ]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Iterator[Path]:
    """A folder with what the documents begin with: a model under a Hub-like name, text, the demo's output."""
    pytest.importorskip("transformers")
    from tests.models import DENSE, write_checkpoint

    folder = tmp_path_factory.mktemp("docs")
    write_checkpoint(folder / QWEN, DENSE)
    shutil.copytree(folder / QWEN, folder / "MODEL")
    chats = [{"messages": [{"role": "user", "content": f"number {number}"}]} for number in range(3)]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main.main(["demo", "mfptq-demo"], standalone_mode=False)
    before = digests(folder)
    yield folder
    assert digests(folder) == before, "a command has changed a file in its place"


@pytest.fixture
def workspace(prepared, tmp_path, monkeypatch) -> Path:
    """The same files in a folder of its own, the current one; the built-in text is a few lines of it."""
    shutil.copytree(prepared, tmp_path / "work", copy_function=os.link)
    monkeypatch.chdir(tmp_path / "work")
    short = tmp_path / evaluate.BUILT_IN.name
    short.write_text("".join(evaluate.BUILT_IN.read_text().splitlines(keepends=True)[:4]))
    monkeypatch.setattr(evaluate, "BUILT_IN", short)
    return tmp_path / "work"


@pytest.fixture(scope="module")
def calibrations(prepared, tmp_path_factory) -> Path:
    """A folder with calibration files of the model, as examples name them, and one that every method can use."""
    folder = tmp_path_factory.mktemp("calibrations")
    for name, level in (("qwen", "hessian"), ("a", "hessian"), ("b", "hessian"), ("full", "factors")):
        write_calibration(prepared / QWEN, folder / f"{name}.calibration.safetensors", described(level, dataset=name))
    return folder


@pytest.fixture
def calibrated(workspace, calibrations) -> Path:
    """The current folder, with calibration files in it."""
    return Path(shutil.copytree(calibrations, workspace, dirs_exist_ok=True))


def run(words: list[str]) -> None:
    """Run `mfptq` in this process."""
    assert main.main(words[1:], prog_name="mfptq", standalone_mode=False) in (None, 0)


def test_the_page_of_the_command_line_is_current() -> None:
    assert PAGE.read_text() == page(), "run: python -m tests.generate_cli_docs"


@pytest.mark.parametrize(("name", "command"), [pytest.param(*each, id=each[0]) for each in commands()])
def test_every_option_is_documented(name: str, command: click.Command) -> None:
    section = PAGE.read_text().split(f"\n## {name}\n")[1].split("\n## ")[0]
    assert command.help
    for option in options(command):
        assert option.help, option.name
        assert all(
            f"`{each}" in section or f", {each}" in section or f"/ {each}" in section
            for each in (*option.opts, *option.secondary_opts)
        )


@pytest.mark.parametrize(("path", "block"), everywhere("bash"))
def test_every_command_exists_with_its_options(path: Path, block: str) -> None:
    for words in shell_lines(block):
        program = Path(words[0]).name
        if program != "mfptq":
            assert program in OTHERS, words
            continue
        command, rest = main, words[1:]
        while isinstance(command, click.Group):
            command, rest = command.commands[rest[0]], rest[1:]
        command.make_context("mfptq", rest)  # raises for an unknown option


@pytest.mark.parametrize(
    "path", [path for path in DOCUMENTS if path != PAGE and blocks(path, "bash")], ids=lambda path: path.name
)
def test_the_commands_of_a_page_work_in_their_order(path: Path, workspace: Path, capsys) -> None:
    for block in blocks(path, "bash"):
        for words in shell_lines(block):
            if words[0] == "mfptq":
                run(words)


README_COMMANDS = [words for block in blocks(ROOT / "README.md", "bash") for words in shell_lines(block)]


@pytest.mark.parametrize(
    "block", [block for block in blocks(PAGE, "bash") if next(shell_lines(block)) not in README_COMMANDS]
)
def test_the_examples_of_the_help_work(block: str, calibrated: Path, capsys) -> None:
    [words] = shell_lines(block)
    if words[1] == "compare":
        for name, method in zip(words[2:], ("minmax", "search"), strict=True):
            run(["mfptq", "convert", QWEN, name, "--method", method])
    if words[1] in ("verify", "inspect", "calibration", "check", "evaluate", "report", "repair"):
        whole = ["--no-smooth"] if words[1] == "calibration" else []  # ranges of smoothed inputs are not extracted
        run(["mfptq", "convert", QWEN, "Qwen3.5-27B-NVFP4", "--calibration", "qwen.calibration.safetensors", *whole])
    if words[1] in ("calibrate", "calibration") and "--output" in words:
        Path(words[words.index("--output") + 1]).unlink(missing_ok=True)
    if words[1] == "push":
        return  # tests/hub does it: it needs a Hub that takes uploads
    if words[1] == "finish":
        run(["mfptq", "convert", *words[2:], "--shards", "1/1"])
    if words[1] == "demo":
        shutil.rmtree("mfptq-demo")
    run(words)


@pytest.mark.parametrize(("path", "block"), everywhere("python"))
def test_python_works(path: Path, block: str, workspace: Path, capsys) -> None:
    exec(compile(block, f"{path.name}", "exec"), {"__name__": "__main__"})


LISTS = [
    (name, option.opts[0], value)
    for name, command in commands()
    for option in options(command)
    for value in re.findall(r"(?:^|(?<=, ))[a-z0-9_]+(?=,|\.$)", (option.help or "").partition(": ")[2])
    if re.fullmatch(r"[a-z0-9_]+(, [a-z0-9_]+)+\.", (option.help or "").partition(": ")[2])
]
CHOICES = [
    *LISTS,
    *(("mfptq plan", "--method", value) for value in ("search", "minmax", "weighted", "hessian", "hessian+", "gptq", "auto")),
    *(("mfptq plan", "--scheme", value) for value in ("NVFP4", "NVFP4A16")),
    *(("mfptq plan", "--device", value) for value in ("cpu", "auto")),
    *(("mfptq plan", "--input-scales-kind", value) for value in ("input_global_scale", "input_scale", "amax")),
]  # fmt: skip


def test_choices_of_a_type_are_accepted() -> None:
    found = {
        option.opts[0]: option
        for _, command in commands()
        for option in options(command)
        if isinstance(option.type, click.Choice)
    }
    assert found.keys() >= {"--kind", "--input-scales-kind", "--statistics", "--dtype"}
    for option in found.values():
        assert [option.type.convert(value, option, None) for value in option.type.choices] == list(option.type.choices)


@pytest.mark.parametrize(("name", "option", "value"), CHOICES)
def test_every_named_choice_is_accepted(name: str, option: str, value: str, calibrated: Path, capsys) -> None:
    [found] = [each for each in options(dict(commands())[name]) if option in each.opts]
    assert value in (found.help or "") or value in getattr(found.type, "choices", ())
    modules = [member for _, members in layers_of(calibrated / QWEN).values() for member in members]
    (calibrated / "numbers.json").write_text(
        json.dumps(dict.fromkeys(modules, 3.2 if value != "input_scale" else 0.01))
    )
    words = [*name.split(), QWEN, option, value]
    if name == "mfptq convert":
        words.insert(3, "converted")
    if option == "--input-scales-kind":
        words += ["--input-scales", "numbers.json"]
    elif option in ("--method", "--scheme") and value != "NVFP4A16":
        words += ["--calibration", "full.calibration.safetensors"]
    run(words)


@pytest.mark.parametrize(
    "path",
    [*DOCUMENTS, ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "README.md"],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        place, _, anchor = link.partition("#")
        if place.startswith(SITE):
            target = ROOT / place.removeprefix(SITE)
        elif place.startswith("https://"):
            continue
        else:
            assert path != ROOT / "README.md", f"{link}: links of the README must be absolute, PyPI shows it too"
            target = path.parent / place if place else path
        assert target.exists(), link
        assert not anchor or anchor in _anchors(target), link


def _anchors(path: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    assert not [
        path.name for path in (ROOT / "docs").glob("*.md") if path.name != "README.md" and f"({path.name})" not in index
    ]


def test_the_readme_is_for_four_minutes() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(re.findall(r"^```\w+$", text, re.MULTILINE)) <= 6
    assert len(re.sub(r"```.*?```|https?://\S+", "", text, flags=re.DOTALL).split()) <= 520


def test_the_plan_in_the_readme_looks_as_plans_do(workspace: Path, capsys) -> None:
    run(["mfptq", "plan", QWEN])
    shown = capsys.readouterr().out
    [excerpt] = blocks(ROOT / "README.md", "text")
    header, *rows, total = excerpt.splitlines()
    assert header == shown.splitlines()[0]
    numbers = r"\d[\d,.-]*"  # of other layers
    for row in rows:
        assert re.sub(numbers, "#", row.split("  ")[-1]) in re.sub(numbers, "#", shown)
    number = r"[\d.]+( [GMk]?B)?"
    assert re.sub(number, "#", total) in re.sub(number, "#", shown)


def test_the_architecture_names_what_exists() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    files = re.findall(r"`(\w+/\w+\.py)`", text)
    assert len(files) > 10
    assert not [file for file in files if not (ROOT / "mfptq" / file).exists()]
    for file, name in re.findall(r"`(\w+/\w+\.py)`: `(\w+)`", text):
        assert f"class {name}" in (ROOT / "mfptq" / file).read_text(), (file, name)
