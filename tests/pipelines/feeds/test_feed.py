"""What follows a folder, a bucket or a page loses nothing, stores nothing broken and is a good guest."""

import os
import random
import re
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import ClassVar

import boto3
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.decoding.refusal import Code
from pipelines.feeds.feed import LOOKS, ROUNDS, Cache, NewFile, open_feed
from pipelines.feeds.places import Entry, is_safe, place_at
from pipelines.feeds.web import DeniedError, Manners, SystemClock, UnreachableError, Web, retry_after
from pipelines.ingest import _fetched
from pipelines.quarantine import Refused
from pipelines.sources.source import RemoteFile, stamp
from tests.pipelines.feeds import faulty_store
from tests.pipelines.feeds.faulty_store import Answer, FaultyStore
from tests.pipelines.ordinary_user import ordinary_user

DAY = datetime(2020, 6, 1, tzinfo=UTC)
MINUTE = timedelta(minutes=1)


@dataclass(frozen=True)
class Named:
    """A source whose names tell the time."""

    path: str | None
    pattern: str = r"rate_(\d{12})\.bin"
    trusted: ClassVar[bool] = False

    def valid_time(self, name):
        match = re.fullmatch(self.pattern, name)
        return stamp(match[1], "%Y%m%d%H%M") if match else None


@dataclass(frozen=True)
class Dated(Named):
    """One whose names tell it in a form of their own."""

    time_format: str = ""


class FakeClock:
    """Time that passes only by sleeping, and by `tick` with each look at it."""

    def __init__(self, tick=0.0, now=DAY + timedelta(days=3650)):
        self.gone, self.tick, self.began, self.slept, self.stopped = 0.0, tick, now, [], False

    def now(self):
        return self.began + timedelta(seconds=self.gone)

    def seconds(self):
        self.gone += self.tick
        return self.gone

    def sleep(self, seconds):
        assert seconds >= 0
        self.slept.append(seconds)
        self.gone += seconds


def name(time, folder="{:%Y%m%d}/"):
    return folder.format(time) + f"rate_{time:%Y%m%d%H%M}.bin"


def content(key):
    return random.Random(key).randbytes(5000)


@pytest.fixture
def bucket(s3):
    """A client and the name of an empty bucket that everybody may read."""
    client = boto3.client("s3", region_name="us-east-1")
    bucket = f"radar-{uuid.uuid4().hex}"
    client.create_bucket(Bucket=bucket, ACL="public-read")
    return client, bucket


@pytest.fixture
def store(s3):
    """A faulty server before the object store."""
    store = FaultyStore(os.environ["AWS_ENDPOINT_URL"])
    yield store
    store.close()


@pytest.fixture
def anonymous(store, monkeypatch):
    """No credentials, and the faulty server as the endpoint."""
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(variable)
    monkeypatch.setenv("AWS_ENDPOINT_URL", store.url)


@pytest.fixture
def page():
    """A faulty server with pages of its own."""
    page = FaultyStore()
    yield page
    page.close()


def put(bucket, key, body=None):
    client, bucket = bucket
    client.put_object(Bucket=bucket, Key=key, Body=content(key) if body is None else body, ACL="public-read")


def feed_of(bucket, tmp_path, clock=None, pattern=Named.pattern, prefix="", **options):
    source = Named(f"s3://{bucket[1]}/{prefix}", pattern)
    return open_feed(source, tmp_path / "cache", clock=clock or FakeClock(), **options)


def keys(files):
    return [file.entry.key for file in files]


def lists(store):
    return [path for path in store.requests if "list-type" in path]


@pytest.mark.parametrize(
    ("form", "sorts"),
    [
        ("%Y%m%d%H%M%S", True),
        ("%Y-%m-%dT%H%M", True),
        ("%y%j%H%M", True),
        ("%Y/%m/%d/%H", True),
        ("%d%m%Y%H%M", False),
        ("%Y%d%m%H%M", False),
        ("%m%Y%d%H", False),
    ],
)
def test_names_that_do_not_sort_by_time_are_not_followed(form, sorts, tmp_path):
    source = Dated(str(tmp_path), time_format=form)
    if sorts:
        assert open_feed(source, tmp_path / "cache").listing() == []
    else:
        with pytest.raises(ValueError, match=rf"time_format={form}: .* do not sort by time"):
            open_feed(source, tmp_path / "cache")


# ---- fetching ----------------------------------------------------------------------------------------


FAULTS = {
    "500": faulty_store.status(500),
    "503": faulty_store.status(503),
    "429": faulty_store.status(429),
    "408": faulty_store.status(408),
    "reset": faulty_store.reset(),
    "reset at once": faulty_store.reset(0.0),
    "no answer": faulty_store.hang_up,
    "truncated": faulty_store.truncate(),
    "empty": faulty_store.truncate(0.0),
    "length too long": faulty_store.wrong_length(+7),
    "length too short": faulty_store.wrong_length(-7),
    "short and consistent": faulty_store.short_and_consistent,
    "a wrong bit": faulty_store.corrupt,
    "half without a length": faulty_store.without_length,
}


def one_file(bucket, tmp_path, clock=None, **options):
    key = name(DAY)
    put(bucket, key)
    feed = feed_of(bucket, tmp_path, clock, **options)
    (file,) = feed.listing()
    return feed, file


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_costs_another_try_and_no_byte(fault, bucket, store, anonymous, tmp_path):
    clock = FakeClock()
    feed, file = one_file(bucket, tmp_path, clock)
    store.requests.clear()
    store.faults = [FAULTS[fault], FAULTS[fault]]

    fetched = feed.fetch(file)

    assert Path(fetched.url).read_bytes() == content(file.entry.key)
    assert Path(fetched.url).name == Path(file.entry.key).name
    assert len(store.requests) == 3
    assert 0 < sum(clock.slept) <= 1 + 2


@pytest.mark.parametrize("fault", FAULTS)
def test_after_three_tries_nothing_is_stored(fault, bucket, store, anonymous, tmp_path):
    feed, file = one_file(bucket, tmp_path)
    store.requests.clear()
    store.choose = lambda path: FAULTS[fault]

    with pytest.raises(UnreachableError, match=r"3 tries"):
        feed.fetch(file)

    assert len(store.requests) == 3
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("code", [401, 403, 404, 410])
def test_a_refusal_is_taken_as_one(code, bucket, store, anonymous, tmp_path):
    feed, file = one_file(bucket, tmp_path)
    store.requests.clear()
    store.choose = lambda path: faulty_store.status(code)
    with pytest.raises(DeniedError, match=f"HTTP {code}"):
        feed.fetch(file)
    assert len(store.requests) == 1


def test_redirects_are_not_followed(bucket, store, anonymous, tmp_path):
    feed, file = one_file(bucket, tmp_path)
    store.requests.clear()
    store.faults = [faulty_store.status(302, Location=f"{store.url}/elsewhere")]
    with pytest.raises(DeniedError, match=r"elsewhere; redirects are not followed"):
        feed.fetch(file)
    assert len(store.requests) == 1


@pytest.mark.parametrize("code", [429, 503])
@pytest.mark.parametrize("asked", ["17", "Thu, 30 May 2030 00:00:17 GMT"])
def test_retry_after_is_waited_for(code, asked, bucket, store, anonymous, tmp_path):
    clock = FakeClock(now=DAY + timedelta(days=3650))
    assert clock.began == datetime(2030, 5, 30, tzinfo=UTC)
    feed, file = one_file(bucket, tmp_path, clock)
    store.faults = [faulty_store.status(code, Retry_After=asked)]

    feed.fetch(file)

    assert 17 <= sum(clock.slept) <= 19


def test_a_retry_after_holds_for_every_request_to_that_host(bucket, store, anonymous, tmp_path):
    clock = FakeClock()
    feed, file = one_file(bucket, tmp_path, clock, manners=Manners(total=100))
    store.faults = [faulty_store.status(503, Retry_After="500")]
    store.requests.clear()
    for ask in (lambda: feed.fetch(file), feed.listing):
        with pytest.raises(UnreachableError, match=r"asked for (499|500|501) s without") as caught:
            ask()
        assert 498 < caught.value.rest <= 502
    assert len(store.requests) == 1, "asked again before it was wanted"
    clock.sleep(502)
    feed.fetch(file)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (None, None),
        ("0", 0),
        (" 120 ", 120),
        ("-3", None),
        ("soon", None),
        ("9999999999", 86_400),
        ("Thu, 30 May 2030 00:01:00 GMT", 60),
        ("Thu, 30 May 2020 00:01:00 GMT", 0),
    ],
)
def test_retry_after_is_read_in_both_forms(text, seconds):
    assert retry_after(text, datetime(2030, 5, 30, tzinfo=UTC)) == seconds


def test_a_body_that_drips_is_given_up(bucket, store, anonymous, tmp_path):
    feed, file = one_file(bucket, tmp_path, manners=Manners(idle=0.2))
    store.faults = [store.drip]
    assert Path(feed.fetch(file).url).read_bytes() == content(file.entry.key)


def test_a_body_below_the_least_rate_is_given_up(bucket, store, anonymous, tmp_path):
    clock = FakeClock()
    feed, file = one_file(bucket, tmp_path, clock, manners=Manners(min_rate=1e6, total=1e9))
    clock.tick = 12.0
    store.requests.clear()
    with pytest.raises(UnreachableError, match=r"too slow: \d+ bytes/s"):
        feed.fetch(file)
    assert len(store.requests) == 3


def test_the_time_of_all_tries_together_is_bounded(bucket, store, anonymous, tmp_path):
    clock = FakeClock(tick=0.01)
    feed, file = one_file(bucket, tmp_path, clock, manners=Manners(tries=1000, total=60, backoff=20))
    store.choose = lambda path: faulty_store.status(500)
    before = clock.gone
    with pytest.raises(UnreachableError):
        feed.fetch(file)
    assert clock.gone - before <= 61


@pytest.mark.parametrize("fault", ["drip_headers", "drip_chunks"])
def test_an_answer_without_end_is_ended_at_the_deadline(fault, bucket, store, anonymous, tmp_path):
    feed, file = one_file(bucket, tmp_path, SystemClock())
    feed.place.web.manners = Manners(total=0.4, backoff=0.01)
    store.choose = lambda path: getattr(store, fault)
    with pytest.raises(UnreachableError):
        feed.fetch(file)


def test_the_bandwidth_is_capped_over_all_files(bucket, store, anonymous, tmp_path):
    clock = FakeClock()
    for step in range(4):
        put(bucket, name(DAY + step * MINUTE), bytes(100_000))
    feed = feed_of(bucket, tmp_path, clock, manners=Manners(max_rate=50_000))
    files, before = feed.listing(), clock.gone
    for file in files:
        feed.fetch(file)
    assert clock.gone - before == pytest.approx(8.0, abs=0.1)


def test_a_file_beyond_the_cap_is_refused_unread(bucket, store, anonymous, tmp_path):
    feed, file = one_file(bucket, tmp_path, largest=4999)
    store.requests.clear()
    with pytest.raises(DeniedError, match="5000 bytes, more than the allowed 4999"):
        feed.fetch(file)
    assert store.requests == []


def test_a_file_that_does_not_arrive_comes_again_a_few_times(bucket, store, anonymous, tmp_path):
    feed, file = one_file(bucket, tmp_path)
    store.choose = lambda path: None if "list-type" in path else faulty_store.truncate()
    for _ in range(ROUNDS - 1):
        with pytest.raises(UnreachableError):
            feed.fetch(file)
        assert keys(feed.listing()) == [file.entry.key]
    with pytest.raises(UnreachableError):
        feed.fetch(file)
    assert feed.listing() == []


def test_a_file_replaced_after_the_listing_comes_as_the_new_one(bucket, store, anonymous, tmp_path):
    feed, file = one_file(bucket, tmp_path)
    put(bucket, file.entry.key, b"new")
    with pytest.raises(DeniedError, match="replaced since it was listed"):
        feed.fetch(file)
    (again,) = feed.listing()
    assert Path(feed.fetch(again).url).read_bytes() == b"new"


def test_an_encrypted_objects_etag_is_not_taken_for_its_md5(bucket, store, anonymous, tmp_path):
    feed, file = one_file(bucket, tmp_path)

    def encrypted(handler, answer):
        headers = {**answer.headers, "x-amz-server-side-encryption": "aws:kms"}
        faulty_store.corrupt(handler, Answer(answer.status, headers, answer.body))

    store.faults = [encrypted]
    fetched = Path(feed.fetch(file).url).read_bytes()  # nothing tells that these bytes are wrong
    (wrong,) = [
        index
        for index, pair in enumerate(zip(fetched, content(file.entry.key), strict=True))
        if len(set(pair)) > 1
    ]
    assert wrong == len(fetched) // 2


def test_requests_say_who_asks(bucket, store, anonymous, tmp_path):
    feed, file = one_file(bucket, tmp_path)
    feed.fetch(file)
    assert {headers["User-Agent"].split("/")[0] for headers in store.headers} == {"metnet-nowcast"}


@pytest.mark.slow
def test_of_a_thousand_requests_through_faults_none_stores_a_wrong_byte(bucket, store, anonymous, tmp_path):
    draw, clock = random.Random(7), FakeClock()
    rest = faulty_store.status(503, Retry_After="40")
    every, asked, early = [*FAULTS.values(), rest], [-1000.0], []

    def choose(path):
        if clock.gone < asked[-1] + 40:
            early.append(path)
        fault = draw.choice(every) if draw.random() < 0.4 else None
        if fault is rest:
            asked.append(clock.gone)
        return fault

    for step in range(200):
        put(bucket, name(DAY + step * 2 * MINUTE))
    feed = feed_of(bucket, tmp_path, clock)
    waiting = feed.listing()
    store.choose, stored = choose, {}
    while len(store.requests) < 1000:
        files, waiting = waiting, []
        for file in files or [NewFile(f.url, f.valid_time, f.arrived, f.entry) for f in stored.values()]:
            before, time = len(store.requests), clock.gone
            try:
                local = feed.fetch(file)
            except UnreachableError:
                assert len(list((tmp_path / "cache").rglob("*.bin"))) == 0
                waiting.append(file)
            else:
                assert Path(local.url).read_bytes() == content(file.entry.key)
                feed.release(local)
                stored[file.url] = file
            assert len(store.requests) - before <= 3
            assert clock.gone - time <= Manners().total
            if len(store.requests) >= 1000:
                break
    assert len(stored) == 200
    assert len(asked) > 10
    assert early == [], "asked again before a Retry-After was over"


# ---- listing -----------------------------------------------------------------------------------------


def test_a_listing_has_only_what_is_new(bucket, store, anonymous, tmp_path):
    feed = feed_of(bucket, tmp_path)
    seen = []
    for step in range(6):
        key = name(DAY + step * 30 * MINUTE)
        put(bucket, key)
        seen.append(keys(feed.listing()))
        assert seen[-1] == [key]
    assert feed.listing() == []
    assert "start-after" in lists(store)[-1]


def test_a_listing_of_many_pages_is_whole(bucket, store, anonymous, tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.feeds.places.PAGE", 3)
    every = [name(DAY + timedelta(days=step)) for step in range(10)]
    for key in every:
        put(bucket, key, b"x")
    feed = feed_of(bucket, tmp_path)
    assert keys(feed.listing()) == every
    assert len(store.requests) == 4
    feed = feed_of(bucket, tmp_path, start=DAY + timedelta(days=8))
    assert keys(feed.listing()) == every[8:]


@pytest.mark.parametrize("folder", ["{:%Y%m%d}/", "{:%Y/%j/%H}/", ""])
@pytest.mark.parametrize("pace", ["one by one", "at once"])
def test_late_and_restated_files_within_the_lookback_are_found(
    folder, pace, bucket, store, anonymous, tmp_path
):
    feed, found = feed_of(bucket, tmp_path), []
    times = [DAY + timedelta(hours=22) + step * 10 * MINUTE for step in range(36)]
    late, restated = times[25], times[30]
    for time in times:
        if time != late:
            put(bucket, name(time, folder), b"x")
        if pace == "one by one" or time == times[-1]:
            found += keys(feed.listing())
    assert found == [name(time, folder) for time in times if time != late]
    assert feed.listing() == []
    put(bucket, name(late, folder))
    put(bucket, name(restated, folder), b"restated")
    assert keys(feed.listing()) == [name(late, folder), name(restated, folder)]
    assert feed.listing() == []


def test_channels_that_sort_before_the_time_hide_no_late_file(bucket, store, anonymous, tmp_path):
    pattern = r"C\d\d_(\d{12})\.bin"
    feed = feed_of(bucket, tmp_path, pattern=pattern, lookback=30 * MINUTE)
    every = [
        f"{time:%Y/%j/%H}/C{channel:02}_{time:%Y%m%d%H%M}.bin"
        for time in (DAY + step * 10 * MINUTE for step in range(18))
        for channel in (1, 7, 16)
    ]
    missing = [
        key for key in every if key.startswith("2020/153/02/C01") and key >= "2020/153/02/C01_202006010220"
    ]
    late = missing[1]
    for key in every:
        if key not in missing:
            put(bucket, key, b"x")
            feed.listing()
    put(bucket, late, b"x")
    assert keys(feed.listing()) == [late]


def test_a_start_in_years_of_files_costs_few_requests(bucket, store, anonymous, tmp_path):
    every = [DAY + timedelta(days=4 * step) for step in range(200)]
    for time in every:
        put(bucket, name(time, "in/{:%Y/%j}/"), b"x")
    start = every[-5]
    feed = feed_of(bucket, tmp_path, prefix="in", start=start)
    assert [file.valid_time for file in feed.listing()] == every[-5:]
    assert len(store.requests) <= 2 + 2 + 7 + 2, "years, days, first names of both, and the files"
    store.requests.clear()
    assert feed.listing() == []
    assert len(store.requests) == 1


def test_a_start_among_folders_of_other_products_is_found(bucket, store, anonymous, tmp_path):
    for day in range(20):
        put(bucket, f"{DAY + timedelta(days=day):%Y%m%d}/other.txt", b"x")
        if day % 3:
            put(bucket, name(DAY + timedelta(days=day, hours=1)), b"x")
    start = DAY + timedelta(days=10)
    feed = feed_of(bucket, tmp_path, start=start)
    assert [file.valid_time.day for file in feed.listing()] == [11, 12, 14, 15, 17, 18, 20]


@given(
    days=st.sets(st.integers(0, 60), min_size=1, max_size=12),
    start=st.integers(0, 60 * 24),
    folder=st.sampled_from(["{:%Y%m%d}/", "{:%Y/%m/%d}/", "{:%Y/%j}/", ""]),
)
@settings(max_examples=40)
def test_a_first_listing_has_every_file_from_the_start(days, start, folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("place")
    times = [DAY + timedelta(days=day, hours=hour) for day in days for hour in (0, 9, 23)]
    for time in times:
        path = place / name(time, folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    since = DAY + timedelta(hours=start)
    feed = open_feed(Named(str(place)), place / "cache", start=since, clock=FakeClock())
    assert [file.valid_time for file in feed.listing()] == sorted(time for time in times if time >= since)


def test_a_long_past_comes_in_parts_without_loss(tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.feeds.feed.MOST", 100)
    times = [DAY + step * 10 * MINUTE for step in range(250)]
    for time in times:
        path = tmp_path / "in" / name(time)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    feed = open_feed(Named(str(tmp_path / "in")), tmp_path / "cache", clock=FakeClock())
    parts = []
    while not parts or feed.behind:
        parts.append(feed.listing())
    assert [len(part) for part in parts] == [100, 100, 50]
    assert sorted(file.valid_time for part in parts for file in part) == times


def test_a_listing_that_breaks_off_loses_nothing(bucket, store, anonymous, tmp_path):
    for step in range(3):
        put(bucket, name(DAY + step * MINUTE))
    feed = feed_of(bucket, tmp_path)
    store.faults = [faulty_store.reset()] * 3
    with pytest.raises(UnreachableError):
        feed.listing()
    assert len(feed.listing()) == 3


@pytest.mark.parametrize(
    "body",
    [
        b'<!DOCTYPE x [<!ENTITY a "aaaa">]><ListBucketResult>&a;</ListBucketResult>',
        b"<ListBucketResult>",
        b"hello",
    ],
)
def test_a_listing_that_is_no_sound_xml_is_told(body, bucket, store, anonymous, tmp_path):
    store.choose = lambda path: lambda handler, answer: faulty_store.send(handler, Answer(200, {}, body))
    with pytest.raises(UnreachableError, match="no sound XML"):
        feed_of(bucket, tmp_path).listing()


def test_a_bucket_with_credentials_is_read_by_signed_requests(bucket, store, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", store.url)
    clock = FakeClock()
    feed, file = one_file(bucket, tmp_path, clock, start=DAY)
    store.faults = [faulty_store.truncate(), faulty_store.status(503, Retry_After="17")]
    assert Path(feed.fetch(file).url).read_bytes() == content(file.entry.key)
    assert all("X-Amz-Signature" in path for path in store.requests[-3:])
    assert 17 < sum(clock.slept) < 21
    put(bucket, name(DAY + MINUTE))
    assert keys(feed.listing()) == [name(DAY + MINUTE)]


def test_obstore_neither_waits_for_a_retry_after_nor_tells_it(bucket, store, tmp_path, monkeypatch):
    """Why the requests of public buckets are made here; when this fails, that can be thought over."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", store.url)
    store.choose = lambda path: faulty_store.status(503, Retry_After="86397")
    with pytest.raises(UnreachableError, match="503") as caught:
        feed_of(bucket, tmp_path).listing()
    assert caught.value.rest == 60
    assert len(store.requests) == 1
    assert "86397" not in str(caught.value)


def test_a_name_from_the_future_waits_and_moves_nothing(tmp_path):
    clock = FakeClock(now=DAY + timedelta(hours=5))
    (tmp_path / "in").mkdir()
    feed = open_feed(Named(str(tmp_path / "in")), tmp_path / "cache", clock=clock, quiet=0)
    for time in (DAY, DAY + timedelta(days=30_000)):
        (tmp_path / "in" / name(time, "")).touch()
        os.utime(tmp_path / "in" / name(time, ""), (0, 0))
    assert keys(feed.listing()) == [name(DAY, "")]
    (tmp_path / "in" / name(DAY + MINUTE, "")).touch()
    assert keys(feed.listing()) == [name(DAY + MINUTE, "")]


@pytest.mark.parametrize(
    "key",
    ["../x.bin", "a/../x.bin", "a//x.bin", "/x.bin", "a/.", "a\\x.bin", "a b.bin", "", "x.bin.part", "x\n"],
)
def test_names_that_lead_elsewhere_are_passed_over(key):
    assert not is_safe(key)


def test_a_hostile_listing_stores_nothing_outside_the_cache(bucket, store, anonymous, tmp_path):
    bad = "../../rate_202006010000.bin"
    body = (
        f"<ListBucketResult><Contents><Key>{bad}</Key><Size>1</Size></Contents>"
        "<Contents><Key>ok/rate_202006010001.bin</Key><Size>1</Size></Contents></ListBucketResult>"
    )
    store.choose = lambda path: (
        lambda handler, answer: faulty_store.send(handler, Answer(200, {}, body.encode()))
    )
    assert keys(feed_of(bucket, tmp_path).listing()) == ["ok/rate_202006010001.bin"]


# ---- folders and web pages -----------------------------------------------------------------------------


def test_a_local_file_is_left_until_nobody_writes_to_it(tmp_path):
    folder, clock = tmp_path / "in", FakeClock()
    folder.mkdir()
    feed = open_feed(Named(str(folder)), tmp_path / "cache", clock=clock, quiet=5.0)
    path = folder / name(DAY, "")
    (folder / f"{name(DAY, '')}.part").write_bytes(b"half")
    for size in (1, 2, 3):
        path.write_bytes(bytes(size))
        os.utime(path, (clock.now().timestamp(),) * 2)
        assert feed.listing() == []
        clock.sleep(4)
    clock.sleep(4)
    (file,) = feed.listing()
    assert feed.fetch(file).url == str(path)
    feed.release(feed.fetch(file))
    assert path.exists(), "a folder's own file was deleted"


def test_a_file_with_the_clock_of_another_machine_is_found_too(tmp_path):
    folder, clock = tmp_path / "in", FakeClock()
    folder.mkdir()
    feed = open_feed(Named(str(folder)), tmp_path / "cache", clock=clock, quiet=5.0)
    path = folder / name(DAY, "")
    path.write_bytes(b"x")
    os.utime(path, (clock.now().timestamp() + 3600,) * 2)
    assert feed.listing() == []
    clock.sleep(6)
    assert len(feed.listing()) == 1


def test_an_old_file_that_is_still_written_is_not_left_behind(tmp_path):
    folder, clock = tmp_path / "in", FakeClock()
    feed_times = [DAY + timedelta(hours=step) for step in range(12)]
    for time in feed_times:
        path = folder / name(time)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
        written = clock.now().timestamp() if time == feed_times[1] else 0
        os.utime(path, (written, written))
    feed = open_feed(Named(str(folder)), tmp_path / "cache", clock=clock)
    assert len(feed.listing()) == 11
    clock.sleep(6)
    assert [file.valid_time for file in feed.listing()] == [feed_times[1]]


def test_links_are_not_followed(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / name(DAY, "")).write_bytes(b"x")
    (tmp_path / "in" / name(DAY, "")).symlink_to(tmp_path / "secret" / name(DAY, ""))
    (tmp_path / "in" / "folder").symlink_to(tmp_path / "secret")
    assert open_feed(Named(str(tmp_path / "in")), tmp_path / "cache", clock=FakeClock()).listing() == []


def test_a_folder_that_may_not_be_listed_is_told_once_and_read_when_it_may(tmp_path):
    clock, told, found = FakeClock(), [], []
    closed = tmp_path / "in" / "a"
    for step in range(30):
        path = tmp_path / "in" / name(DAY + step * 20 * MINUTE, "b/" if step else "a/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    feed = open_feed(Named(str(tmp_path / "in")), tmp_path / "cache", clock=clock)
    closed.chmod(0o000)
    sleep = clock.sleep

    def passing(seconds):
        sleep(seconds)
        if len(clock.slept) == 5:
            closed.chmod(0o755)
        clock.stopped = len(clock.slept) == 8

    clock.sleep = passing
    with ordinary_user():
        for files in feed.follow(60, tell=told.append):
            found.append(keys(files))
    assert [len(part) for part in found] == [29, 1]
    assert found[1] == [name(DAY, "a/")], "the rest has gone on for longer than the lookback"
    assert [text for text in told if "listed" in text] == [
        f"{closed}: cannot be listed (Permission denied), so nothing in it is read; "
        "give this user the right to (chmod u+rx)"
    ]


def test_a_folder_may_be_called_anything_but_a_half(tmp_path):
    for folder in ("my data é", "incoming.tmp"):
        (tmp_path / "in" / folder).mkdir(parents=True)
        (tmp_path / "in" / folder / name(DAY, "")).write_bytes(b"x")
    clock = FakeClock()
    feed = open_feed(Named(str(tmp_path / "in")), tmp_path / "cache", quiet=0, clock=clock)
    assert keys(feed.listing()) == [f"my data é/{name(DAY, '')}"]


def test_a_page_that_tells_no_versions_is_read_once(page, tmp_path):
    key = name(DAY, "")
    page.pages["/radar/"] = Answer(200, {}, f'<ul><li><a href="{key}">{key}</a></li></ul>'.encode())
    feed = open_feed(Named(f"{page.url}/radar"), tmp_path / "cache", clock=FakeClock())
    assert keys(feed.listing()) == [key]
    assert feed.listing() == []


INDEX = """<html><body><h1>Index of /radar</h1><pre><a href="?C=N;O=D">Name</a> <a href="../">Parent</a>
<a href="{0}">{0}</a>   2020-06-01 00:02  4.9K
<a href="/etc/{0}">other</a> <a href="http://10.0.0.1/{0}">far</a> <a href="..%2f{0}">up</a>
<a href="sub/">sub/</a></pre></body></html>"""


def test_a_web_folder_is_followed_by_its_page_and_asked_only_for_changes(page, tmp_path):
    first, second = name(DAY, ""), name(DAY + MINUTE, "")
    page.pages["/radar/"] = Answer(200, {"ETag": '"1"'}, INDEX.format(first).encode())
    page.pages["/radar/sub/"] = Answer(200, {}, f'<a href="{second}">{second}</a> 2020'.encode())
    for key in (first, f"sub/{second}"):
        page.pages[f"/radar/{key}"] = Answer(200, {}, content(key))
    feed = open_feed(Named(f"{page.url}/radar"), tmp_path / "cache", clock=FakeClock())
    files = feed.listing()
    assert keys(files) == [first, f"sub/{second}"]
    for file in files:
        assert Path(feed.fetch(file).url).read_bytes() == content(file.entry.key)

    page.pages["/radar/"] = Answer(304, {}, b"")
    assert feed.listing() == []
    assert [headers.get("If-None-Match") for headers in page.headers][-2:] == ['"1"', None]

    page.pages["/radar/"] = Answer(200, {}, INDEX.format(first).replace("00:02", "00:09").encode())
    assert keys(feed.listing()) == [first]


@pytest.mark.parametrize(("code", "is_told"), [(403, True), (401, True), (404, False), (410, False)])
def test_a_folder_that_a_web_server_refuses_is_told_and_the_rest_is_read(code, is_told, page, tmp_path):
    first, second = name(DAY, ""), name(DAY + MINUTE, "")
    page.pages["/radar/"] = Answer(200, {}, INDEX.format(first).encode())
    page.pages["/radar/sub/"] = Answer(code, {}, b"")
    feed = open_feed(Named(f"{page.url}/radar"), tmp_path / "cache", clock=FakeClock())
    assert keys(feed.listing()) == [first]
    assert list(feed.unlisted) == ([f"{page.url}/radar/sub"] if is_told else [])
    assert all(f"HTTP {code}" in reason for reason in feed.unlisted.values())

    page.pages["/radar/sub/"] = Answer(200, {}, f'<a href="{second}">{second}</a> 2020'.encode())
    assert keys(feed.listing()) == [f"sub/{second}"]
    assert feed.unlisted == {}


def test_a_page_whose_links_lead_round_in_a_circle_is_refused(page, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "ask", lambda path: Answer(200, {}, b'<a href="sub/">sub/</a>'))
    feed = open_feed(Named(f"{page.url}/radar"), tmp_path / "cache", clock=FakeClock())
    with pytest.raises(DeniedError, match=r"sub/sub/.*: its links lead ever deeper; give the folder"):
        feed.listing()
    assert len(page.requests) < 20


@pytest.mark.parametrize("asks_again", [False, True])
def test_a_file_that_is_refused_for_now_comes_again_to_who_follows(asks_again, page, tmp_path):
    key = name(DAY, "")
    page.pages["/radar/"] = Answer(200, {}, f'<a href="{key}">{key}</a> 2020'.encode())
    feed = open_feed(Named(f"{page.url}/radar"), tmp_path / "cache", clock=FakeClock())

    def half_is_refused(files):
        for file in files:
            whole = Path(file.url).read_bytes() == content(key)
            yield file, ["a frame"] if whole else Refused(file, Code.TRUNCATED, "half of it")

    def taken():
        files = feed.listing()
        offered = {file.url: file for file in files}
        wanted = [RemoteFile(file.url, file.valid_time) for file in files]
        return [result for _, result in _fetched(feed, offered, half_is_refused, asks_again, wanted)]

    found = [taken()]  # nothing there yet
    page.pages[f"/radar/{key}"] = Answer(200, {}, content(key)[:5])
    found.append(taken())
    page.pages[f"/radar/{key}"] = Answer(200, {}, content(key))
    found.append(taken())
    if asks_again:
        assert found == [[], [], [["a frame"]]]
    else:
        assert [each.code for each in found[0]] == [Code.UNREACHABLE] and found[1:] == [[], []]


def test_a_file_that_is_always_refused_is_given_up(page, tmp_path):
    key = name(DAY, "")
    page.pages["/radar/"] = Answer(200, {}, f'<a href="{key}">{key}</a> 2020'.encode())
    feed = open_feed(Named(f"{page.url}/radar"), tmp_path / "cache", clock=FakeClock())
    rounds = 0
    while files := feed.listing():
        feed.hand_out_again(files[0])
        rounds += 1
    assert rounds == 5


@pytest.mark.parametrize(
    ("path", "root"),
    [
        ("s3://noaa-mrms-pds/CONUS/", "https://noaa-mrms-pds.s3.amazonaws.com/CONUS/"),
        ("s3://noaa-goes19", "https://noaa-goes19.s3.amazonaws.com/"),
        ("s3://a.b/c", "https://s3.amazonaws.com/a.b/c/"),
        ("gs://gcp-public-data-goes-19/ABI", "https://storage.googleapis.com/gcp-public-data-goes-19/ABI/"),
        ("https://noaa-mrms-pds.s3.amazonaws.com/CONUS", "https://noaa-mrms-pds.s3.amazonaws.com/CONUS/"),
        ("https://opendata.dwd.de/weather/radar/", "https://opendata.dwd.de/weather/radar/"),
    ],
)
def test_a_url_names_its_place(path, root, monkeypatch):
    for variable in [key for key in os.environ if key.startswith(("AWS_", "GOOGLE_"))]:
        monkeypatch.delenv(variable)
    assert place_at(path, Web(clock=FakeClock())).root == root


@pytest.mark.parametrize(
    "path", ["http://example.org/x", "ftp://x/y", "file:///etc", "s3:///x", "http://169.254.169.254/"]
)
def test_other_urls_are_refused(path):
    with pytest.raises(ValueError, match="expected a local folder"):
        place_at(path, Web(clock=FakeClock()))


# ---- the cache -----------------------------------------------------------------------------------------


def test_the_cache_stays_within_its_size_and_never_deletes_what_is_in_use(tmp_path):
    cache = Cache(tmp_path, largest=100)
    files = [
        NewFile(f"s3://b/{step}", DAY, DAY, Entry(f"{step}/{name(DAY, '')}", 40, "v")) for step in range(4)
    ]
    paths = [cache.path(file) for file in files]
    assert len(set(paths)) == 4
    for path in paths[:2]:
        cache.make_room(path, 40)
        path.write_bytes(bytes(40))
    with pytest.raises(OSError, match="no room for 40 bytes beside 80 in use"):
        cache.make_room(paths[2], 40)
    cache.release(paths[0])
    assert not paths[0].exists()
    cache.make_room(paths[2], 40)
    paths[2].write_bytes(bytes(40))

    later = Cache(tmp_path, largest=100)  # which finds what a stopped one left
    later.make_room(paths[3], 40)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.bin")) == 40


def test_a_file_in_the_cache_is_not_fetched_again(bucket, store, anonymous, tmp_path):
    feed, file = one_file(bucket, tmp_path)
    feed.fetch(file)
    store.requests.clear()
    feed.fetch(file)
    assert store.requests == []


# ---- following -----------------------------------------------------------------------------------------


def test_following_tells_of_a_failure_once_and_goes_on_when_it_ends(bucket, store, anonymous, tmp_path):
    clock, told, found = FakeClock(), [], []
    feed = feed_of(bucket, tmp_path, clock)
    put(bucket, name(DAY))
    store.faults = [faulty_store.status(500)] * 12
    for files in feed.follow(60, tell=told.append):
        found += keys(files)
        if len(found) == 2:
            break
        put(bucket, name(DAY + MINUTE))
    assert found == [name(DAY), name(DAY + MINUTE)]
    assert [re.sub(".*/", "", text) for text in told] == [
        ": HTTP 500 Internal Server Error (in the last of 3 tries); trying again",
        ": answers again",
    ]
    assert max(clock.slept) <= 300


def test_following_listens_to_a_retry_after_beyond_its_own_pauses(bucket, store, anonymous, tmp_path):
    clock = FakeClock()
    put(bucket, name(DAY))
    feed = feed_of(bucket, tmp_path, clock)
    store.faults = [faulty_store.status(503, Retry_After="4000")]
    next(feed.follow(30))
    assert 4000 <= clock.gone <= 4400
    assert len(store.requests) == 2


def test_following_asks_at_other_moments_each_time_and_ends_when_it_should(tmp_path):
    clock, told = FakeClock(), []
    feed = open_feed(Named(str(tmp_path)), tmp_path / "cache", lookback=timedelta(0), clock=clock)
    assert list(feed.follow(60, until=clock.now() + timedelta(hours=1), tell=told.append)) == []
    assert 48 <= len(clock.slept) <= 80
    assert len({round(wait, 6) for wait in clock.slept}) > 40
    assert told == [f"{tmp_path}/: waiting for the next file"]
    clock.stopped = True
    assert list(feed.follow(60)) == []


@pytest.mark.parametrize(("arrives", "hours"), [(timedelta(minutes=70), 70 / 60), (None, 3)])
def test_following_to_an_end_waits_for_the_file_of_the_end_and_no_longer_than_the_lookback(
    arrives, hours, tmp_path
):
    clock = FakeClock()
    began, end = clock.now(), clock.now() + timedelta(hours=1)
    (tmp_path / name(began, "")).write_bytes(b"x")
    feed = open_feed(Named(str(tmp_path)), tmp_path / "cache", lookback=timedelta(hours=2), clock=clock)
    sleep, found = clock.sleep, []

    def passing(seconds):
        sleep(seconds)
        if arrives is not None and clock.now() >= began + arrives:
            (tmp_path / name(end, "")).write_bytes(b"x")

    clock.sleep = passing
    for files in feed.follow(60, until=end):
        found += [file.valid_time for file in files]
    assert found == ([began] if arrives is None else [began, end])
    assert hours <= (clock.now() - began) / timedelta(hours=1) < hours + 0.1


def test_following_to_an_end_waits_for_what_is_still_written_then_and_not_for_later_files(tmp_path):
    (tmp_path / "in").mkdir()
    clock, end = FakeClock(), DAY + 11 * MINUTE
    times = [DAY + step * MINUTE for step in range(13)]
    for time in times:
        path = tmp_path / "in" / name(time, "")
        path.write_bytes(b"x")
        written = clock.now().timestamp() - (3600 if time in (*times[:4], end) else 0)
        os.utime(path, (written, written))
    feed = open_feed(Named(str(tmp_path / "in")), tmp_path / "cache", clock=clock)
    sleep = clock.sleep

    def passing(seconds):
        sleep(seconds)
        written = clock.now().timestamp()
        os.utime(tmp_path / "in" / name(times[-1], ""), (written, written))
        clock.stopped = len(clock.slept) == 9

    clock.sleep = passing
    parts = [[file.valid_time for file in files] for files in feed.follow(10, until=end)]
    assert parts == [[*times[:4], end], times[4:11]]
    assert len(clock.slept) == 1


@pytest.mark.parametrize("lost", [None, -1], ids=["whole", "without the last file"])
def test_following_stored_files_to_an_end_waits_as_long_as_they_are_being_played(lost, tmp_path):
    (tmp_path / "in").mkdir()
    clock, told, found = FakeClock(), [], []
    times = [DAY + step * MINUTE for step in range(30)]
    feed = open_feed(Named(str(tmp_path / "in")), tmp_path / "cache", quiet=0, clock=clock)
    coming, sleep = iter(times[:lost]), clock.sleep

    def passing(seconds):
        sleep(seconds)
        if len(clock.slept) % 15 == 0 and (time := next(coming, None)) is not None:
            (tmp_path / "in" / name(time, "")).write_bytes(b"x")
            os.utime(tmp_path / "in" / name(time, ""), (0, 0))

    clock.sleep = passing
    for files in feed.follow(60, until=times[-1], tell=told.append):
        found += [file.valid_time for file in files]
    assert found == times[:lost]
    assert len(clock.slept) == len(found) * 15 + (0 if lost is None else LOOKS)
    assert all(text.endswith(f", until {LOOKS} looks in a row have found none") for text in told)


def test_following_to_an_end_long_past_takes_all_that_is_there_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.feeds.feed.MOST", 2)
    times = [DAY + timedelta(minutes=5 * step) for step in range(5)]
    for time in times:
        (tmp_path / name(time, "")).write_bytes(b"x")
    feed = open_feed(Named(str(tmp_path)), tmp_path / "cache", clock=FakeClock())
    parts = list(feed.follow(60, until=times[-1]))
    assert [len(part) for part in parts] == [2, 2, 1]
    assert [file.valid_time for part in parts for file in part] == times


def test_a_bucket_that_is_not_there_ends_the_following_with_credentials_too(
    bucket, store, tmp_path, monkeypatch
):
    monkeypatch.setenv("AWS_ENDPOINT_URL", store.url)
    feed = open_feed(Named("s3://not-there/radar"), tmp_path / "cache", clock=FakeClock())
    with pytest.raises(DeniedError, match="404"):
        next(feed.follow(30))


def test_a_refused_first_listing_ends_the_following(bucket, store, anonymous, tmp_path):
    store.choose = lambda path: faulty_store.status(403)
    with pytest.raises(DeniedError, match="no right to read it"):
        next(feed_of(bucket, tmp_path).follow(60))
