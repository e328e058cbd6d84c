import logging
import signal
from itertools import count
from types import SimpleNamespace

import pytest

from pipelines import checkpoints
from pipelines.checkpoints import KEPT, STOPPING, file_away, newest
from tests.pipelines.training import drifting, elsewhere, made_cube, trained_on

STEPS = 7


@pytest.fixture(scope="module")
def trained():
    with elsewhere() as trainings:
        yield lambda cube, run, batches=1, number=0, at=0: trainings(
            cube, run, STEPS, number, at, trainer={"accumulate_grad_batches": batches}
        )


@pytest.fixture(scope="module")
def cube(tmp_path_factory):
    return made_cube(tmp_path_factory.mktemp("cube") / "cube", drifting(40))


@pytest.fixture(scope="module")
def whole(trained, cube, tmp_path_factory):
    """The weights of trainings that nobody disturbed, by micro-batches of a step."""
    folder = tmp_path_factory.mktemp("whole")
    runs = {batches: folder / str(batches) for batches in (1, 2)}
    assert [trained(cube, run, batches) for batches, run in runs.items()] == [[0], [0]]
    return {batches: (run / "model.safetensors").read_bytes() for batches, run in runs.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("batches", "at"), [(1, 1), (1, 5), (1, 7), (2, 8)])
def test_killed_at_any_step_the_same_command_goes_on_to_the_same_bytes(
    trained, cube, whole, tmp_path, batches, at
):
    assert trained(cube, tmp_path, batches, signal.SIGKILL, at) == [-signal.SIGKILL]
    assert not (tmp_path / "model.safetensors").exists()
    assert trained(cube, tmp_path, batches) == [0]
    assert (tmp_path / "model.safetensors").read_bytes() == whole[batches]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "batches", "at", "kept"),
    [(signal.SIGTERM, 1, 6, 6), (signal.SIGINT, 2, 7, 4)],
)
def test_told_to_stop_it_finishes_the_step_writes_it_down_and_loses_nothing(
    trained, cube, whole, tmp_path, number, batches, at, kept
):
    assert trained(cube, tmp_path, batches, number, at) == [130]
    assert newest(tmp_path / "checkpoints").name.startswith(f"step-{kept:08d}-")
    assert trained(cube, tmp_path, batches) == [0]
    assert (tmp_path / "model.safetensors").read_bytes() == whole[batches]


def test_where_checks_are_far_apart_a_checkpoint_is_written_after_a_while(cube, tmp_path, monkeypatch):
    minutes = count(0, 60.0)  # each look at the clock is a minute later
    filed = []
    monkeypatch.setattr(checkpoints, "time", SimpleNamespace(monotonic=lambda: next(minutes)))
    monkeypatch.setattr(checkpoints, "file_away", lambda path, step: filed.append(step))
    trained_on(cube, tmp_path, steps=20, check_every=1000, validation=0.0)
    assert filed == [6, 12, 18, 20]


def test_a_training_that_is_over_gives_the_signals_back(cube, tmp_path):
    before = {number: signal.getsignal(number) for number in STOPPING}
    trained_on(cube, tmp_path, steps=1, validation=0.0)
    assert {number: signal.getsignal(number) for number in STOPPING} == before


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut short", "a bit flipped"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_it(trained, cube, whole, tmp_path, damage):
    assert trained(cube, tmp_path, 1, signal.SIGKILL, 7) == [-signal.SIGKILL]
    last = newest(tmp_path / "checkpoints")
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes(bytes(content[:-200] if damage == "cut short" else content))
    assert trained(cube, tmp_path, 1) == [0]
    assert (tmp_path / "model.safetensors").read_bytes() == whole[1]


def written(folder, step, content):
    folder.mkdir(exist_ok=True)
    (folder / "unfinished.ckpt").write_bytes(content)
    return file_away(folder / "unfinished.ckpt", step)


def test_the_newest_two_are_kept_and_nothing_half_written_is_one_of_them(tmp_path):
    paths = [written(tmp_path, step, bytes([step])) for step in (3, 6, 9)]
    (tmp_path / "unfinished.ckpt").write_bytes(b"half")
    assert newest(tmp_path) == paths[-1]
    assert not paths[0].exists() and paths[1].exists()
    assert KEPT == 2


def test_a_damaged_one_is_named_and_the_one_before_it_is_taken(tmp_path, caplog):
    older, newer = written(tmp_path, 3, b"three"), written(tmp_path, 6, b"six")
    newer.write_bytes(b"sux")
    with caplog.at_level(logging.WARNING):
        assert newest(tmp_path) == older
    assert f"{newer.name} is damaged" in caplog.text
    older.write_bytes(b"")
    assert newest(tmp_path) is None
    assert newest(tmp_path / "nowhere") is None


def test_a_step_that_is_done_again_replaces_what_was_damaged(tmp_path):
    older, newer = written(tmp_path, 3, b"three"), written(tmp_path, 6, b"six")
    newer.write_bytes(b"sux")
    again = written(tmp_path, 6, b"another six")
    assert sorted(path for path in tmp_path.iterdir()) == sorted([older, again])
