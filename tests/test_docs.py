"""What the documents say can be pasted, and names what there is."""

import ast
import builtins
import re
from pathlib import Path

import pytest

import cli

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
SNIPPETS = [
    pytest.param(found[1], id=f"{document.name}:{number}")
    for document in DOCUMENTS
    for number, found in enumerate(
        re.finditer(r"^```python\n(.*?)^```$", document.read_text(), re.MULTILINE | re.DOTALL)
    )
]


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_a_snippet_of_python_finds_its_imports_and_defines_every_other_name(snippet):
    tree = ast.parse(snippet)
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    known = dict(vars(builtins))
    exec(compile(ast.Module(imports, []), "snippet", "exec"), known)
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    known |= {node.id: None for node in names if isinstance(node.ctx, ast.Store)}
    assert {node.id for node in names} - set(known) == set()


def test_there_are_snippets_to_check():
    assert len(SNIPPETS) >= 3


def test_the_plan_of_the_house_names_every_command_and_every_group_of_configs():
    rooms = (ROOT / "docs" / "architecture.md").read_text().split("\n### ")
    [commands] = re.findall(
        r"commands `([^`]*)`", next(room for room in rooms if room.startswith("`cli.py`"))
    )
    assert set(commands.split()) == set(cli.COMMANDS)
    configs = next(room for room in rooms if room.startswith("`configs/`"))
    assert set(re.findall(r"(\w+)/[ `]", configs)) - {"configs"} == {
        folder.name for folder in cli.CONFIGS.iterdir() if folder.is_dir()
    }


def test_every_benchmark_is_told_of_with_its_command():
    told = "".join(document.read_text() for document in DOCUMENTS)
    every = [path for path in (ROOT / "benchmarks").glob("[!_]*.py") if "__main__" in path.read_text()]
    assert len(every) > 10
    assert [path.stem for path in every if f"python -m benchmarks.{path.stem}" not in told] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_a_link_from_one_document_leads_to_another_and_to_a_heading_of_it(document):
    for path, _, anchor in re.findall(r"\]\(([^)#\s:]*)(#([^)\s]*))?\)", document.read_text()):
        target = document.parent / path if path else document
        assert target.exists(), path
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in {
                re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings
            }
