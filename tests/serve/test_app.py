"""What holds for every answer: caching, headers, methods, limits, and problems that tell nothing they should not."""

import asyncio
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest
import yaml
from fastapi import APIRouter, FastAPI
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from starlette.types import Receive, Scope, Send

from pipelines.runs import ForecastStore
from serve.app import Output, create_app
from serve.forecasts import Forecasts
from serve.page import FILES, FOLDER
from tests.serve.conftest import INIT, Client, Service, write

ROOT = Path(__file__).parents[2]
ALERTS = ROOT / "docs" / "alerts.yaml"
GOOD = [
    "/",
    "/?f=json",
    "/runs",
    "/forecast?lat=47&lon=8",
    "/tiles/latest/rainfall_rate_mean/10/5/16/11.png",
    "/conformance",
    "/collections",
    "/collections/nowcast",
    "/collections/nowcast/position?coords=POINT(8 47)",
    "/static/map.mjs",
    "/openapi.json",
]


OF_A_RUN = [
    address
    for address in GOOD
    if address not in ("/", "/?f=json", "/conformance", "/static/map.mjs", "/openapi.json")
]


def test_the_server_knows_no_torch() -> None:
    """What is served is data: neither the framework nor the engine is loaded."""
    code = (
        "import sys, serve.server; "
        "print([m for m in ('torch', 'lightning', 'metnet', 'hydra', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("address", GOOD)
def test_the_same_question_has_the_same_bytes_and_tag_and_then_304(service: Service, address: str) -> None:
    first = service.client.get(address)
    again = Client(create_app(Forecasts(str(service.path), clock=service.clock))).get(address)
    assert first.status_code == 200
    assert (again.content, again.headers["etag"]) == (first.content, first.headers["etag"])
    assert not first.headers["etag"].startswith("W/")
    for tags in (
        first.headers["etag"],
        f'"other", {first.headers["etag"]}',
        f"W/{first.headers['etag']}",
        "*",
    ):
        unchanged = service.client.get(address, {"if-none-match": tags})
        assert (unchanged.status_code, unchanged.content) == (304, b"")
        assert unchanged.headers["etag"] == first.headers["etag"]
    assert service.client.get(address, {"if-none-match": '"other"'}).content == first.content


def test_other_questions_have_other_tags(service: Service) -> None:
    others = [
        *GOOD,
        "/forecast?lat=47&lon=8.1",
        "/tiles/latest/rainfall_rate_mean/20/5/16/11.png",
        "/tiles/latest/rainfall_rate_median/10/5/16/11.png",
        "/collections/nowcast/position?coords=POINT(8 47)&datetime=2019-06-10T01:00:00Z",
        "/collections/nowcast/position?coords=POINT(8 47)&parameter-name=rainfall_rate_mean",
    ]
    assert len({service.client.get(address).headers["etag"] for address in others}) == len(others)


def test_a_new_run_and_old_age_change_the_tag_of_latest(own_service: Service) -> None:
    address = "/forecast?lat=47&lon=8"
    tags = [own_service.client.get(address).headers["etag"]]
    own_service.clock.now = INIT + timedelta(hours=2)
    stale = own_service.client.get(address, {"if-none-match": tags[0]})
    assert stale.status_code == 200
    assert stale.json()["stale"] is True
    tags.append(stale.headers["etag"])
    write(own_service.path, INIT + timedelta(hours=1, minutes=50))
    fresh = own_service.client.get(address, {"if-none-match": tags[1]})
    assert fresh.status_code == 200
    assert fresh.json()["run"] == "20190610T022000Z"
    assert fresh.json()["stale"] is False


def test_health_tells_how_fresh_the_newest_run_is(own_service: Service) -> None:
    healthy = own_service.client.get("/healthz")
    assert healthy.json() == {
        "status": "ok",
        "snapshot": own_service.forecasts.run().snapshot,
        "run": "20190610T003000Z",
        "init_time": "2019-06-10T00:30:00Z",
        "observed_until": "2019-06-10T00:30:00Z",
        "stale": False,
        "degraded": False,
    }
    assert healthy.headers["cache-control"] == "no-store"
    assert own_service.client.get("/readyz").json() == healthy.json()
    own_service.clock.now += timedelta(hours=1)
    stale, not_ready = own_service.client.get("/healthz"), own_service.client.get("/readyz")
    assert stale.json()["status"] == not_ready.json()["status"] == "stale"
    assert (stale.status_code, not_ready.status_code) == (200, 503)


@pytest.mark.parametrize("address", OF_A_RUN)
def test_what_is_of_a_run_says_when_it_was_made_and_whether_that_is_long_ago(
    own_service: Service, address: str
) -> None:
    """So does the 304 of each; and fresh and old never share a tag, so that no cache tells the one of the other."""
    told = []
    for now in (INIT + timedelta(minutes=12), INIT + timedelta(hours=2)):
        own_service.clock.now = now
        answer = own_service.client.get(address)
        unchanged = own_service.client.get(address, {"if-none-match": answer.headers["etag"]})
        assert (answer.status_code, unchanged.status_code) == (200, 304)
        assert unchanged.headers["metnet-stale"] == answer.headers["metnet-stale"]
        assert (
            unchanged.headers["metnet-init-time"]
            == answer.headers["metnet-init-time"]
            == "2019-06-10T00:30:00Z"
        )
        told.append((answer.headers["metnet-stale"], answer.headers["etag"]))
    assert [stale for stale, _ in told] == ["false", "true"]
    assert told[0][1] != told[1][1]


LATE = {
    "input_age_minutes": "20",
    "degraded": "true",
    "inputs_missing": "2019-06-10T01:20:00Z 2019-06-10T01:30:00Z",
}


def test_a_run_of_a_late_source_is_as_old_as_its_newest_frame_and_degraded(own_service: Service) -> None:
    write(own_service.path, INIT + timedelta(hours=1), facts=LATE)
    for minutes, stale in ((99, False), (101, True)):  # after the first run: 59 and 61 after 01:10
        own_service.clock.now = INIT + timedelta(minutes=minutes)
        point = own_service.client.get("/forecast?lat=47&lon=8")
        position = own_service.client.get("/collections/nowcast/position?coords=POINT(8 47)")
        [listed, before] = own_service.client.get("/runs").json()["runs"]
        for told in (
            point.json(),
            position.json()["metnet"],
            listed,
            own_service.client.get("/healthz").json(),
        ):
            assert (told["init_time"], told["observed_until"]) == (
                "2019-06-10T01:30:00Z",
                "2019-06-10T01:10:00Z",
            )
            assert (told["stale"], told["degraded"]) == (stale, True)
        assert point.headers["metnet-degraded"] == position.headers["metnet-degraded"] == "true"
        assert own_service.client.get("/readyz").status_code == (503 if stale else 200)
        assert not before["degraded"] and listed["made_by"]["inputs_missing"] == LATE["inputs_missing"]


def test_what_is_of_no_run_does_not_tell_its_age(service: Service) -> None:
    for address in set(GOOD) - set(OF_A_RUN):
        assert "metnet-stale" not in service.client.get(address).headers


@pytest.mark.parametrize("address", [*GOOD, "/healthz", "/readyz", "/nowhere", "/forecast?lat=x"])
def test_every_answer_carries_the_security_headers(service: Service, address: str) -> None:
    headers = service.client.get(address).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert "default-src 'self'" in headers["content-security-policy"]
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert "unsafe" not in headers["content-security-policy"]
    assert "access-control-allow-origin" not in headers


@pytest.mark.parametrize("address", GOOD)
def test_head_has_the_headers_of_get_and_no_body(service: Service, address: str) -> None:
    got, head = service.client.get(address), service.client.request("HEAD", address)
    assert head.content == b""
    assert head.status_code == 200
    for name in ("etag", "content-type", "content-length", "cache-control"):
        assert head.headers[name] == got.headers[name]


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW"])
def test_nothing_but_get_and_head_is_let_in(service: Service, method: str) -> None:
    answer = service.client.request(method, "/forecast?lat=47&lon=8")
    assert answer.status_code == 405
    assert answer.headers["allow"] == "GET, HEAD"
    assert answer.headers["content-type"] == "application/problem+json"


def test_a_long_address_is_refused(service: Service) -> None:
    assert service.client.get("/forecast?lat=" + "4" * 5000).status_code == 414


@pytest.mark.parametrize("query", [b"lat=\xff&lon=8", b"lat=47&lon=8&%ff=1", b"lat=47&lon=8&run=%00"])
def test_a_query_of_any_bytes_is_answered_or_refused(service: Service, query: bytes) -> None:
    app = service.client.app

    async def with_these_bytes(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "query_string": query}, receive, send)

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app=with_these_bytes)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get("/forecast")

    answer = asyncio.run(ask())
    assert answer.status_code in (200, 400, 404)
    assert answer.headers["x-content-type-options"] == "nosniff"


def failing(forecasts: Forecasts) -> APIRouter:
    router = APIRouter()

    @router.get("/broken")
    def broken() -> None:
        raise RuntimeError("secret in /home/someone")

    return router


def test_a_fault_of_ours_is_a_500_that_tells_no_secret(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    answer = Client(create_app(service.forecasts, more_outputs=[failing])).get("/broken")
    assert answer.status_code == 500
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "secret" not in answer.text
    assert "secret in /home/someone" in caplog.text


def metrics(app: FastAPI) -> dict[str, float]:
    """Every sample as Prometheus reads it, by its name and labels."""
    text = generate_latest(app.state.metrics).decode()
    families = list(text_string_to_metric_families(text))
    samples = [sample for family in families for sample in family.samples]
    return {
        f"{name}{{{','.join(f'{key}={value}' for key, value in labels.items())}}}" if labels else name: value
        for name, labels, value, *_ in samples
    }


def test_requests_are_counted_by_route_and_status_and_never_by_what_a_client_wrote(service: Service) -> None:
    client = Client(create_app(service.forecasts))
    for address in ("/runs", "/runs", "/forecast?lat=47&lon=8", "/forecast?lat=x", "/static/map.mjs"):
        client.get(address)
    for address in (
        "/secret-1",
        "/secret-2",
        "/tiles/latest/rain/10/5/16/11.png",
        "/static/secret",
        "/x?a=1&a=2",
    ):
        client.get(address)
    client.request("POST", "/runs")
    counted = metrics(client.app)
    answers = {key: value for key, value in counted.items() if key.startswith("metnet_http_requests_total")}
    assert answers == {
        f"metnet_http_requests_total{{route={route},status={status}}}": number
        for route, status, number in (
            ("/runs", 200, 2),
            ("/forecast", 200, 1),
            ("/forecast", 400, 1),
            ("/static/{name:path}", 200, 1),
            ("/static/{name:path}", 404, 1),
            ("/tiles/{run}/{quantity}/{lead}/{z}/{x}/{y}.png", 404, 1),
            ("none", 404, 2),
            ("none", 400, 1),
            ("none", 405, 1),
        )
    }
    assert counted["metnet_http_request_duration_seconds_count{route=/runs}"] == 2
    assert 0 < counted["metnet_http_request_duration_seconds_sum{route=/runs}"] < 60
    assert not any("secret" in key for key in counted)
    assert counted["metnet_http_requests_in_flight"] == 0


def test_metrics_tell_how_fresh_the_newest_run_is(
    own_service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told() -> tuple[float, float, float]:
        now = metrics(own_service.client.app)
        return (
            now["metnet_newest_run_init_timestamp_seconds"],
            now["metnet_stale"],
            now["metnet_store_reachable"],
        )

    assert told() == (INIT.timestamp(), 0, 1)
    own_service.clock.now += timedelta(hours=2)
    assert told() == (INIT.timestamp(), 1, 1)
    monkeypatch.setattr(ForecastStore, "refresh", lambda _: (_ for _ in ()).throw(OSError("unplugged")))
    assert told() == (INIT.timestamp(), 1, 0)


def test_metrics_of_an_empty_store_are_told(tmp_path: Path) -> None:
    ForecastStore.open_or_create(str(tmp_path / "forecasts"))
    now = metrics(create_app(Forecasts(str(tmp_path / "forecasts"))))
    assert (now["metnet_newest_run_init_timestamp_seconds"], now["metnet_stale"]) == (0, 1)


def test_the_alert_rules_name_only_metrics_and_labels_that_there_are(service: Service) -> None:
    client = Client(create_app(service.forecasts))
    client.get("/runs")
    there = metrics(client.app)
    rules = [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
    assert len(rules) >= 4
    for rule in rules:
        named = re.findall(r"(metnet_\w+)(?:{(.*?)})?", rule["expr"])
        assert named, rule["alert"]
        for name, selector in named:
            labels = [key for key in there if key == name or key.startswith(f"{name}{{")]
            assert labels, name
            for label in re.findall(r"(\w+)(?:=|!=|=~)\"", selector):
                assert f"{label}=" in labels[0]
        assert rule["annotations"]["summary"]


def waiting(gate: asyncio.Event) -> Output:
    def routes(forecasts: Forecasts) -> APIRouter:
        router = APIRouter()

        @router.get("/slow")
        async def slow() -> dict[str, str]:
            await gate.wait()
            return {}

        return router

    return routes


def test_beyond_its_limit_the_service_says_when_to_come_back(service: Service) -> None:
    async def crowd() -> tuple[httpx.Response, httpx.Response, list[httpx.Response]]:
        gate = asyncio.Event()
        app = create_app(service.forecasts, more_outputs=[waiting(gate)], max_in_flight=3)
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app=app), base_url="http://test"
        ) as client:
            inside = [asyncio.create_task(client.get("/slow")) for _ in range(3)]
            await asyncio.sleep(0.05)
            refused, health = await client.get("/runs"), await client.get("/healthz")
            for address in ("/readyz", "/static/map.mjs"):
                assert (await client.get(address)).status_code == 200
            counted = metrics(app)
            assert (
                counted["metnet_http_requests_in_flight"]
                == counted["metnet_http_requests_in_flight_limit"]
                == 3
            )
            gate.set()
            return refused, health, await asyncio.gather(*inside)

    refused, health, served = asyncio.run(crowd())
    assert refused.status_code == 503
    assert refused.headers["retry-after"] == "1"
    assert health.status_code == 200
    assert [answer.status_code for answer in served] == [200, 200, 200]


def hrefs() -> Iterator[str]:
    text = (FOLDER / "index.html").read_text()
    yield from (part.split('"')[0] for part in text.replace('src="', 'href="').split('href="')[1:])


def test_the_page_and_all_it_names_come_from_this_server(service: Service) -> None:
    page = service.client.get("/", {"accept": "text/html,application/json;q=0.9"})
    assert page.headers["content-type"].startswith("text/html")
    assert page.headers["vary"] == "Accept"
    names = list(hrefs())
    assert len(names) > 4
    for name in names:
        assert service.client.get("/" + name).status_code == 200
    assert "<script>" not in page.text
    assert " style=" not in page.text
    for name in FILES:
        body = service.client.get(f"/static/{name}")
        assert body.content == (FOLDER / name).read_bytes()


def test_nothing_else_of_the_disk_is_served(service: Service) -> None:
    for name in (
        "VENDOR.md",
        "vendor/VENDOR.md",
        "../page.py",
        "..%2fpage.py",
        "/etc/passwd",
        "map.mjs/",
        "",
        "vendor",
    ):
        assert service.client.get(f"/static/{name}").status_code == 404


def test_the_page_is_small_enough_to_ship() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 3 * 2**20


def test_runs_list_what_the_page_needs(service: Service) -> None:
    listed = service.client.get("/runs").json()
    (run,) = listed["runs"]
    assert [lead["lead_time"] for lead in run["leads"]] == ["10", "20", "30", "40", "50", "60"]
    assert run["made_by"] == {"model": "a test"}, "paths of the machine stay there"
    assert {quantity["kind"] for quantity in run["quantities"]} == set(listed["legends"])
    for quantity in run["quantities"]:
        tile = f"/tiles/{run['name']}/{quantity['name']}/{run['leads'][0]['lead_time']}/0/0/0.png"
        assert service.client.get(tile).status_code == 200


def test_the_description_of_the_interface_names_every_route(service: Service) -> None:
    paths = service.client.get("/openapi.json").json()["paths"]
    assert {
        "/",
        "/runs",
        "/tiles/{run}/{quantity}/{lead}/{z}/{x}/{y}.png",
        "/forecast",
        "/conformance",
        "/collections",
        "/collections/{collection}",
        "/collections/{collection}/position",
        "/healthz",
        "/readyz",
    } == set(paths)
    assert all(set(methods) == {"get"} for methods in paths.values())


@pytest.mark.parametrize(
    ("path", "query"),
    [
        ("/", ""),
        ("/", "?f=json"),
        ("/", "?f=xml"),
        ("/runs", ""),
        ("/forecast", "?lat=47&lon=8"),
        ("/forecast", "?lat=47&lon=800"),
        ("/forecast", "?lat=47&lon=8&run=none"),
        ("/conformance", ""),
        ("/collections", ""),
        ("/collections/{collection}", ""),
        ("/collections/{collection}/position", "?coords=POINT(8 47)"),
        ("/collections/{collection}/position", "?coords=POLYGON((8 47))"),
        ("/tiles/{run}/{quantity}/{lead}/{z}/{x}/{y}.png", ""),
        ("/tiles/{run}/{quantity}/{lead}/{z}/{x}/{y}.png", "?gaps=x"),
        ("/healthz", ""),
        ("/readyz", ""),
    ],
)
@pytest.mark.parametrize("late", [False, True])
def test_every_answer_is_one_that_the_description_names(
    own_service: Service, path: str, query: str, late: bool
) -> None:
    own_service.clock.now += timedelta(hours=2 * late)
    filled = path.format(
        collection="nowcast", run="latest", quantity="rainfall_rate_mean", lead=10, z=5, x=16, y=11
    )
    answer = own_service.client.get(filled + query)
    named = own_service.client.get("/openapi.json").json()["paths"][path]["get"]["responses"]
    assert "422" not in named, "which FastAPI would answer, and problems.py does not"
    kinds = named.get(str(answer.status_code), named["default"])["content"]
    assert answer.headers["content-type"].partition(";")[0] in kinds


def test_the_description_tells_the_limits_of_a_place(service: Service) -> None:
    described = service.client.get("/openapi.json").json()["paths"]["/forecast"]["get"]["parameters"]
    limits = {
        each["name"]: (each["schema"].get("minimum"), each["schema"].get("maximum")) for each in described
    }
    assert (limits["lat"], limits["lon"]) == ((-90, 90), (-180, 180))


def test_a_form_of_the_front_page_that_there_is_not_is_refused(service: Service) -> None:
    answer = service.client.get("/?f=xml", {"accept": "text/html"})
    assert answer.status_code == 400
    assert answer.json()["detail"] == "f: Input should be '', 'json' or 'html'"
    assert service.client.get("/?f=html").headers["content-type"].startswith("text/html")


@pytest.mark.parametrize("address", ["/collections/", "/runs/", "/forecast/?lat=47&lon=8"])
def test_no_answer_leads_to_the_host_that_a_client_named(service: Service, address: str) -> None:
    answer = service.client.get(address, {"host": "elsewhere.example"})
    assert (answer.status_code, answer.headers["content-type"]) == (404, "application/problem+json")
    assert "location" not in answer.headers and "elsewhere" not in answer.text


@settings(max_examples=60)
@given(st.text(max_size=40))
def test_no_address_breaks_the_service(service: Service, path: str) -> None:
    assert service.client.get("/" + quote(path, errors="ignore")).status_code in (200, 400, 404)
