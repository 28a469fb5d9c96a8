"""What the documents say can be done, named or generated is so."""

from __future__ import annotations

import ast
import re
import runpy
import shlex
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import get_args_parser

from dti_dist.cli import check
from dti_dist.config import load_config, validate_config
from dti_dist.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    ROOT / "benchmarks/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
BY_NAME = pytest.mark.parametrize(
    "document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT))
)
# How many of each a document has at least, so that no check passes because it finds nothing.
AT_LEAST = {
    "README.md": {"commands": 10, "configs": 1, "links": 25, "places": 10, "tests": 1},
    "CONTRIBUTING.md": {"links": 1, "places": 30, "tests": 2},
    "CHANGELOG.md": {"commands": 5, "places": 3},
    "benchmarks/README.md": {"commands": 3, "links": 1},
    "docs/ablation.md": {"commands": 2},
    "docs/choosing.md": {"commands": 3, "links": 2},
    "docs/cluster.md": {"commands": 3, "links": 3, "places": 4, "tests": 18},
    "docs/configuration.md": {"commands": 1, "places": 2},
    "docs/containers.md": {"links": 2, "places": 2, "tests": 1},
    "docs/daily.md": {"commands": 4, "links": 3, "tests": 1},
    "docs/data_stream.md": {"commands": 1, "links": 2, "tests": 15},
    "docs/evaluation.md": {"commands": 4, "links": 1, "tests": 10},
    "docs/exported_models.md": {"commands": 3, "links": 3, "tests": 3},
    "docs/faq.md": {"commands": 2, "links": 2},
    "docs/formats.md": {"commands": 3, "links": 5},
    "docs/isolation.md": {"links": 2, "tests": 1},
    "docs/object_stores.md": {"commands": 2, "configs": 1, "links": 1, "tests": 25},
    "docs/plan.md": {"commands": 2, "tests": 3},
    "docs/preparing_data.md": {"commands": 7, "links": 3, "places": 1},
    "docs/requests.md": {"commands": 3, "links": 3, "places": 3},
    "docs/report.md": {"commands": 3, "links": 1, "tests": 6},
    "docs/scale.md": {"commands": 7, "links": 3, "places": 1, "tests": 4},
    "docs/scoreboard.md": {"commands": 4, "links": 3, "tests": 3},
    "docs/scoring.md": {"commands": 3, "links": 1, "places": 1, "tests": 1},
    "docs/tasks.md": {"commands": 2, "links": 1, "tests": 5},
    "docs/training.md": {"commands": 10, "links": 8},
    "docs/your_data.md": {"commands": 9, "links": 7, "places": 1},
}
# Names of places in the repository; others, such as runs/shop, are the reader's.
PLACE = re.compile(
    r"(?<![\w/.-])(?:\./)?(?:dti_dist|docs|launch|tests|deepspeed_configs|\.ci)/[\w./-]*[\w/]"
)
PROGRAM = {
    "-m dti_dist.training": ["train"],
    "--module dti_dist.training": ["train"],
    "-m dti_dist": [],
    "dti-dist": [],
}


def script(name: str) -> dict[str, Any]:
    """What a script under docs/ defines."""
    sys.path.insert(0, str(ROOT / "docs"))  # as when it is run
    try:
        return runpy.run_path(str(ROOT / "docs" / f"{name}.py"))
    finally:
        sys.path.pop(0)


def text(document: Path) -> str:
    return document.read_text(encoding="utf-8")


def fenced(document: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text(document), re.M | re.S)


def commands(document: Path) -> list[str]:
    """Command lines in bash blocks and code spans that run the program or a launcher of it."""
    lines = [
        line
        for block in fenced(document, "bash")
        for line in block.replace("\\\n", " ").splitlines()
    ]
    prose = re.sub(r"^```.*?^```", "", text(document), flags=re.M | re.S)
    lines += re.findall(r"`([^`\n]+)`", prose)
    return [line for line in lines if re.match(r"(dti-dist|torchrun|deepspeed|python -m) ", line)]


def own_arguments(command: str) -> list[str]:
    """What the program's parser gets of a command line."""
    words = shlex.split(command, comments=True)
    for call, before in PROGRAM.items():
        size = len(call.split())
        for at in range(len(words)):
            if words[at : at + size] == call.split():
                return before + words[at + size :]
    raise AssertionError(f"{command!r} runs nothing of this program")


def faults(text: str, arguments: list[str]) -> list[str]:
    """Why the parser refuses the arguments; a command named alone need only exist."""
    if len(arguments) == 1:
        arguments = [*arguments, "--help"]
    refused = check(arguments)
    return [f"{text}: {refused}"] if refused else []


def refused_by_torchrun(lines: list[str]) -> list[str]:
    """The torchrun lines whose options torchrun does not know."""
    refused = []
    for line in lines:
        words = shlex.split(line)
        if words[0] == "torchrun":
            try:
                get_args_parser().parse_args(words[1:])
            except SystemExit:
                refused.append(line)
    return refused


def links(document: Path) -> list[str]:
    """Targets of links to files and headings; URLs are not followed."""
    targets = re.findall(r"\]\(([^)\s]+)\)", text(document))
    return [target for target in targets if "://" not in target]


def leads_somewhere(document: Path, target: str) -> bool:
    name, _, anchor = target.partition("#")
    path = document.parent / name if name else document
    if not path.exists():
        return False
    headings = re.findall(r"^#+ (.+)$", text(path), re.M) if anchor else []
    anchors = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
    return not anchor or anchor in anchors


def places(document: Path) -> list[str]:
    return PLACE.findall(text(document))


def named_tests(document: Path) -> list[str]:
    """Tests by their whole name, or the part of it that `-k` selects."""
    return ["".join(name) for name in re.findall(r"`(test_\w+)`|run\.sh -k (\w+)", text(document))]


def unknown_tests(names: list[str]) -> list[str]:
    tests = [
        f"{path.name}::{name}"
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", text(path), re.M)
    ]
    return [name for name in names if not any(name in test for test in tests)]


@BY_NAME
def test_the_checks_find_in_a_document_what_it_has(document):
    found = {
        "commands": len(commands(document)),
        "configs": len(fenced(document, "yaml")),
        "links": len(links(document)),
        "places": len(places(document)),
        "tests": len(named_tests(document)),
    }
    expected = AT_LEAST[str(document.relative_to(ROOT))]
    assert {what: found[what] for what in expected if found[what] < expected[what]} == {}


def test_the_checks_find_seeded_faults(tmp_path, capsys):
    document = tmp_path / "faulty.md"
    document.write_text("""
Run `dti-dist publish` or `torchrun --ranks 2 -m dti_dist.training shop.yaml`. See [there](gone.md),
[here](#no-such-heading) and `dti_dist/gone.py`; `test_that_nobody_wrote` and
`./tests/run.sh -k nobody_wrote` hold it.

```bash
dti-dist evaluate runs/x --splits test
dti-dist export \\
  runs/x
```

```yaml
run_dir: runs/x
daat: {}
```
""")
    lines = commands(document)
    assert [bool(faults(line, own_arguments(line))) for line in lines] == [True, True, True, False]
    assert refused_by_torchrun(lines) == lines[3:]
    (block,) = fenced(document, "yaml")
    with pytest.raises(UserError, match="daat"):
        validate_config(yaml.safe_load(block), where="faulty.md")
    assert [leads_somewhere(document, target) for target in links(document)] == [False, False]
    assert [(ROOT / place).exists() for place in places(document)] == [False, True]
    names = named_tests(document)
    assert unknown_tests(names) == names == ["test_that_nobody_wrote", "nobody_wrote"]


@BY_NAME
def test_every_command_line_is_one_that_the_program_accepts(document):
    refused = [fault for line in commands(document) for fault in faults(line, own_arguments(line))]
    assert not refused


@BY_NAME
def test_every_torchrun_line_is_one_that_torchrun_accepts(document):
    assert not refused_by_torchrun(commands(document))


@BY_NAME
def test_every_yaml_block_is_a_valid_config(document):
    for block in fenced(document, "yaml"):
        validate_config(yaml.safe_load(block), where=document.name)


def test_every_config_key_on_a_command_line_exists():
    for document in DOCUMENTS:
        for line in [
            *commands(document),
            *re.findall(r"`(\./launch/demo\.sh .+?)`", text(document)),
        ]:
            if line.startswith("dti-dist prepare "):  # NAME=EXPRESSION of a label
                continue
            overrides = [word for word in shlex.split(line) if re.match(r"[a-z_.]+=", word)]
            load_config(ROOT / "launch/recipes/demo.yaml", overrides)


@pytest.mark.parametrize("recipe", sorted((ROOT / "launch/recipes").glob("*.yaml")), ids=str)
def test_every_recipe_is_a_valid_config(recipe):
    load_config(recipe)


@BY_NAME
def test_every_link_leads_somewhere(document):
    dead = [target for target in links(document) if not leads_somewhere(document, target)]
    assert not dead


@BY_NAME
def test_every_place_in_the_repository_that_is_named_exists(document):
    missing = [place for place in places(document) if not (ROOT / place).exists()]
    assert not missing


@BY_NAME
def test_every_test_that_is_named_exists(document):
    assert not unknown_tests(named_tests(document))


def test_every_error_that_is_explained_is_one_of_the_programs():
    files = sorted((ROOT / "dti_dist").rglob("*.py"))
    program = re.sub(r'"\s*f?"', "", " ".join(map(text, files)))  # texts over several lines
    bold = re.findall(r"\*\*(.+?)\*\*", text(ROOT / "docs/faq.md"), re.S)
    quoted = [quote for entry in bold for quote in re.findall(r"`([^`]+)`", entry)]
    assert len(quoted) > 12
    assert not [quote for quote in quoted if quote not in program]


def test_configuration_page_is_up_to_date():
    assert text(ROOT / "docs/configuration.md") == script("make_configuration")["page"](), (
        "run: python docs/make_configuration.py"
    )


def test_mask_picture_is_up_to_date():
    assert text(ROOT / "docs/mask.svg") == script("make_mask_picture")["draw"](), (
        "run: python docs/make_mask_picture.py"
    )


def test_requests_picture_is_that_of_its_table():
    picture = script("make_requests_picture")
    assert text(ROOT / "docs/requests.svg") == picture["draw"](picture["read_table"]()), (
        "run: python docs/make_requests_picture.py"
    )


def test_the_commands_of_requests_are_those_of_its_picture():
    picture = script("make_requests_picture")
    prepare, train, *_ = commands(ROOT / "docs/requests.md")
    assert shlex.split(prepare)[3:11] == picture["DATA"]
    assert shlex.split(train)[2:-3] == picture["CONFIG"]


# The rooms of the package from the top down, as in CONTRIBUTING.md: each imports from those below.
FLOORS = [
    {"__main__"},
    {"cli"},
    {"reporting"},
    {"benchmarks"},
    {"daily", "export", "training"},
    {"evaluation", "serving", "reading"},
    {"costs", "runs"},
    {"inputs", "zero"},
    {"model"},
    {"data"},
    {"config", "gpus", "options", "ranks", "sql"},
    {"attention"},
    {"console", "files"},
    {"redaction"},
    {"errors", "host", "launcher", "words"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def room_of(module: str) -> str:
    return module.removeprefix("dti_dist").lstrip(".").partition(".")[0]


def imports(file: Path) -> list[str]:
    """Modules of the package that a file imports, anywhere in it."""
    found = []
    for node in ast.walk(ast.parse(text(file))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            places = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [place if place in MODULES else node.module for place in places]
    return sorted({name for name in found if name.startswith("dti_dist.")})


MODULES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts): file
    for file in sorted((ROOT / "dti_dist").rglob("*.py"))
    if file.name != "__init__.py"
}
WAYS_IN = {"dti_dist.training.__main__"}  # a file that is run, above all rooms


def test_every_room_has_its_floor():
    assert {room_of(module) for module in MODULES} == set(FLOOR)


@pytest.mark.parametrize("module", MODULES)
def test_rooms_import_from_the_floors_below(module):
    room = room_of(module)
    for imported in imports(MODULES[module]):
        below = room_of(imported)
        allowed = below == room or FLOOR[below] > FLOOR[room] or module in WAYS_IN
        assert allowed, f"{module} imports {imported}"


def test_no_files_import_each_other_in_a_circle():
    graph = {module: imports(file) for module, file in MODULES.items()}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"a circle of imports: {error.args[1]}")


def test_the_path_of_a_batch_goes_in_one_direction():
    """The files that CONTRIBUTING.md lists, in order: none imports a later one."""
    (path,) = re.findall(
        r"^### The path of a batch\n(.*?)^#", text(ROOT / "CONTRIBUTING.md"), re.M | re.S
    )
    files = re.findall(r"`(dti_dist/[\w/]+\.py)`", path)
    modules = [file.removesuffix(".py").replace("/", ".") for file in files]
    assert len(modules) > 10
    for at, module in enumerate(modules):
        assert not set(imports(MODULES[module])) & set(modules[at + 1 :]), module
