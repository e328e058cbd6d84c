"""`python -m benchmarks.damage`: damages copies of real files of every format and shows what comes of each.

Each copy differs from its file in one place or a few, as transfers, disks and malice leave them, and is
read by `Decoder` as a feed's file is. It ends in one of three ways: refused with a reason, accepted
without a changed pixel, or accepted with some. None may crash or hang this process, and none may enter with
another place or another time.
"""

import argparse
import bz2
import gzip
import io
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np
import yaml
from hydra.utils import instantiate
from omegaconf import OmegaConf

from pipelines.decode import Decoder
from pipelines.decoding.refusal import Refusal
from pipelines.frame import Frame
from pipelines.sources.source import RemoteFile, Source

ROOT = Path(__file__).parent.parent
SECTOR = 512  # bytes
HEADER = 4096  # bytes at both ends of a file where formats keep what they say of it
HANGS = 21.0  # s: the limit of a reader, and a second to end it


@dataclass(frozen=True)
class Sample:
    """A real file, or a folder of them, and the configuration that reads it."""

    config: str  # in configs/source/
    path: str  # in the folder of real files
    weight: int = 4  # of its copies among all; less for what takes long to read


SAMPLES = (
    Sample("arome_relief", "meteonet/masks/NW_masks.grib"),
    Sample("bom_c10", "bom/prcp-c10/66/2020/10/31/66_20201031_010000.prcp-c10.nc"),
    Sample("bom_cscn", "bom/prcp-cscn/2/2018/06/16/2_20180616_120000.prcp-cscn.nc"),
    Sample("dwd", "dwd/ry_20200101/raa01-ry_10000-2001011510-dwd---bin.gz"),
    Sample("dwd_rv", "dwd/radvor_rv/DE1200_RV2210180700.tar.bz2", 1),
    Sample("dwd_rw_ascii", "dwd/radolan_asc/RW-20221018.tar.gz", 1),
    Sample("etopo", "dem/etopo20", 1),
    Sample("fmi", "fmi/pgm/20170509/201705091100_fmi.radar.composite.lowest_FIN_SUOMI1.pgm.gz"),
    Sample("fmi_geotiff", "fmi/geotiff/20170509/201705091100_FINUTM.tif", 1),
    Sample("gtopo", "dem/gtopo_bonn/bonn_gtopo.tif"),
    Sample("knmi", "knmi/2010/08/RAD_NL25_RAP_5min_201008260200.h5"),
    Sample("knmi_mfbs", "knmi_mfbs/RAD_NL25_RAC_MFBS_5min_201109102000.nc"),
    Sample("mch", "mch/20170131/AQC170311000F_00005.801.gif"),
    Sample("meteonet", "meteonet/radar", 2),
    Sample("mrms", "mrms/2019/06/10/PrecipRate_00.00_20190610-001000.grib2", 1),
    Sample("nwcsaf", "saf/20180601/CRR/S_NWC_CRR_MSG4_Europe-VISIR_20180601T120000Z.nc", 2),
    Sample("openrainer", "openrainer/openrainer_RAD.nc"),
    Sample("opera_nimbus", "opera/nimbus_20241126/T_PAAH22_C_EUOC_20241126010000.hdf", 1),
    Sample("opera_odyssey", "opera/odyssey_20180824/T_PAAH21_C_EUOC_20180824190000.hdf", 1),
    Sample("seviri", "seviri/sat_data.zarr"),
    Sample("smhi_openmrg", "smhi_openmrg/openmrg_rad_20150725.nc"),
    Sample("srtm", "dem/srtm3_azores"),
    Sample("xband", "xband_cagliari/2018-05-01_23:30:04.png"),
    Sample(
        "glm_lcfa", "goes/glm_l2_lcfa/OR_GLM-L2-LCFA_G16_s20181830433200_e20181830433400_c20181830433424.nc"
    ),
    Sample("meteonet_quality", "meteonet/radar/rainfall_mean_quality-code_NW_2016_08.3.npz"),
    Sample("nexrad", "nexrad_l2/KLBB20160601_150025_V06"),
)

Damage = Callable[[bytes, random.Random], bytes]


def flipped(content: bytes, rng: random.Random) -> bytes:
    """One bit is another."""
    return _put(
        content, place := rng.randrange(len(content)), bytes([content[place] ^ 1 << rng.randrange(8)])
    )


def zeroed(content: bytes, rng: random.Random) -> bytes:
    """A sector of the disk came back empty."""
    place = rng.randrange(0, len(content), SECTOR)
    return _put(content, place, bytes(min(SECTOR, len(content) - place)))


def cut(content: bytes, rng: random.Random) -> bytes:
    """The transfer ended too early, anywhere or just before the end."""
    return content[: rng.choice((rng.randrange(len(content)), len(content) - rng.randint(1, 16)))]


def swapped(content: bytes, rng: random.Random) -> bytes:
    """Two blocks stand in each other's place."""
    size = min(SECTOR, len(content) // 4)
    first, second = sorted(rng.sample(range(len(content) // size), 2))
    one, other = (content[place * size : (place + 1) * size] for place in (first, second))
    return _put(_put(content, first * size, other), second * size, one)


def appended(content: bytes, rng: random.Random) -> bytes:
    """Something stands behind the end: zeros, noise or the file again."""
    return content + rng.choice((bytes(SECTOR), rng.randbytes(rng.randint(1, SECTOR)), content))


def header_byte(content: bytes, rng: random.Random) -> bytes:
    """A byte near the beginning or the end is another."""
    place = _in_header(content, rng)
    return _put(content, place, bytes([rng.choice([byte for byte in range(256) if byte != content[place]])]))


def header_digit(content: bytes, rng: random.Random) -> bytes:
    """A digit near the beginning or the end, where formats write times and corners, is another."""
    places = [*range(min(HEADER, len(content))), *range(max(0, len(content) - HEADER), len(content))]
    digits = [place for place in places if chr(content[place]) in "0123456789"]
    place = rng.choice(digits or places)
    return _put(content, place, str((content[place] + rng.randint(1, 9)) % 10).encode())


def attribute(content: bytes, rng: random.Random) -> bytes:
    """A number or a word that HDF5 keeps beside the data is another: a time, a corner, a scale, a unit."""
    held = io.BytesIO(content)
    with h5py.File(held, "r+") as file:
        nodes = [file, *(file[name] for name in _names(file))]
        choices = [(node, name) for node in nodes for name in node.attrs if _editable(node, name)]
        node, name = rng.choice(choices)
        node.attrs.modify(name, _edited(np.array(node.attrs[name]), rng))
    return held.getvalue()


def inside(damage: Damage) -> Damage:
    """The same, to what is zipped, which is zipped again: a check sum of the zipping shows nothing then."""

    def damaged(content: bytes, rng: random.Random) -> bytes:
        if content.startswith(b"\x1f\x8b"):
            return gzip.compress(damage(gzip.decompress(content), rng), 1, mtime=0)
        return bz2.compress(damage(bz2.decompress(content), rng), 1)

    damaged.__name__ = f"inside_{damage.__name__}"
    return damaged


ANYWHERE: tuple[Damage, ...] = (flipped, zeroed, cut, swapped, appended, header_byte, header_digit)


def damages(content: bytes) -> tuple[Damage, ...]:
    """The ways to damage a file of this kind."""
    if content.startswith((b"\x1f\x8b", b"BZh")):
        return *ANYWHERE, *(inside(damage) for damage in ANYWHERE)
    if content.startswith(b"\x89HDF"):
        return *ANYWHERE, attribute, attribute
    return ANYWHERE


def _put(content: bytes, place: int, other: bytes) -> bytes:
    return content[:place] + other + content[place + len(other) :]


def _in_header(content: bytes, rng: random.Random) -> int:
    within = rng.randrange(min(HEADER, len(content)))
    return rng.choice((within, len(content) - 1 - within))


def _names(file: h5py.File) -> list[str]:
    names: list[str] = []
    file.visit(names.append)
    return names


def _editable(node: h5py.HLObject, name: str) -> bool:
    if name.startswith(("_Netcdf", "_NC", "DIMENSION", "REFERENCE", "CLASS", "NAME")):
        return False
    value = node.attrs[name]
    return not isinstance(value, h5py.Empty) and np.array(value).dtype.kind in "iufSUO" and np.size(value) > 0


def _edited(value: np.ndarray, rng: random.Random) -> object:
    """An attribute with another number, or another digit or letter."""
    place = rng.randrange(value.size)
    element = value.flat[place]
    if isinstance(element, str | bytes):
        text = element.encode() if isinstance(element, str) else element
        other = header_digit(text, rng) if text else b"1"
        value.flat[place] = other.decode(errors="replace") if isinstance(element, str) else other
    else:
        value.flat[place] = element + np.array(rng.choice((1, -1, 7))).astype(value.dtype)
    return value if value.shape else value[()]


@dataclass
class Account:
    """What came of the copies of one file."""

    config: str
    copies: int = 0
    refused: Counter[str] = field(default_factory=Counter)  # by code
    unchanged: int = 0  # accepted, with every pixel as it was
    changed: list[float] = field(default_factory=list)  # shares of changed pixels of those accepted otherwise
    largest: float = 0.0  # change of a pixel, in the quantity's units
    by_damage: Counter[str] = field(default_factory=Counter)  # of those accepted with changed pixels
    misplaced: list[str] = field(default_factory=list)  # accepted with another place, time or quantity
    slowest: float = 0.0  # s
    unread: str = ""  # why not even the whole file is accepted, and no copy was made
    reasons: Counter[str] = field(default_factory=Counter)  # of what a limit or a crash ended

    @property
    def accepted(self) -> int:
        """Of the copies."""
        return self.unchanged + len(self.changed)

    @property
    def accounted(self) -> int:
        """Refused with a reason, or accepted."""
        return self.refused.total() + self.accepted + len(self.misplaced)

    @property
    def share(self) -> float:
        """Of all pixels of accepted copies, those that changed."""
        return sum(self.changed) / max(1, self.accepted)


def source_of(config: str, folder: Path, **settings: object) -> Source:
    """The source of configs/source/, with its files in a folder, and with other settings than its own."""
    page = yaml.safe_load((ROOT / "configs" / "source" / f"{config}.yaml").read_text())
    built: Source = instantiate(OmegaConf.create({**page, "path": str(folder), **settings}), _convert_="all")
    return built


def account(sample: Sample, data: Path, copies: int, seed: int = 1) -> Account:
    """Damages a file so many times, and reads each copy."""
    rng = random.Random(f"{seed} {sample.config}")
    found = Account(sample.config)
    with tempfile.TemporaryDirectory() as place:
        given = Path(place) / (data / sample.path).name
        if (data / sample.path).is_dir():
            shutil.copytree(data / sample.path, given)
        else:
            shutil.copy(data / sample.path, given)
        source = source_of(sample.config, given if given.is_dir() else Path(place))
        with Decoder(source) as decoder:
            try:
                files = decoder.files(None, None)
                file = files[len(files) // 2]
                whole = decoder.decode(file)
            except Refusal as refusal:
                found.unread = str(refusal)
                return found
            for path, how, content in _copies(given, copies, rng):
                kept = path.read_bytes()
                path.write_bytes(content)
                _read(decoder, file, whole, how, found)
                path.write_bytes(kept)
    return found


def _copies(given: Path, count: int, rng: random.Random) -> Iterator[tuple[Path, str, bytes]]:
    """Files, how they are damaged, and what they hold then."""
    paths = [given] if given.is_file() else sorted(path for path in given.rglob("*") if path.is_file())
    contents = [path.read_bytes() for path in paths]
    choices = [(path, content) for path, content in zip(paths, contents, strict=True) if len(content) > 16]
    sizes = [min(len(content), 2**16) for _, content in choices]
    while count:
        path, content = rng.choices(choices, sizes)[0]
        damage = rng.choice(damages(content))
        damaged = damage(content, rng)
        if damaged != content:
            count -= 1
            yield path, damage.__name__, damaged


def _read(decoder: Decoder, file: RemoteFile, whole: Frame, how: str, found: Account) -> None:
    """Reads a copy, and writes down what came of it."""
    found.copies += 1
    begin = time.monotonic()
    try:
        frame = decoder.decode(file)
    except Refusal as refusal:
        found.refused[refusal.code] += 1
        if refusal.code in ("crashed", "timeout", "memory", "invalid", "forbidden"):
            found.reasons[f"{how}: {refusal.code}: {refusal}"] += 1
    else:
        _compare(frame, whole, how, found)
    found.slowest = max(found.slowest, time.monotonic() - begin)


def _compare(frame: Frame, whole: Frame, how: str, found: Account) -> None:
    for name in ("grid", "valid_time", "cadence", "variable", "group"):
        got, expected = getattr(frame, name), getattr(whole, name)
        if got != expected:
            found.misplaced.append(f"{how}: {name} is {got}, was {expected}")
            return
    same = (frame.values == whole.values) | (np.isnan(frame.values) & np.isnan(whole.values))
    if same.all():
        found.unchanged += 1
        return
    change = np.abs(frame.values - whole.values)[~same]
    found.changed.append(1 - float(same.mean()))
    found.by_damage[how] += 1
    found.largest = max(found.largest, float(np.nanmax(change, initial=0)))


HEADS = (
    "source", "copies", "refused", "accepted, all pixels equal", "accepted, some changed",
    "changed pixels of accepted", "most in one copy", "largest change", "place or time changed", "slowest s",
)  # fmt: skip


def cells(found: Account) -> tuple[str, ...]:
    """An account as the table shows it."""
    codes = ", ".join(f"{code} {count}" for code, count in found.refused.most_common())
    kinds = ", ".join(f"{kind} {count}" for kind, count in found.by_damage.most_common())
    return (
        f"`{found.config}`",
        str(found.copies),
        f"{found.refused.total()} ({codes})" if codes else "0",
        str(found.unchanged),
        f"{len(found.changed)} ({kinds})" if kinds else "0",
        f"{100 * found.share:.4f} %",
        f"{100 * max(found.changed, default=0):.3f} %",
        f"{found.largest:.4g}",
        str(len(found.misplaced)),
        f"{found.slowest:.1f}",
    )


def main() -> int:
    """Prints the table; 1 if a copy is unaccounted for, took too long, or has another place or time."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.damage", description=__doc__)
    parser.add_argument("configs", nargs="*", metavar="SOURCE", help="names in configs/source/; none: all")
    parser.add_argument("--copies", type=int, default=10_000, help="of all files together (default 10000)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    asked = parser.parse_args()
    known = sorted({sample.config for sample in SAMPLES})
    if unknown := set(asked.configs) - set(known):
        parser.error(f"{' '.join(sorted(unknown))}: none of {', '.join(known)}")
    chosen = [sample for sample in SAMPLES if not asked.configs or sample.config in asked.configs]
    weight = sum(sample.weight for sample in chosen)
    begin = time.monotonic()
    with ThreadPoolExecutor(asked.workers) as pool:
        accounts = list(
            pool.map(
                lambda sample: account(
                    sample, asked.data, -(-asked.copies * sample.weight // weight), asked.seed
                ),
                chosen,
            )
        )
    for line in (HEADS, ("---",) * len(HEADS), *map(cells, accounts)):
        print("| " + " | ".join(line) + " |")
    copies = sum(found.copies for found in accounts)
    lost = copies - sum(found.accounted for found in accounts)
    misplaced = [f"{found.config}: {text}" for found in accounts for text in found.misplaced]
    slow = [found.config for found in accounts if found.slowest > HANGS]
    unread = [
        f"{found.config}: the whole file is refused: {found.unread}" for found in accounts if found.unread
    ]
    print(
        f"\n{copies} copies in {time.monotonic() - begin:.0f} s: {lost} not accounted for, {len(misplaced)} "
        f"accepted with another place or time, {len(slow)} sources took more than {HANGS:g} s for one"
    )
    for found in accounts:
        for reason, count in found.reasons.most_common(8):
            print(f"  {found.config}: {count} x {reason}")
    print(*misplaced, *unread, sep="\n")
    return int(bool(lost or misplaced or slow or unread))


if __name__ == "__main__":
    sys.exit(main())
