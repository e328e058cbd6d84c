"""Stored files come as a feed would bring them, and who follows one loses only what never came."""

import os
import random
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import ClassVar

import boto3
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.feeds.feed import open_feed
from pipelines.replay import Faults, FolderTarget, replay, schedule, target_at
from pipelines.sources.mrms import Mrms
from pipelines.sources.simulated import Simulated
from pipelines.sources.source import named_files, stamp
from tests.pipelines.feeds import faulty_store
from tests.pipelines.feeds.faulty_store import FaultyStore
from tests.pipelines.ordinary_user import ordinary_user

DAY = datetime(2020, 6, 1, 23, tzinfo=UTC)
STEP = timedelta(minutes=5)


@dataclass(frozen=True)
class Named:
    """A source whose names tell the time."""

    path: str | None
    trusted: ClassVar[bool] = True

    def valid_time(self, name):
        return stamp(name, "rate_%Y%m%d%H%M.bin")

    def files(self, start, end):
        return named_files(self, start, end, "rain", "rate_202006010000.bin")


class FakeClock:
    """Time that passes only by sleeping."""

    def __init__(self):
        self.gone, self.slept, self.stopped, self.last = 0.0, [], False, None

    def now(self):
        return datetime(2040, 1, 1, tzinfo=UTC) + timedelta(seconds=self.gone)

    def seconds(self):
        return self.gone

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.gone += seconds
        self.stopped = self.last is not None and self.gone >= self.last


def stored(folder, count=12):
    """Files in a folder for each day, with their times."""
    times = {}
    for step in range(count):
        time = DAY + step * STEP
        path = folder / f"{time:%Y%m%d}" / f"rate_{time:%Y%m%d%H%M}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(random.Random(step).randbytes(1000 + step))
        times[path] = time
    return times


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def arrivals(plays, times):
    return [(round((times[play.path] - DAY) / STEP), play.at) for play in plays]


def test_without_faults_files_come_in_their_own_intervals(tmp_path):
    times, clock = stored(tmp_path / "in"), FakeClock()
    done = replay(Named(str(tmp_path / "in")), str(tmp_path / "out"), speed=60, clock=clock)
    assert clock.slept == [0.0, *[5.0] * 11]
    assert contents(tmp_path / "out") == contents(tmp_path / "in")
    assert (done.files, done.lost, done.arrivals) == (12, 0, 12)
    assert str(done).startswith(
        f"{tmp_path}/out: 12 files in 12 arrivals, 0 lost\nframes from 2020-06-01T23:00:00Z"
    )
    assert done.last == max(times.values())


def test_speed_0_keeps_the_order_and_never_waits(tmp_path):
    stored(tmp_path / "in")
    clock = FakeClock()
    replay(Named(str(tmp_path / "in")), str(tmp_path / "out"), speed=0, clock=clock)
    assert clock.slept == []
    written = sorted((tmp_path / "out").rglob("*.bin"), key=lambda path: path.stat().st_mtime_ns)
    assert written == sorted(written)


def test_only_what_is_within_the_times_is_played(tmp_path):
    stored(tmp_path / "in")
    done = replay(
        Named(str(tmp_path / "in")),
        str(tmp_path / "out"),
        speed=0,
        start="2020-06-01T23:10Z",
        end="2020-06-01T23:20Z",
    )
    assert (done.files, done.first, done.last) == (3, DAY + 2 * STEP, DAY + 4 * STEP)


def test_the_same_seed_gives_the_same_feed_and_another_seed_another(tmp_path):
    times = stored(tmp_path)
    faults = {"jitter": 200.0, "gaps": 0.2, "late": 0.3, "duplicates": 0.3, "broken": 0.2}
    first, second = (schedule(times, Faults(seed=3, **faults)) for _ in range(2))
    assert first == second
    assert schedule(times, Faults(seed=4, **faults)) != first
    assert schedule(dict(reversed(times.items())), Faults(seed=3, **faults)) == first


def test_a_fault_more_leaves_the_others_as_they_were(tmp_path):
    times = stored(tmp_path, 100)
    few, more = (schedule(times, Faults(jitter=100.0, gaps=gaps, late=0.3)) for gaps in (0.1, 0.3))
    assert {play for play in few if play in more} == set(more)
    assert len(more) < len(few)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_each_fault_has_its_share(share, tmp_path):
    times = stored(tmp_path, 2000)
    expected = pytest.approx(2000 * share, abs=80)
    assert 2000 - len(schedule(times, Faults(gaps=share))) == expected
    assert len(schedule(times, Faults(duplicates=share))) - 2000 == expected
    cut = schedule(times, Faults(broken=share))
    assert sum(not play.whole for play in cut) == expected
    assert len(cut) - 2000 == sum(not play.whole for play in cut)
    late = arrivals(schedule(times, Faults(late=share, late_steps=3)), times)
    waits = Counter(round((at - 300 * index) / 300) for index, at in late)
    assert 2000 - waits[0] == expected
    assert set(waits) <= {0, 1, 2, 3}
    jitter = [at - 300 * index for index, at in arrivals(schedule(times, Faults(jitter=40 * share)), times)]
    assert 0 <= min(jitter) <= max(jitter) <= 40 * share
    assert len(set(jitter)) > 1000 or share == 0


def test_a_broken_file_is_half_first_and_whole_a_step_later(tmp_path):
    times = stored(tmp_path, 5)
    path = next(iter(times))
    assert [(play.at, play.whole) for play in schedule(times, Faults(broken=1.0)) if play.path == path] == [
        (0.0, False),
        (300.0, True),
    ]


@given(
    seed=st.integers(0, 10_000),
    jitter=st.sampled_from([0.0, 90.0, 900.0]),
    gaps=st.sampled_from([0.0, 0.3]),
    late=st.sampled_from([0.0, 0.5]),
    duplicates=st.sampled_from([0.0, 0.4]),
    broken=st.sampled_from([0.0, 0.4]),
    lookings=st.floats(0.1, 1.0),
)
@settings(max_examples=40)
def test_who_follows_a_replay_gets_every_file_that_was_not_lost(
    seed, jitter, gaps, late, duplicates, broken, lookings, tmp_path_factory
):
    place = tmp_path_factory.mktemp("place")
    times, draw = stored(place / "in", 30), random.Random(seed)
    faults = Faults(jitter, gaps, late, 6, duplicates, broken, seed)
    plays = schedule(times, faults)
    target = FolderTarget(place / "out")
    (place / "out").mkdir()
    feed = open_feed(
        Named(str(place / "out")), place / "cache", lookback=timedelta(hours=1), quiet=0.0, clock=FakeClock()
    )
    got = []
    for play in [*plays, None]:
        if play is not None:
            whole = play.path.read_bytes()
            content = whole if play.whole else whole[: len(whole) // 2]
            target.put(play.path.relative_to(place / "in").as_posix(), content)
        if play is None or draw.random() < lookings:
            for file in feed.listing():
                got.append((file.valid_time, Path(feed.fetch(file).url).read_bytes()))
    expected = {(times[play.path], play.path.read_bytes()) for play in plays}
    assert dict(got) == dict(expected), "the last of each time is the whole file"
    assert set(got) >= expected
    assert len(got) <= len(plays)


def test_a_bucket_is_replayed_and_followed_through_faults_to_the_same_files(s3, tmp_path, monkeypatch):
    client, bucket = boto3.client("s3", region_name="us-east-1"), "replayed"
    client.create_bucket(Bucket=bucket, ACL="public-read")
    times = stored(tmp_path / "in", 20)
    done = replay(
        Named(str(tmp_path / "in")),
        f"s3://{bucket}/live",
        speed=0,
        jitter=600,
        gaps=0.2,
        late=0.3,
        broken=0.3,
    )
    for item in client.list_objects_v2(Bucket=bucket)["Contents"]:
        client.put_object_acl(Bucket=bucket, Key=item["Key"], ACL="public-read")
    store = FaultyStore(os.environ["AWS_ENDPOINT_URL"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", store.url)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    store.faults = [
        faulty_store.status(500),
        None,
        *[faulty_store.truncate(), faulty_store.corrupt, None] * 3,
    ]
    try:
        feed = open_feed(Named(f"s3://{bucket}/live"), tmp_path / "cache", clock=FakeClock())
        files = feed.listing()
        got = {file.valid_time: Path(feed.fetch(file).url).read_bytes() for file in files}
    finally:
        store.close()
    assert len(got) == done.files == 20 - done.lost
    assert got == {time: path.read_bytes() for path, time in times.items() if time in got}


def test_a_stopped_replay_says_how_far_it_came(tmp_path):
    stored(tmp_path / "in")
    clock = FakeClock()
    clock.last = 1000.0
    done = replay(Named(str(tmp_path / "in")), str(tmp_path / "out"), clock=clock)
    assert (done.files, done.arrivals, done.lost) == (4, 4, 0)
    assert len(contents(tmp_path / "out")) == 4


def test_a_file_never_shows_before_it_is_whole(tmp_path, monkeypatch):
    target, seen = FolderTarget(tmp_path / "out"), []
    replace = Path.replace

    def watched(aside, path):
        seen.append((aside.suffix, aside.stat().st_size, path.exists()))
        return replace(aside, path)

    monkeypatch.setattr(Path, "replace", watched)
    target.put("a/x.bin", bytes(99))
    assert seen == [(".part", 99, False)]
    assert contents(tmp_path / "out") == {Path("a/x.bin"): bytes(99)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speed": -1.0}, "speed=-1"),
        ({"speed": float("inf")}, "speed=inf"),
        ({"gaps": 1.5}, r"gaps=1\.5: expected a share from 0 to 1"),
        ({"late": -0.1}, r"late=-0\.1"),
        ({"jitter": -1.0}, "jitter=-1"),
        ({"late_steps": 0}, "late_steps=0"),
        ({"seed": -1}, "seed=-1"),
        ({"to": "https://example.org/x"}, "expected a local folder, s3://"),
        ({"start": "2031-01-01T00:00Z"}, "no stored files of known time"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(options, message, tmp_path):
    stored(tmp_path / "in")
    with pytest.raises(ValueError, match=message):
        replay(**{"source": Named(str(tmp_path / "in")), "to": str(tmp_path / "out"), **options})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["in", "in/live", "."])
def test_a_replay_onto_its_own_files_is_refused(to, tmp_path, monkeypatch):
    stored(tmp_path / "in")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"overlaps with source\.path=in"):
        replay(Named("in"), to, speed=0, broken=1.0)


def test_what_cannot_be_played_is_told(tmp_path, caplog):
    stored(tmp_path / "in")
    (tmp_path / "in" / "my rain.bin").touch()
    closed = tmp_path / "in" / "closed"
    closed.mkdir(mode=0o000)
    with ordinary_user():
        replay(Named(str(tmp_path / "in")), str(tmp_path / "out"), speed=0)
    names, folder = (record.message for record in caplog.records if record.levelname == "WARNING")
    assert "1 file passed over for their names, such as 'my rain.bin'" in names
    assert folder.startswith(f"{closed}: cannot be listed (Permission denied)")


def test_a_source_that_makes_its_frames_itself_is_refused():
    with pytest.raises(ValueError, match="choose one that lies in files"):
        replay(Simulated(frames=3), "out")


def test_a_bucket_that_is_not_there_is_told_in_one_line(s3):
    with pytest.raises(ValueError, match=r"^s3://nowhere/x: .*404.*$"):
        target_at("s3://nowhere/x").put("a.bin", b"x")


@pytest.mark.data
def test_real_files_come_with_their_own_names_and_bytes(data, tmp_path):
    source = Mrms(str(data / "mrms"))
    files = list(source.files(None, None))[:3]
    done = replay(source, str(tmp_path / "out"), speed=0, end=files[-1].valid_time)
    assert done.files == 3
    assert sorted(path.name for path in (tmp_path / "out").rglob("*.*")) == sorted(
        Path(f.url).name for f in files
    )
