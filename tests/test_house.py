"""The house holds: who may import whom, and one storm from the source to a tile."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("metnet", "pipelines", "serve")
FORBIDDEN = {
    "metnet": {"xarray", "zarr", "icechunk", "hydra", "omegaconf", "lightning", "pipelines", "serve", "cli"},
    "pipelines": {"serve", "hydra", "omegaconf", "cli"},
    "serve": {"torch", "lightning", "metnet", "hydra", "omegaconf", "cli", "icechunk", "zarr"},
}
SERVE_MAY = {"grid", "cf", "frame", "cube", "runs", "palette", "version"}  # of pipelines
FLOORS = {  # within pipelines a file imports only from lower floors; a folder stands for its files
    name: floor
    for floor, names in enumerate(
        (
            ("words",),
            (
                "version",
                "progress",
                "palette",
                "grid",
                "counts",
                "cf",
                "repository",
                "motion",
                "spread",
                "manifest",
                "construct",
                "checked",
                "destination",
                "signals",
                "drop_out",
                "pretrained",
                "terms",
                "decoding",
                "formats",
                "feeds",
            ),
            (
                "formats.hdf5",
                "formats.codecs",
                "frame",
                "coordinates",
                "pictures",
                "formats.georeference",
                "feeds.web",
            ),
            ("formats.arrays", "observations", "sources.source", "quality"),
            (
                "formats.axes",
                "formats.packing",
                "feeds.places",
                "decoding.reader",
                "cube",
                "runs",
                "rain_index",
            ),
            (
                "sources",
                "quarantine",
                "static",
                "feeds.feed",
                "regrid",
                "decode",
                "baselines",
                "export",
                "run_blocks",
                "sample_store",
                "trained",
                "skill",
                "run_facts",
                "checkpoints",
                "validation",
            ),
            ("beside",),
            ("past", "augmentation", "run_folder", "trainer"),
            ("samples",),
            ("late", "calibrating", "sampling", "task", "figures", "report", "plain", "goals"),
            ("report_page", "export_model", "training_log", "training_pictures", "beginning"),
            ("ingest", "train", "forecast", "verify", "inspect", "rollback", "replay"),
            ("events",),
            ("bench_skill", "train_head"),
            ("ship",),
        )
    )
    for name in names
}
FAMILIES = {  # members never import each other; only the family's shared files
    "pipelines.sources": {"source"},
    "pipelines.baselines": set(),
    "metnet.scores": {"score"},
    "metnet.attention": {"lines", "multihead", "positions", "reversible"},
}

ABOVE = {"metnet.attention", "metnet.attention.published"}  # the face, and the loader of published weights


def modules(room: str) -> Iterator[tuple[str, Path]]:
    for path in sorted((ROOT / room).rglob("*.py")):
        yield ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), path


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("room", ROOMS)
def test_no_room_imports_what_it_must_not_know(room):
    wrong = [
        f"{name} imports {imported}"
        for name, path in modules(room)
        for imported in imports(path)
        if imported.split(".")[0] in FORBIDDEN[room]
    ]
    assert wrong == []


def test_serve_knows_of_pipelines_only_the_cellar():
    wrong = [
        f"{name} imports {imported}"
        for name, path in modules("serve")
        for imported in imports(path)
        if imported.startswith("pipelines.") and imported.split(".")[1] not in SERVE_MAY
    ]
    assert wrong == []


def floor_of(module: str) -> int:
    name = module.removeprefix("pipelines.")
    return FLOORS.get(name, FLOORS.get(name.split(".")[0], -1))


def test_nothing_in_pipelines_points_back_up():
    every = {name for name, _ in modules("pipelines")}
    assert [name for name in every - {"pipelines"} if floor_of(name) < 0] == [], "a file without a floor"
    wrong = [
        f"{name} imports {imported}"
        for name, path in modules("pipelines")
        for imported in imports(path)
        if imported in every and imported != "pipelines" and floor_of(imported) >= floor_of(name)
    ]
    assert wrong == []


@pytest.mark.parametrize("family", FAMILIES)
def test_members_of_a_family_do_not_know_each_other(family):
    members = {name.split(".")[-1] for name, _ in modules(family.replace(".", "/"))} - FAMILIES[family]
    wrong = [
        f"{name} imports {imported}"
        for name, path in modules(family.replace(".", "/"))
        if name not in ABOVE
        for imported in imports(path)
        if imported.startswith(f"{family}.") and imported.split(".")[2] in members - {name.split(".")[-1]}
    ]
    assert wrong == []


def test_the_server_never_loads_torch():
    code = "import sys, serve.app, serve.server; print([m for m in ('torch', 'lightning', 'metnet') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
