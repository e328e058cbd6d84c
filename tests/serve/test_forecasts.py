"""The reader: one snapshot an answer, bounded memory, honest about age."""

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

import serve.forecasts
from pipelines.grid import Grid
from pipelines.runs import ForecastStore
from serve.app import create_app
from serve.forecasts import Forecasts
from serve.geometry import lonlat
from serve.problems import Problem
from tests.serve.conftest import EUROPE, INIT, LEADS, QUANTILES, THRESHOLDS, Client, Service, block, write


def test_every_field_is_the_array_that_was_written(service: Service) -> None:
    run = service.forecasts.run()
    for lead in range(len(LEADS)):
        expected = {
            "rainfall_rate_median": service.written.median[lead],
            "rainfall_rate_mean": service.written.mean[lead],
            **{
                f"probability_of_exceedance_{t:g}": service.written.exceedance[lead, i]
                for i, t in enumerate(THRESHOLDS)
            },
            **{
                f"rainfall_rate_quantile_{q:g}": service.written.quantile[i, lead]
                for i, q in enumerate(QUANTILES)
            },
        }
        assert set(expected) == set(run.quantities)
        for name, values in expected.items():
            np.testing.assert_array_equal(service.forecasts.field(run, run.quantity(name), lead), values)


@pytest.mark.parametrize("fields", [0, 1, 3, 7])
def test_memory_stays_within_its_bound_and_values_stay_right(service: Service, fields: int) -> None:
    limit = fields * 128 * 128 * 4
    forecasts = Forecasts(str(service.path), cache_bytes=limit)
    run = forecasts.run()
    for lead in (0, 5, 2, 0, 4):
        for name in ("rainfall_rate_median", "probability_of_exceedance_5"):
            forecasts.field(run, run.quantity(name), lead)
            held = forecasts._fields._fields.values()
            assert sum(values.nbytes for values in held) == forecasts._fields._held <= limit
    np.testing.assert_array_equal(
        forecasts.field(run, run.quantity("probability_of_exceedance_5"), 3), service.written.exceedance[3, 3]
    )


def test_a_field_asked_for_again_is_not_read_again(service: Service) -> None:
    forecasts = Forecasts(str(service.path))
    run = forecasts.run()
    first = forecasts.field(run, run.quantity("rainfall_rate_mean"), 2)
    assert forecasts.field(run, run.quantity("rainfall_rate_mean"), 2) is first


def test_many_readers_of_one_field_read_it_once(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    forecasts = Forecasts(str(service.path))
    run = forecasts.run()
    together, reads = threading.Barrier(8), []
    read = serve.forecasts._read
    monkeypatch.setattr(serve.forecasts, "_read", lambda *args: (reads.append(1), read(*args))[1])

    def ask(_: int) -> float:
        together.wait()
        return float(np.nansum(forecasts.field(run, run.quantity("rainfall_rate_mean"), 1)))

    with ThreadPoolExecutor(8) as pool:
        sums = set(pool.map(ask, range(8)))

    assert sums == {float(np.nansum(service.written.mean[1]))}
    assert len(reads) == 1


def test_a_reading_that_fails_is_told_to_all_and_tried_again(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    forecasts = Forecasts(str(service.path))
    run = forecasts.run()
    with monkeypatch.context() as patch:
        patch.setattr(serve.forecasts, "_read", lambda *_: (_ for _ in ()).throw(OSError("disk")))
        with pytest.raises(OSError, match="disk"):
            forecasts.field(run, run.quantity("rainfall_rate_mean"), 1)
    np.testing.assert_array_equal(
        forecasts.field(run, run.quantity("rainfall_rate_mean"), 1), service.written.mean[1]
    )


def test_a_run_turns_stale_when_its_time_is_over(own_service: Service) -> None:
    own_service.clock.now = INIT + timedelta(hours=1)
    assert not own_service.forecasts.run().stale
    own_service.clock.now += timedelta(seconds=1)
    assert own_service.forecasts.run().stale
    write(own_service.path, INIT + timedelta(minutes=30))
    assert not own_service.forecasts.run().stale
    assert own_service.forecasts.run(f"{INIT:%Y%m%dT%H%M%SZ}").stale


def test_a_new_run_is_seen_and_an_older_run_written_later_is_not_the_newest(own_service: Service) -> None:
    newer, older = INIT + timedelta(minutes=10), INIT - timedelta(minutes=10)
    write(own_service.path, newer)
    write(own_service.path, older)
    assert own_service.forecasts.run().header.init_time == newer
    _, runs = own_service.forecasts.newest(2)
    assert [run.header.init_time for run in runs] == [newer, INIT]


def test_the_store_is_looked_at_no_more_often_than_asked(own_service: Service) -> None:
    patient = Forecasts(str(own_service.path), poll=timedelta(hours=1))
    write(own_service.path, INIT + timedelta(minutes=10))
    assert patient.run().header.init_time == INIT


def test_the_last_snapshot_is_served_while_the_store_cannot_be_read(
    own_service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(ForecastStore, "refresh", lambda _: (_ for _ in ()).throw(OSError("unplugged")))
        assert own_service.forecasts.run().header.init_time == INIT
        assert not own_service.forecasts.reachable
        assert own_service.client.get("/healthz").status_code == 503
    assert own_service.client.get("/healthz").json()["status"] == "ok"


def test_a_store_that_goes_away_before_it_was_looked_at_is_told_as_one_that_goes_later(
    tmp_path: Path,
) -> None:
    write(tmp_path / "forecasts")
    client = Client(create_app(Forecasts(str(tmp_path / "forecasts"), poll=timedelta(0))))
    (tmp_path / "forecasts").rename(tmp_path / "elsewhere")
    for address in ("/healthz", "/readyz"):
        answer = client.get(address)
        assert (answer.status_code, answer.json()["status"]) == (503, "unreadable")
    (tmp_path / "elsewhere").rename(tmp_path / "forecasts")
    assert client.get("/healthz").status_code == 200


@pytest.mark.parametrize(
    "address", ["/forecast?lat={lat}&lon={lon}", "/tiles/latest/rainfall_rate_mean/10/0/0/0.png"]
)
def test_what_the_store_does_not_give_is_asked_for_later(
    address: str, own_service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    away = own_service.path.with_name("elsewhere")
    lon, lat = lonlat(EUROPE.window(64, 64, 1, 1))
    address = address.format(lon=lon[0, 0], lat=lat[0, 0])
    own_service.path.rename(away)
    answers = [own_service.client.get(address) for _ in range(2)]
    away.rename(own_service.path)
    for answer in answers:
        assert (answer.status_code, answer.json()["status"]) == (503, 503)
        assert "ask again" in answer.json()["detail"]
    told = [record for record in caplog.records if record.name == "serve.forecasts"]
    assert sum("serving its last snapshot" in record.message for record in told) == 1
    assert not any(record.exc_info for record in told), "a line each, no traceback"
    assert own_service.client.get(address).status_code == 200
    assert "can be read again" in caplog.records[-1].message


def test_a_newest_run_that_cannot_be_read_leaves_the_last_snapshot_and_is_told(
    own_service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(own_service.path, INIT + timedelta(minutes=10))
    with monkeypatch.context() as patch:
        patch.setattr(ForecastStore, "header", lambda *_: (_ for _ in ()).throw(OSError("unplugged")))
        assert own_service.forecasts.run().header.init_time == INIT
        assert own_service.client.get("/healthz").status_code == 503
    assert own_service.forecasts.run().header.init_time == INIT + timedelta(minutes=10)


def test_no_answer_mixes_two_runs_while_runs_are_committed(own_service: Service) -> None:
    """Run k is 10 minutes later and has its own storms; a reader must never see k's name with another's rain."""
    expected = {f"{INIT:%Y%m%dT%H%M%SZ}": own_service.written.mean[3, 40]}
    stop = threading.Event()
    seen: set[str] = set()

    def read() -> None:
        while not stop.is_set():
            run = own_service.forecasts.run()
            row = own_service.forecasts.field(run, run.quantity("rainfall_rate_mean"), 3)[40]
            np.testing.assert_array_equal(row, expected[run.name])
            assert run.dataset.attrs["title"].endswith(f"{run.header.init_time:%Y-%m-%dT%H:%M:%SZ}")
            seen.add(run.name)

    with ThreadPoolExecutor(4) as pool:
        readers = [pool.submit(read) for _ in range(4)]
        try:
            for step in range(1, 4):
                moment = INIT + timedelta(minutes=10 * step)
                expected[f"{moment:%Y%m%dT%H%M%SZ}"] = block(EUROPE, step).mean[3, 40]
                write(own_service.path, moment, seed=step)
                own_service.forecasts.run()
        finally:
            stop.set()
        for reader in readers:
            reader.result()
    assert len(seen) >= 2


def test_a_place_is_found_in_its_cell_and_nowhere_else(service: Service) -> None:
    run = service.forecasts.run()
    lon, lat = EUROPE.lonlat()
    for row, column in ((0, 0), (0, 127), (127, 0), (127, 127), (64, 31)):
        cell = run.cell(float(lon[row, column]), float(lat[row, column]))
        assert (cell.row, cell.column) == (row, column)
        assert (cell.lon, cell.lat) == pytest.approx((lon[row, column], lat[row, column]), abs=1e-5)
    wider = Grid(EUROPE.crs, EUROPE.x_first - 8000, 8000, 130, EUROPE.y_first + 8000, -8000, 130)
    beyond = wider.lonlat()
    for row, column in ((0, 0), (0, 64), (129, 129), (64, 0), (64, 129), (129, 5)):
        with pytest.raises(Problem, match="outside the domain"):
            run.cell(float(beyond[0][row, column]), float(beyond[1][row, column]))


def test_the_outline_goes_round_the_outer_edge_of_the_cells(service: Service) -> None:
    run = service.forecasts.run()
    rows, columns = EUROPE.cells(*np.array(run.outline).T)
    assert run.outline[0] == run.outline[-1]
    on_edge = (
        np.isclose(rows, -0.5, atol=1e-3)
        | np.isclose(rows, 127.5, atol=1e-3)
        | np.isclose(columns, -0.5, atol=1e-3)
        | np.isclose(columns, 127.5, atol=1e-3)
    )
    assert on_edge.all()
    assert {(round(r), round(c)) for r, c in zip(rows * 2, columns * 2, strict=True)} >= {
        (-1, -1),
        (-1, 255),
        (255, 255),
        (255, -1),
    }


def test_a_path_without_forecasts_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=str(tmp_path)):
        Forecasts(str(tmp_path / "nothing"))


def test_an_empty_store_is_served_and_says_that_it_is_empty(tmp_path: Path) -> None:
    ForecastStore.open_or_create(str(tmp_path / "forecasts"))
    client = Client(create_app(Forecasts(str(tmp_path / "forecasts"), poll=timedelta(0))))
    assert client.get("/healthz").json()["status"] == "empty"
    assert (client.get("/healthz").status_code, client.get("/readyz").status_code) == (200, 503)
    assert client.get("/runs").json()["runs"] == []
    assert client.get("/forecast?lat=48&lon=9").status_code == 404
    write(tmp_path / "forecasts")
    assert client.get("/forecast?lat=48&lon=9").status_code == 200
