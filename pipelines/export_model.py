"""`export`: a trained network as one graph, `.pt2` (torch.export) or `.onnx`; data by `pipelines.export`.

The graph holds the whole way from the newest frames (mm/h, NaN = not observed) to the probability of each
class: scaling, advection, prior, network and calibration. The motion of the rain is an input: optical flow is
OpenCV's. The grid and the lead times are fixed, each a part of the graph, and how old a frame may be, since
how many steps a trajectory takes follows from it. Beside the graph lies its card, a JSON file that says what
goes in, what comes out, and how far what was written is from the network.
"""

import hashlib
import importlib
import importlib.util
import json
import logging
import math
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from metnet import model as engine
from metnet.advection import KEPT, bordered, come_from, sampled, smooth_at
from metnet.axial_head import Coherent
from metnet.batch import Batch
from metnet.mended import mended
from metnet.model import Changes, MetNet, Moving
from metnet.rain import BinnedForecast
from pipelines.beside import means_around
from pipelines.cube import RADAR
from pipelines.destination import untaken
from pipelines.export import Exported
from pipelines.export import export as export_data
from pipelines.motion import FRAMES, motion_and_doubt
from pipelines.observations import Observations
from pipelines.past import RADAR_ALONE, past
from pipelines.plain import rain_cube
from pipelines.pretrained import run_folder
from pipelines.trained import CARD, TrainedModel, trained
from pipelines.version import version

GRAPHS = {".pt2": "a program of torch.export", ".onnx": "an ONNX model"}
LONGEST_STEP = 5.0  # minutes of one step along a trajectory, as `metnet.advection.advect` takes them
NEAR = 1e-4  # of a probability: how far what was written may be from the network
LATE = 30.0  # minutes by which frames may come later than their cadence has it
LOOKED_AT = 12  # frames of a cube, of which the wettest becomes the real sample
OPSET = 20  # of ONNX: the first whose GridSample is the present one
INT32, INT64 = 6, 7  # as ONNX numbers its types
NEEDED = ("onnx", "onnxscript", "onnxruntime")
log = logging.getLogger(__name__)
MEANING = {
    "radar": "rain rate, mm/h; NaN: not observed; oldest frame first, row 0 in the north",
    "age": "minutes before the init time of each radar frame, falling",
    "motion": "cells a minute to the east, to the south, and in doubt; optical flow of the newest frames",
    "cell_size": "side of a cell, metres",
    "satellite": "satellite channels and other radars, each in its unit; NaN: not observed; oldest first",
    "satellite_age": "minutes before the init time of each image: of all channels, or of each",
    "static": "static fields, each in its unit",
    "place": "longitude and latitude of each cell, degrees",
    "init_time": "time of the newest radar frame, seconds since 1970-01-01 UTC",
    "surroundings": "rain far around the grid, mm/h, in means over larger cells",
}
Run = Callable[[Sequence[Tensor]], Tensor]


def export(
    path: str,
    to: str,
    group: str = RADAR,
    run: str | None = None,
    start: str | None = None,
    end: str | None = None,
    license: str | None = None,
    cube: str | None = None,
    size: Sequence[int] | None = None,
    lead_times: Sequence[float] | None = None,
) -> Exported:
    """Writes a trained network as a graph, or data as `pipelines.export.export`, to a place of its own.

    Args:
        path: run folder of `metnet train`; or folder or URL of a cube or of forecasts.
        to: a file that ends in .pt2 or .onnx; or, of data, a place that ends in .zarr or .nc.
        group: of data, as `pipelines.export.export` has it.
        run: likewise.
        start: likewise.
        end: likewise.
        license: likewise.
        cube: of a network: whose grid and cadence it is written for; None: the first it learned from.
        size: of a network: rows and columns, the middle of the cube's grid; None: all of it.
        lead_times: of a network: minutes, rising; None: those it learned from.

    Raises:
        ValueError: if what is asked for does not go together, or what was written says something else than
            the network, in which case nothing is left behind.
    """
    holds_network = (run_folder(path) / CARD).is_file()
    asks_for_graph = Path(to).suffix in GRAPHS
    if not holds_network and not asks_for_graph:
        _refuse(path, "a network", {"cube": cube, "size": size, "lead_times": lead_times})
        return export_data(path, to, group, run, start, end, license)
    if not (holds_network and asks_for_graph):
        kinds = " or ".join(f"{kind} that ends in {suffix}" for suffix, kind in GRAPHS.items())
        raise ValueError(
            f"path={path}, to={to}: a network is a run folder of metnet train with {CARD} in it, which "
            f"{'is' if holds_network else 'is not'} there, and becomes {kinds}; data become .zarr or .nc"
        )
    named = None if group == RADAR else group
    of_data = {"group": named, "run": run, "start": start, "end": end, "license": license}
    _refuse(path, "a cube or forecasts", of_data)
    target = untaken("to", to)
    if Path(to).suffix == ".onnx" and (lacking := [n for n in NEEDED if importlib.util.find_spec(n) is None]):
        raise ValueError(
            f"to={to}: ONNX needs the packages {', '.join(lacking)}; pip install {' '.join(NEEDED)}, "
            "or write a .pt2"
        )
    made = trained(path)
    learned = [opened["path"] for opened in made.card["cubes"]]
    leads = made.lead_times if lead_times is None else tuple(float(lead) for lead in lead_times)
    return write_graph(made, target, _cube(learned[0]) if cube is None else rain_cube(cube), size, leads)


def _refuse(path: str, those: str, given: Mapping[str, object]) -> None:
    """Refuses what is said of something else than what is written, and would change nothing.

    Raises:
        ValueError: naming it.
    """
    idle = [f"{key}={value}" for key, value in given.items() if value is not None]
    if idle:
        raise ValueError(f"{', '.join(idle)}: expected of {those} only, which {path} is not; leave it out")


def _cube(learned: str) -> Observations:
    """The first cube that a network learned from, if it is here."""
    try:
        return rain_cube(learned)
    except ValueError as error:
        raise ValueError(
            f"cube=null: the cube that the network learned from is not here ({error}); give cube=CUBE of "
            "the grid and cadence that the graph is for"
        ) from None


def write_graph(
    made: TrainedModel,
    to: Path,
    cube: Observations,
    size: Sequence[int] | None,
    lead_times: Sequence[float],
) -> Exported:
    """Writes the graph, opens it, compares it with the network on made-up and real rain, writes its card.

    Raises:
        ValueError: for a network, lead times or a size that no graph can be written for, or a graph that
            says something else than the network.
    """
    if _network(made).planes is not None:
        raise ValueError(
            "the network has lead_time=input, which looks at its lead times; expected one with FiLM"
        )
    if not lead_times or any(
        later <= lead for lead, later in zip((0.0, *lead_times), lead_times, strict=False)
    ):
        raise ValueError(f"lead_times={list(lead_times)}: expected minutes that rise from above 0")
    if cube.cadence not in made.cadences:
        known = ", ".join(f"{cadence.total_seconds() / 60:g}" for cadence in made.cadences)
        raise ValueError(
            f"{cube.path} has a frame every {cube.cadence.total_seconds() / 60:g} min, the model learned "
            f"from {known} min; give another cube="
        )
    made.warn_of_unlearned(lead_times)
    real = _real(cube, made, _window(cube, size), lead_times)
    made_up = _made_up(made, real)
    samples = {
        "made up": made_up,
        "made up, a frame missing": _without(made_up, -2),
        "made up, a single frame": _newest_alone(made_up),
        "real": real,
    }
    graph = Graph(made, lead_times, real.age.max().item() + LATE)
    log.info(
        "writing a graph of %d lead times and comparing it with the network: this takes minutes",
        len(lead_times),
    )
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{to.name}.", dir=to.parent) as aside:
        written = Path(aside) / to.name
        (_write_onnx if to.suffix == ".onnx" else _write_pt2)(graph, graph.inputs(real), written)
        apart = _apart(made, graph, _opened(written, graph.names), samples)
        card = _card(made, graph, real, written, apart, cube)
        (Path(aside) / CARD).write_text(json.dumps(card, indent=2))
        written.replace(to)
        (Path(aside) / CARD).replace(to.with_name(f"{to.name}.json"))
    rows, columns = real.radar.shape[2:]
    told = (
        f"{made.card['parameters']:,} parameters, {rows} x {columns} cells, "
        f"{lead_times[0]:g} to {lead_times[-1]:g} min, "
        f"differs from the network by {max(apart.values()):.1g} at most"
    )
    return Exported(str(to), told, to.stat().st_size)


class Graph(nn.Module):
    """A network as a function of tensors, for one sample of one grid size.

    Args:
        made: a network that is told its lead times by FiLM.
        lead_times: minutes.
        oldest: minutes before the init time; the largest age of a radar frame.
    """

    def __init__(self, made: TrainedModel, lead_times: Sequence[float], oldest: float):
        super().__init__()
        self.network = network = _network(made)
        self.calibration = made.calibration
        self.lead_times, self.oldest = tuple(lead_times), oldest
        sees = network.scaling
        wanted = {
            "motion": network.prior is not None,
            "cell_size": network.prior is not None,
            "satellite": sees.satellite is not None,
            "satellite_age": sees.satellite is not None,
            "static": sees.static is not None,
            "place": sees.place is not None,
            "init_time": sees.place is not None,
            "surroundings": network.surroundings is not None,
        }
        self.names = ("radar", "age", *(name for name, is_wanted in wanted.items() if is_wanted))

    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """What of a batch goes in, in the order of `names`."""
        return tuple(getattr(batch, name) for name in self.names)

    def forward(self, *inputs: Tensor) -> Float[Tensor, "batch lead bin y x"]:
        """The probability of each class of rain."""
        given = dict(zip(self.names, inputs, strict=True))
        radar = given["radar"]
        known = {
            "lead_time": torch.tensor(self.lead_times),
            "cell_size": torch.ones(1),
            "init_time": torch.zeros(1, dtype=torch.int64),
        }
        seen = self.network.encode(Batch(**{**known, **given}))
        carried = None
        if seen.rain is not None:
            rain = Unrolled(seen.rain, self.oldest)
            carried = rain.carried(self.lead_times)
            seen = replace(seen, rain=cast(Moving, rain))
        at_once = max(1, engine.PIXELS_AT_ONCE // seen.fine[:, 0].numel())
        parts = []
        for first in range(0, len(self.lead_times), at_once):
            part = slice(first, first + at_once)
            told = None if carried is None else carried[:, :, part]
            parts.append(self.network.decode(seen, torch.tensor(self.lead_times[part]), told).softmax(dim=2))
        rows, columns = radar.shape[2:]
        said = torch.cat(parts, dim=1)[..., :rows, :columns]
        if self.calibration is None:
            return said
        forecast = BinnedForecast(said, self.network.bins)
        return self.calibration(forecast, torch.tensor(self.lead_times)).probability


@dataclass(frozen=True)
class Unrolled:
    """A `Moving` of one sample whose trajectories have a known number of steps, so that a graph holds them.

    Which frames are carried, and so their ages, is known only when the graph runs: a trajectory whose length
    depends on them has as many steps as it may need, and those too many have no length.
    """

    moving: Moving
    oldest: float  # minutes: the largest age of a frame

    def __getattr__(self, name: str) -> Any:
        return getattr(self.moving, name)

    @cached_property
    def together(self) -> Float[Tensor, "1 frame Y X"]:
        """As `Moving.together`."""
        flow, gaps = self.moving.motion, (self.moving.age[0] - self.moving.age[0, 0]).clamp(min=0)
        each = []
        for field, gap in zip(self.moving.radar.unbind(dim=1), gaps, strict=True):
            place = self._back(flow, torch.zeros_like(flow), gap, self.oldest)
            each.append(sampled(bordered(field[:, None]), place, self._rows))
        return torch.cat(each, dim=1)

    @cached_property
    def mended(self) -> Float[Tensor, "1 2 Y X"]:
        """As `Moving.mended`."""
        return mended(self.moving.motion, self.together, self.moving.age)

    @cached_property
    def changes(self) -> Changes:
        """As `Moving.changes`."""
        return Changes.of(self.together, self.moving.age, self.mended)

    def carried(self, lead_times: Sequence[float]) -> Float[Tensor, "1 frame lead Y X"]:
        """As `Moving.carried`, the whole map at a time."""
        framed, late = bordered(self.together), self.moving.age[0, 0]
        way = self.mended
        later, reached, told = None, torch.zeros_like(late), []
        for before, lead in pairwise([-self.oldest, *lead_times]):
            most = self.oldest + lead - KEPT
            if most > 0:
                beyond = (late + lead - KEPT).clamp(min=0)
                start = torch.zeros_like(way) if later is None else later
                later = self._back(way, start, beyond - reached, min(lead - before, most))
                reached = beyond
            minutes = (late + lead).clamp(max=KEPT)
            place = come_from(way, minutes, self._rows, later)
            told.append(sampled(framed, place, self._rows))
        return torch.stack(told, dim=2)

    @property
    def _rows(self) -> range:
        return range(self.moving.motion.shape[2])

    def _back(
        self,
        motion: Float[Tensor, "1 2 y x"],
        displacement: Float[Tensor, "1 2 y x"],
        minutes: Float[Tensor, ""],
        most: float,
    ) -> Float[Tensor, "1 2 y x"]:
        """Displacements (cells) traced further back by minutes (at most so many) that the graph is told."""
        steps = (minutes / LONGEST_STEP).ceil()
        for step in range(math.ceil(most / LONGEST_STEP)):
            length = torch.where(step < steps, minutes / steps, 0.0)
            halfway = displacement - smooth_at(motion, displacement, self._rows) * (length / 2)
            displacement = displacement - smooth_at(motion, halfway, self._rows) * length
        return displacement


def _network(made: TrainedModel) -> MetNet:
    """The network of a model.

    Raises:
        ValueError: for a published one, which sees the past anew for each lead time, or one with a head that
            draws members pixel by pixel.
    """
    if not isinstance(made.network, MetNet):
        why = "those with a head" if isinstance(made.network, Coherent) else "those published"
        raise ValueError(
            f"the network is a {type(made.network).__name__}: no graph is written of {why}; "
            "expected the run folder of a MetNet, such as model=small"
        )
    return made.network


def _write_pt2(graph: Graph, inputs: tuple[Tensor, ...], to: Path) -> None:
    with torch.no_grad():
        torch.export.save(torch.export.export(graph, inputs), to)


def _write_onnx(graph: Graph, inputs: tuple[Tensor, ...], to: Path) -> None:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on parts of the ONNX packages themselves
        for name in ("torch.onnx._internal.exporter._registration", "onnxscript.optimizer._constant_folding"):
            logging.getLogger(name).setLevel(logging.ERROR)
        program = torch.onnx.export(
            graph,
            inputs,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(graph.names),
            output_names=["probability"],
            custom_translation_table={
                torch.ops.aten.sort.stable: _stable_sort(),
                torch.ops.aten.searchsorted.Tensor: _search_sorted(),
            },
            verbose=False,
            optimize=False,
        )
        assert program is not None
        _lighten(program.model)
        program.save(to)


def _lighten(model: Any) -> None:
    """Leaves out of a graph what is always the same or is there twice.

    The exporter's own optimizer tries hundreds of patterns on each of 20,000 nodes besides: eight minutes for
    the smallest graph, in place of six seconds. What it saves, runtimes find themselves.
    """
    passes = importlib.import_module("onnx_ir.passes.common")
    importlib.import_module("onnxscript.optimizer").fold_constants(model)
    passes.CommonSubexpressionEliminationPass()(model)
    passes.RemoveUnusedNodesPass()(model)


def _stable_sort() -> Callable[..., Any]:
    """What ONNX has no operator for: a sort of whole numbers, in which equal ones keep their order."""
    op = importlib.import_module("onnxscript").opset20

    def sort(self: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
        """The place among its equals is made a part of each number."""
        count = self.shape[dim]
        shape = [count if axis == dim % len(self.shape) else 1 for axis in range(len(self.shape))]
        place = op.Constant(value_ints=list(range(count)))
        numbers = op.Add(
            op.Mul(op.Cast(self, to=INT64), op.Constant(value_int=count)),
            op.Reshape(place, op.Constant(value_ints=shape)),
        )
        _, index = op.TopK(
            numbers, op.Constant(value_ints=[count]), axis=dim, largest=int(descending), sorted=1
        )
        return op.GatherElements(self, index, axis=dim), index

    return sort


def _search_sorted() -> Callable[..., Any]:
    """Likewise: how many of the numbers that rise along each row lie below others, or are no greater."""
    op = importlib.import_module("onnxscript").opset20

    def search_sorted(self: Any, other: Any, right: bool = False, **_: Any) -> Any:
        """All numbers are compared with all others."""
        last = op.Constant(value_ints=[-1])
        each, numbers = op.Unsqueeze(other, last), op.Unsqueeze(self, op.Constant(value_ints=[-2]))
        lower = op.LessOrEqual(numbers, each) if right else op.Less(numbers, each)
        return op.Cast(op.ReduceSum(op.Cast(lower, to=INT32), last, keepdims=0), to=INT64)

    return search_sorted


def _opened(path: Path, names: Sequence[str]) -> Run:
    """The graph in a file, as those run it who have nothing else."""
    if path.suffix == ".pt2":
        program = torch.export.load(path).module()
        return lambda inputs: cast(Tensor, program(*inputs))
    runtime = importlib.import_module("onnxruntime")
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(inputs: Sequence[Tensor]) -> Tensor:
        fed = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run(None, fed)[0])

    return run


def _apart(made: TrainedModel, graph: Graph, written: Run, samples: Mapping[str, Batch]) -> dict[str, float]:
    """The largest difference of a probability from the network's, on each sample.

    Raises:
        ValueError: if it is more than `NEAR`.
    """
    apart = {}
    for name, batch in samples.items():
        expected = made(batch)
        assert isinstance(expected, BinnedForecast)
        with torch.no_grad():
            apart[name] = (written(graph.inputs(batch)) - expected.probability).abs().max().item()
        if not apart[name] <= NEAR:
            raise ValueError(
                f"on {name} rain the written graph differs from the network by {apart[name]:.2g}, "
                f"expected at most {NEAR:g}; nothing was left behind: try the other kind of file"
            )
    return apart


def _window(cube: Observations, size: Sequence[int] | None) -> tuple[int, int, int, int]:
    """First row, first column, rows and columns of the middle of the grid."""
    whole = cube.grid.y_size, cube.grid.x_size
    asked = whole if size is None else tuple(size)
    if len(asked) != 2 or any(not 4 <= side <= most for side, most in zip(asked, whole, strict=True)):
        raise ValueError(
            f"size={list(asked)}: expected rows and columns, at least 4 each, within the {whole[0]} x "
            f"{whole[1]} of {cube.path}"
        )
    return (whole[0] - asked[0]) // 2, (whole[1] - asked[1]) // 2, asked[0], asked[1]


def _real(
    cube: Observations, made: TrainedModel, window: tuple[int, int, int, int], lead_times: Sequence[float]
) -> Batch:
    """What a forecaster sees in the wettest of some frames; beside the rain, made-up fields."""
    y, x, rows, columns = window
    held = [time for time, is_there in zip(cube.times, cube.observed, strict=True) if is_there]
    if not held:
        raise ValueError(f"{cube.path}: holds no frame to try the graph on; give another cube=")
    some = [held[round(place)] for place in np.linspace(0, len(held) - 1, min(LOOKED_AT, len(held)))]
    wettest = max(some, key=lambda time: float(np.nansum(cube.block(time, 1, window))))
    whole = past(cube, wettest, made.frames, lead_times)
    radar = whole.radar[..., y : y + rows, x : x + columns].contiguous()
    flow = motion_and_doubt(radar[0, -FRAMES:].numpy(), whole.age[0, -FRAMES:].tolist())
    seen = replace(whole, radar=radar, motion=torch.from_numpy(np.ascontiguousarray(flow))[None])
    return _with_other_sources(made, seen)


def _made_up(made: TrainedModel, like: Batch) -> Batch:
    """Rain of any strength on a third of the cells, a tenth of them not observed, that turns as it drifts."""
    random = torch.Generator().manual_seed(0)
    strength = torch.randn(like.radar.shape, generator=random).exp() * 2
    radar = strength * (torch.rand(strength.shape, generator=random) < 0.3)
    radar[torch.rand(radar.shape, generator=random) < 0.1] = torch.nan
    rows, columns = radar.shape[2:]
    down, right = torch.meshgrid(torch.linspace(-1, 1, rows), torch.linspace(-1, 1, columns), indexing="ij")
    turning = torch.stack([0.4 - 0.5 * down, 0.5 * right, 0.2 + 0.2 * down])[None]
    return _with_other_sources(made, replace(like, radar=radar, motion=turning))


def _without(batch: Batch, frame: int) -> Batch:
    """The batch with a radar frame that is not observed, if that leaves one."""
    radar = batch.radar.clone()
    if radar.shape[1] > 1:
        radar[:, frame] = torch.nan
    return replace(batch, radar=radar)


def _newest_alone(batch: Batch) -> Batch:
    """The batch with its newest radar frame only, which tells no motion."""
    radar = batch.radar.clone()
    radar[:, :-1] = torch.nan
    still = None if batch.motion is None else torch.zeros_like(batch.motion)
    return replace(batch, radar=radar, motion=still)


def _with_other_sources(made: TrainedModel, batch: Batch) -> Batch:
    """The batch with made-up fields of all that the network sees beside rain."""
    random = torch.Generator().manual_seed(1)
    rows, columns = batch.radar.shape[2:]

    def fields(scaling: Any, *before: int) -> Tensor:
        shape = (1, *before, len(scaling.centre), rows, columns)
        noise = torch.randn(shape, generator=random)
        return noise * scaling.spread[:, None, None] + scaling.centre[:, None, None]

    network = _network(made)
    sees = network.scaling
    more: dict[str, Tensor] = {}
    if sees.satellite is not None:
        images = max(sees.images)
        more["satellite"] = fields(sees.satellite, images)
        cadence = 15 + 5 * torch.arange(float(len(sees.images)))
        more["satellite_age"] = torch.arange(images - 1, -1, -1.0)[None, :, None] * cadence
    if sees.static is not None:
        more["static"] = fields(sees.static)
    if sees.place is not None:
        north, east = torch.meshgrid(
            torch.linspace(53, 51, rows), torch.linspace(4, 6, columns), indexing="ij"
        )
        more["place"] = torch.stack([east, north])[None]
    if network.surroundings is not None:
        factor, reach = network.surroundings.factor, float(made.card.get("reach", RADAR_ALONE.reach))
        sides = (means_around(side, factor, reach) for side in (rows, columns))
        more["surroundings"] = torch.randn(1, batch.radar.shape[1], *sides, generator=random).exp()
    return replace(batch, **more)


def _card(
    made: TrainedModel,
    graph: Graph,
    sample: Batch,
    written: Path,
    apart: Mapping[str, float],
    cube: Observations,
) -> dict[str, Any]:
    """What a program must know to run the graph, and what it was made from."""
    rows, columns = sample.radar.shape[2:]
    return {
        "inputs": [
            {
                "name": name,
                "dtype": str(x.dtype).removeprefix("torch."),
                "shape": list(x.shape),
                "is": MEANING[name],
            }
            for name, x in zip(graph.names, graph.inputs(sample), strict=True)
        ],
        "outputs": [
            {
                "name": "probability",
                "dtype": "float32",
                "shape": [1, len(graph.lead_times), len(made.network.bins), rows, columns],
                "is": "probability of each class of rain at each lead time; 1 in all over the classes",
            }
        ],
        "oldest": graph.oldest,  # minutes before the init time; no frame may be older
        "lead_times": graph.lead_times,  # minutes
        "bins": made.card["bins"],  # mm/h
        "largest_difference": dict(apart),  # of a probability
        "grid_of": cube.path,
        "network": {"sha256": made.sha256, "parameters": made.card["parameters"]},
        "sha256": hashlib.sha256(written.read_bytes()).hexdigest(),
        "opset": OPSET if written.suffix == ".onnx" else None,
        "software": f"metnet-nowcast {version()}, torch {torch.__version__}",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
