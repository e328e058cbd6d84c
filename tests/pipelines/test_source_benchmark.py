"""The race of the sources with other readers: all of them run, and what is timed is what is said."""

import time
from pathlib import Path

import numpy as np
import psutil
import pytest

import cli
from benchmarks.sources import CONTESTS, check_size, source_and_files, timed

NO_PEER = {  # configurations that no contest is about
    "cf",  # no service, but the reader of several that are here
    "from_path",  # names another file
    "odim",  # the reader of those of OPERA
    "simulated",  # reads no files
    "goes_mcmip",  # no real file at hand
    "nexrad",  # other readers stop at the polar volume
    "glm_lcfa",  # other readers stop at the list of flashes
    "meteonet_quality",  # the same archive as the rain's
}


def test_every_source_with_real_files_and_another_reader_is_in_the_race():
    every = {path.stem for path in (cli.CONFIGS / "source").glob("*.yaml")}
    assert every - NO_PEER == {contest.config for contest in CONTESTS}


@pytest.mark.data
@pytest.mark.filterwarnings("ignore")  # of the other readers
@pytest.mark.parametrize(
    "number",
    [
        pytest.param(
            number,
            id=contest.name,
            marks=[] if contest.config in ("knmi_mfbs", "gtopo") else pytest.mark.slow,
        )
        for number, contest in enumerate(CONTESTS)
    ],
)
def test_both_read_a_field_of_the_same_size(number, data):
    source, files = source_and_files(number, data, 1)
    cells = source.read(files[0]).values.size
    check_size(CONTESTS[number], cells, CONTESTS[number].peer(files[0]))
    with pytest.raises(ValueError, match="cells, "):
        check_size(CONTESTS[number], 2 * cells, np.zeros(cells))


@pytest.mark.data
def test_all_three_ways_are_timed_and_the_confined_one_with_its_processes(data: Path):
    number = next(number for number, contest in enumerate(CONTESTS) if contest.config == "knmi_mfbs")
    before = {process.pid for process in psutil.Process().children()}
    began = time.process_time()
    frames, cells, (ours, theirs, confined) = timed(number, data, 2, 2)
    own = time.process_time() - began
    assert (frames, cells) == (2, 765 * 700)
    assert min(ours, theirs, confined) > 0
    assert own >= 2 * (ours + theirs)  # half of the four that count took the median or more
    assert {process.pid for process in psutil.Process().children()} <= before, "a process was left behind"
