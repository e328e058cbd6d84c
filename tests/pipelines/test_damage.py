"""Damaged copies of real files, and files made to do harm: each is refused with a reason, or does none."""

import bz2
import io
import json
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from benchmarks import damage, sources
from benchmarks.damage import HANGS, ROOT, SAMPLES, Sample, account, source_of
from pipelines.decode import Decoder
from pipelines.decoding.refusal import Code, Refusal
from pipelines.sources.source import RemoteFile

QUICK = [sample for sample in SAMPLES if sample.weight == 4]
CANARY = b"the text of a file that is none of the feed's business " * 20


@pytest.mark.data
@pytest.mark.parametrize("sample", QUICK, ids=[sample.config for sample in QUICK])
def test_no_damaged_copy_enters_with_another_place_or_time(data, sample):
    check(sample, data, copies=8)


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize("sample", SAMPLES, ids=[sample.config for sample in SAMPLES])
def test_no_damaged_copy_of_many_enters_with_another_place_or_time(data, sample):
    check(sample, data, copies=10 * sample.weight)


@pytest.mark.parametrize("benchmark", [damage.main, sources.main])
def test_a_benchmark_of_a_source_that_is_none_says_so(benchmark, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark", "knmi", "nosuch"])
    with pytest.raises(SystemExit, match="2"):
        benchmark()
    assert "error: nosuch: none of " in capsys.readouterr().err


def check(sample: Sample, data: Path, copies: int) -> None:
    found = account(sample, data, copies)
    assert found.unread == ""
    assert found.misplaced == []
    assert found.copies == found.accounted == copies
    assert found.slowest < HANGS
    assert Code.TIMEOUT not in found.refused
    assert found.share <= 0.001


@pytest.mark.data
def test_no_damaged_copy_enters_where_the_provider_publishes_checksums(data, tmp_path):
    lines = (data / "SHA256SUMS").read_text().splitlines()
    sample = next(sample for sample in SAMPLES if sample.config == "mch")
    original = data / sample.path
    path = tmp_path / sample.path
    path.parent.mkdir(parents=True)
    (tmp_path / "SHA256SUMS").write_text("\n".join(line for line in lines if original.name in line))
    content = bytearray(original.read_bytes())
    path.write_bytes(content)
    with Decoder(source_of(sample.config, tmp_path)) as decoder:
        (file,) = decoder.files(None, None)
        assert decoder.decode(file).valid_time == file.valid_time
        for place in range(0, len(content), len(content) // 20):
            content[place] ^= 1
            path.write_bytes(content)
            with pytest.raises(Refusal) as caught:
                decoder.decode(file)
            assert caught.value.code == Code.CHECKSUM
            content[place] ^= 1


def deflated(begin: bytes, blocks: int) -> bytes:
    """Deflate data of `begin` and so many times 16 MiB of zeros, of which the compressor has seen one."""
    first = zlib.compressobj(9, wbits=-15)
    opening = first.compress(begin) + first.flush(zlib.Z_FULL_FLUSH)
    block = zlib.compressobj(9, wbits=-15)
    zeros = block.compress(bytes(2**24)) + block.flush(zlib.Z_FULL_FLUSH)
    return opening + blocks * zeros + zlib.compressobj(wbits=-15).flush()


def gzip_bomb(begin: bytes) -> bytes:
    return b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + deflated(begin, 200) + bytes(8)


def bz2_bomb() -> bytes:
    return bz2.compress(bytes(2**24)) * 200


def zip_bomb(member: str) -> bytes:
    """A zip whose list of contents says 3 GiB, and means it."""
    packed = deflated(b"", 192)
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        archive.writestr(member, b"")
    content = held.getvalue()
    sizes = struct.pack("<III", 0, len(packed), 192 * 2**24)
    local = content[:8] + struct.pack("<H", 8) + content[10:14] + sizes + content[26 : 30 + len(member)]
    middle = content[30 + len(member) :]
    listed = middle[:10] + struct.pack("<H", 8) + middle[12:16] + sizes + middle[28 : 46 + len(member)]
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 1, 1, len(listed), len(local) + len(packed), 0)
    return local + packed + listed + end


def png_bomb() -> bytes:
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 4, 0, 0, 0)
    packed = deflated(b"", 190)
    chunks = ((b"IHDR", header), (b"IDAT", b"\x78\x9c" + packed + bytes(4)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


def gif_bomb(content: bytes) -> bytes:
    """The same picture, said to have 65535 x 65535 pixels, on the screen and in it."""
    size = struct.pack("<HH", 65535, 65535)
    colours = 13 + 3 * 2 ** ((content[10] & 7) + 1)
    place = content.index(b"\x2c", colours)
    return content[:6] + size + content[10 : place + 5] + size + content[place + 9 :]


def hdf5_bomb(content: bytes, dataset: str) -> bytes:
    """The same file, whose field has 4e10 cells that were never written."""
    held = io.BytesIO(content)
    with h5py.File(held, "r+") as file:
        kept = dict(file[dataset].attrs)
        kind = file[dataset].dtype
        del file[dataset]
        file.create_dataset(dataset, (200_000, 200_000), kind, chunks=(1000, 1000)).attrs.update(kept)
    return held.getvalue()


def chunk_bomb(content: bytes, dataset: str) -> bytes:
    """The same file, of whose field a chunk inflates to 3 GiB, of which HDF5 would read the first as dry."""
    held = io.BytesIO(content)
    with h5py.File(held, "r+") as file:
        field = file[dataset].id
        packed = b"\x78\x9c" + deflated(b"", 192) + bytes(4)
        field.write_direct_chunk(field.get_chunk_info(0).chunk_offset, packed)
    return held.getvalue()


Content = Callable[[bytes], bytes]
BOMBS: dict[str, tuple[str, Content]] = {  # by what is made: the source whose file it is made of
    "zipped picture": ("fmi", lambda content: gzip_bomb(b"P5\n1 1\n255\n")),
    "zipped composite": ("dwd", lambda content: gzip_bomb(b"RY")),
    "zipped archive": ("dwd_rw_ascii", lambda content: gzip_bomb(b"")),
    "archive": ("dwd_rv", lambda content: bz2_bomb()),
    "nested": ("dwd_rv", lambda content: bz2.compress(bz2_bomb())),
    "tiles": ("srtm", lambda content: zip_bomb("N38W028.hgt")),
    "arrays": ("meteonet", lambda content: zip_bomb("data.npy")),
    "png": ("xband", lambda content: png_bomb()),
    "gif": ("mch", gif_bomb),
    "hdf5": ("knmi", lambda content: hdf5_bomb(content, "image1/image_data")),
    "odim": ("opera_odyssey", lambda content: hdf5_bomb(content, "dataset1/data1/data")),
    "netcdf": ("bom_c10", lambda content: hdf5_bomb(content, "precipitation")),
    "chunk": ("bom_c10", lambda content: chunk_bomb(content, "precipitation")),
    "chunk of many fields": ("openrainer", lambda content: chunk_bomb(content, "rainfall_amount")),
    "chunk of an image": ("goes", lambda content: chunk_bomb(content, "CMI")),
    "chunk of flags": ("goes", lambda content: chunk_bomb(content, "DQF")),
    "zarr": ("seviri", lambda content: bz2_bomb()),
}
UNSAMPLED = {"goes": "goes/abi/OR_ABI-L2-CMIPM1-M3C01_G16_s20171931811268_e20171931811326_c20171931811382.nc"}
SERIES = ("openrainer", "seviri")  # of files with many fields, of which the first is read
CHUNK = "data/0.0.0.0"  # of a store, the file that is made a bomb

# Reads each of the files in a process of its own; says why it was refused, in how long and with how much memory.
MEASURE = """
import json, os, resource, sys, time
from pathlib import Path
from benchmarks.damage import source_of
from pipelines.sources.source import RemoteFile

for config, path, is_series in json.loads(sys.argv[1]):
    source = source_of(config, Path(path).parent)
    file = next(source.files(None, None)) if is_series else RemoteFile(path, None)
    if os.fork() == 0:
        before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        try:
            source.read(file)
            said = None
        except (ValueError, OSError) as error:
            said = str(error)
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        print(json.dumps([said, time.process_time() - begin, used / 1024]), flush=True)
        os._exit(0)
    os.wait()
"""


def original(data: Path, config: str) -> Path:
    """The real file that a sample is of; of a folder, the first that its source names."""
    path = data / next(
        (sample.path for sample in SAMPLES if sample.config == config), UNSAMPLED.get(config, "")
    )
    if path.is_file() or path.suffix == ".zarr":
        return path
    return next(path.glob("N38W028*")) if config == "srtm" else next(path.glob("rainfall_NW*"))


@pytest.mark.data
def test_bombs_are_refused_before_they_cost(data, tmp_path):
    files = []
    for number, (config, make) in enumerate(BOMBS.values()):
        real = original(data, config)
        path = tmp_path / str(number) / real.name
        path.parent.mkdir()
        if real.is_dir():
            shutil.copytree(real, path, copy_function=shutil.copyfile)
            path.chmod(0o755)
            chunk = path / CHUNK
            chunk.write_bytes(make(chunk.read_bytes()))
        else:
            path.write_bytes(make(real.read_bytes()))
        files.append((config, str(path), config in SERIES))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps(files)], cwd=ROOT, stdout=subprocess.PIPE, check=True
    )
    fates = dict(zip(BOMBS, map(json.loads, done.stdout.splitlines()), strict=True))
    assert [name for name, (said, _, _) in fates.items() if said is None] == [], "accepted"
    assert {name: fate for name, fate in fates.items() if fate[1] > 1 or fate[2] > 200} == {}, "s, MiB"


def pointing(kind: str, canary: Path) -> Callable[[h5py.File, str], None]:
    """Puts in place of a dataset one that is in another file."""

    def plant(file: h5py.File, dataset: str) -> None:
        shape, dtype, attributes = file[dataset].shape, file[dataset].dtype, dict(file[dataset].attrs)
        del file[dataset]
        if kind == "link":
            file[dataset] = h5py.ExternalLink(str(canary), "data")
        elif kind == "virtual":
            layout = h5py.VirtualLayout(shape, dtype)
            layout[:] = h5py.VirtualSource(str(canary), "data", shape)
            file.create_virtual_dataset(dataset, layout).attrs.update(attributes)
        else:
            size = int(np.prod(shape)) * dtype.itemsize
            file.create_dataset(dataset, shape, dtype, external=[(str(canary), 0, size)])
            file[dataset].attrs.update(attributes)

    return plant


@pytest.mark.data
@pytest.mark.parametrize("kind", ["link", "virtual", "storage"])
@pytest.mark.parametrize(
    ("config", "dataset"),
    [
        ("knmi", "image1/image_data"),
        ("knmi_mfbs", "image1_image_data"),
        ("bom_c10", "precipitation"),
        ("opera_odyssey", "dataset1/data1/data"),
        ("smhi_openmrg", "rainfall_amount"),
    ],
)
def test_hdf5_that_points_at_other_files_is_refused(data, tmp_path, config, dataset, kind):
    real = original(data, config)
    planted, canary = tmp_path / real.name, tmp_path / "canary"
    planted.write_bytes(real.read_bytes())
    with h5py.File(real) as file:
        values = file[dataset][()]
    if kind == "storage":
        canary.write_bytes(values.tobytes())
    else:
        with h5py.File(canary, "w") as file:
            file["data"] = values
    with h5py.File(planted, "r+") as file:
        pointing(kind, canary)(file, dataset)
    with Decoder(source_of(config, tmp_path)) as decoder, pytest.raises(Refusal) as caught:
        decoder.decode(decoder.files(None, None)[0])
    assert caught.value.code in (Code.DAMAGED, Code.FORBIDDEN)
    with pytest.raises(ValueError, match=real.name):  # without the sandbox as well
        source_of(config, tmp_path).read(RemoteFile(str(planted), None))


@pytest.mark.data
@pytest.mark.parametrize("config", ["fmi_geotiff", "gtopo"])
def test_a_description_of_other_files_in_the_name_of_a_picture_is_refused(data, tmp_path, config):
    canary = tmp_path / "canary"
    canary.write_bytes(CANARY)
    planted = tmp_path / original(data, config).name
    planted.write_text(
        '<VRTDataset rasterXSize="32" rasterYSize="32"><VRTRasterBand dataType="Byte" band="1" '
        f'subClass="VRTRawRasterBand"><SourceFilename relativeToVRT="0">{canary}</SourceFilename>'
        "<ImageOffset>0</ImageOffset><PixelOffset>1</PixelOffset><LineOffset>32</LineOffset>"
        "</VRTRasterBand></VRTDataset>"
    )
    with Decoder(source_of(config, tmp_path)) as decoder, pytest.raises(Refusal) as caught:
        decoder.decode(RemoteFile(str(planted), None))
    assert caught.value.code == Code.DAMAGED
    with pytest.raises(ValueError, match=planted.name):
        source_of(config, tmp_path).read(RemoteFile(str(planted), None))


class Harm:
    """What unpickling makes a file of."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return (Path.touch, (self.canary,))


@pytest.mark.data
def test_a_pickle_in_an_array_file_is_not_run(data, tmp_path):
    real, canary = original(data, "meteonet"), tmp_path / "canary"
    pickled = pickle.dumps(Harm(canary))
    head = "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(117) + "\n"
    member = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head.encode() + pickled
    for name in ("data.npy", "dates.npy", "miss_dates.npy"):
        with zipfile.ZipFile(real) as whole, zipfile.ZipFile(tmp_path / real.name, "w") as planted:
            for kept in whole.namelist():
                planted.writestr(kept, member if kept == name else whole.read(kept))
        with pytest.raises(ValueError, match=real.name):
            source_of("meteonet", tmp_path).read(RemoteFile(str(tmp_path / real.name), None))
        assert not canary.exists()
