"""The same work anywhere gives the same answers in the same order."""

import os
import socket

import pytest
from distributed import LocalCluster

from pipelines.spread import spread


def square(number: int) -> int:
    return number * number


def worker(_: int) -> int:
    return os.getpid()


def test_without_workers_the_work_is_done_here():
    with spread() as workforce:
        assert workforce.is_here
        assert set(workforce.map(worker, range(3))) == {os.getpid()}


@pytest.mark.slow
def test_workers_answer_in_the_order_of_the_items():
    with spread(workers=2) as workforce:
        assert not workforce.is_here
        assert list(workforce.map(square, iter(range(20)))) == [n * n for n in range(20)]
        assert os.getpid() not in set(workforce.map(worker, range(8)))


@pytest.mark.slow
def test_a_scheduler_without_workers_is_an_error_and_not_a_wait_for_ever(monkeypatch):
    monkeypatch.setattr("pipelines.spread.PATIENCE", 1)
    with (
        LocalCluster(
            n_workers=0, host="127.0.0.1", dashboard_address="127.0.0.1:0", silence_logs=50
        ) as cluster,
        spread(scheduler=cluster.scheduler_address) as workforce,
        pytest.raises(OSError, match="has no workers"),
    ):
        list(workforce.map(square, range(3)))


def test_a_scheduler_that_does_not_answer_is_given_up(monkeypatch):
    monkeypatch.setattr("pipelines.spread.PATIENCE", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        scheduler = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        said = (
            rf"scheduler={scheduler}: .* and nobody answered within 1 s; start one there .* or give workers=N"
        )
        with pytest.raises(OSError, match=said), spread(scheduler=scheduler):
            pass


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"workers": -1}, "expected 0"),
        ({"workers": 2, "scheduler": "tls://a:1"}, "give one of them"),
        ({"scheduler": "tcp://10.0.0.7:8786"}, "expected tls://"),
        ({"scheduler": "http://localhost:8786"}, "expected tls://"),
    ],
)
def test_what_is_not_safe_or_makes_no_sense_is_refused(asked, said):
    with pytest.raises(ValueError, match=said), spread(**asked):
        pass
