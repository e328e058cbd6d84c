"""A graph says what its network says, to whoever opens it with nothing else at hand."""

import hashlib
import importlib.util
import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from metnet import prior
from metnet.attention.axial import AxialAttention
from metnet.axial_head import AxialHead, Coherent
from metnet.calibration import Calibration
from metnet.forward import FORWARD
from metnet.lead_time import LeadTimePlanes
from metnet.model import MetNet, Moving
from metnet.rain import RainBins
from pipelines import export_model
from pipelines.beside import Beside, Sides
from pipelines.cf import RAINFALL_RATE
from pipelines.construct import construct
from pipelines.cube import Cube
from pipelines.export_model import Graph, export, write_graph
from pipelines.frame import Frame
from pipelines.grid import Grid
from pipelines.plain import rain_cube
from pipelines.trained import TrainedModel, trained
from tests.pipelines.training import PUBLISHED

START, FIVE = datetime(2024, 6, 1, tzinfo=UTC), timedelta(minutes=5)
ROWS, COLUMNS, FRAMES = 22, 17, 3
needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in export_model.NEEDED),
    reason=f"needs {', '.join(export_model.NEEDED)}",
)


def small(**arguments):
    """A network every weight of which says something."""
    torch.manual_seed(0)
    attention = partial(AxialAttention, heads=2, dim_index=1)
    arguments = {"channels": 8, "fine_channels": 4, "depth": 1, "grid": [4, 4], **arguments}
    network = MetNet(FRAMES, attention=attention, **arguments)
    for name, weight in network.named_parameters():
        if "tell" in name or "classify" in name or "local.last" in name:
            torch.nn.init.normal_(weight, std=0.2)
    return network.eval()


def made(network, cube):
    card = {
        "cadence_minutes": [5.0],
        "lead_times": [5.0, 15.0],
        "cubes": [{"path": str(cube)}],
        "parameters": sum(weight.numel() for weight in network.parameters()),
        "bins": {"edges": network.bins.edges, "top": network.bins.top},
    }
    return TrainedModel(network, card, "ab" * 32)


@pytest.fixture(scope="module")
def cube(tmp_path_factory):
    """Showers that drift over a grid with a blind corner; the heaviest in the fifth frame."""
    path = tmp_path_factory.mktemp("cube") / "cube"
    grid = Grid("EPSG:3035", 4e6, 1000.0, COLUMNS, 3e6, -1000.0, ROWS)
    frames = []
    for step in range(6):
        rain = np.zeros((ROWS, COLUMNS), np.float32)
        rain[6:14, 2 + step : 8 + step] = 7.7 if step == 4 else 3.3  # no edge of a class
        rain[:4, :4] = np.nan
        frames.append(
            Frame(RAINFALL_RATE, START + step * FIVE, FIVE, grid, rain, "showers", f"{step + 1:02x}" * 32)
        )
    Cube.open_or_create(str(path), grid, RAINFALL_RATE, START, FIVE).write(frames)
    return path


def written(model, cube, to, size=None, lead_times=(5.0, 15.0)):
    return write_graph(model, to, rain_cube(str(cube)), size, lead_times)


def as_a_stranger(to, batch_of):
    """The probabilities of a .pt2 file, by its card alone."""
    card = json.loads(Path(f"{to}.json").read_text())
    program = torch.export.load(to).module()
    inputs = [batch_of[entry["name"]] for entry in card["inputs"]]
    for tensor, entry in zip(inputs, card["inputs"], strict=True):
        assert (list(tensor.shape), str(tensor.dtype)) == (entry["shape"], f"torch.{entry['dtype']}")
    return program(*inputs)


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*treespec.*:FutureWarning")
def test_a_program_says_what_the_network_says_of_any_rain_ages_and_gaps(cube, tmp_path):
    model, to = made(small(), cube), tmp_path / "model.pt2"
    told = str(written(model, cube, to, size=[10, 13], lead_times=(7.0,)))
    assert "10 x 13 cells, 7 to 7 min" in told
    card = json.loads(Path(f"{to}.json").read_text())
    assert set(card["largest_difference"]) == {
        "made up",
        "made up, a frame missing",
        "made up, a single frame",
        "real",
    }
    assert card["sha256"] == hashlib.sha256(to.read_bytes()).hexdigest()
    assert card["lead_times"] == [7.0]
    assert [entry["shape"] for entry in card["outputs"]] == [[1, 1, 20, 10, 13]]
    random = torch.Generator().manual_seed(9)
    batch = export_model._real(rain_cube(str(cube)), model, (6, 2, 10, 13), card["lead_times"])
    assert batch.radar.nan_to_num().max() > 7, "the wettest frame"
    for gone, ages in (([], (10.0, 5.0, 0.0)), ([2], (10.0, 5.0, 0.0)), ([1, 2], (40.0, 35.0, 30.0))):
        radar = torch.rand(batch.radar.shape, generator=random) * 9
        radar[:, gone] = torch.nan
        moving = batch.motion + 0.3 if len(gone) < 2 else torch.zeros_like(batch.motion)
        other = replace(batch, radar=radar, age=torch.tensor([ages]), motion=moving)
        fields = {name: getattr(other, name) for name in ("radar", "age", "motion", "cell_size")}
        torch.testing.assert_close(as_a_stranger(to, fields), model(other).probability, atol=1e-5, rtol=0)


EVERYTHING = {
    "satellite": [[250.0, 25.0]],
    "satellite_frames": 2,
    "static": [[300.0, 500.0]],
    "position": True,
    "surroundings": 2,
}


@pytest.mark.compile
def test_a_network_without_what_is_local_becomes_a_program_in_every_run(cube, monkeypatch):
    """The way of the rain, the mended motion and the lead times in parts, in half a minute."""
    model = made(small(local=0), cube)
    monkeypatch.setattr("metnet.model.PIXELS_AT_ONCE", 1)
    leads = (5.0, 15.0)
    batch = export_model._real(rain_cube(str(cube)), model, (0, 0, ROWS, COLUMNS), leads)
    graph = Graph(model, leads, 10.0)
    with torch.no_grad():
        said = torch.export.export(graph, graph.inputs(batch)).module()(*graph.inputs(batch))
    torch.testing.assert_close(said, model(batch).probability.detach(), atol=1e-5, rtol=0)


def test_the_surroundings_of_a_graph_are_as_wide_as_those_that_were_learned_from(cube):
    model = made(small(surroundings=2), cube)
    model = replace(model, card={**model.card, "reach": 4.0})
    shown = export_model._real(rain_cube(str(cube)), model, (0, 0, ROWS, COLUMNS), (5.0, 15.0)).surroundings
    beside = Beside.of(model.network, reach=4.0)
    opened = rain_cube(str(cube))
    learned = Sides(opened, beside)._surroundings(opened.times[-1], FRAMES, (0, 0, ROWS, COLUMNS))
    assert shown.shape[1:] == learned.shape


SEVERAL = {"satellite": ["rain", [250.0, 25.0]], "satellite_frames": [3, 2], "advection": False}


@pytest.mark.parametrize(
    "arguments", [{"advection": False}, EVERYTHING, SEVERAL], ids=["plain", "everything", "several cadences"]
)
def test_a_graph_takes_what_its_network_sees_and_no_more(cube, arguments):
    model = made(small(**arguments), cube)
    batch = export_model._real(rain_cube(str(cube)), model, (0, 0, ROWS, COLUMNS), (5.0, 15.0))
    graph = Graph(model, (5.0, 15.0), 40.0)
    seen = {"satellite", "satellite_age", "static", "place", "init_time", "surroundings"}
    assert seen.isdisjoint(graph.names) == ("satellite" not in arguments)
    assert ("motion" in graph.names) == arguments.get("advection", True)
    with torch.no_grad():
        said = graph(*graph.inputs(batch))
    torch.testing.assert_close(said, model(batch).probability, atol=1e-6, rtol=0)


def test_a_graph_says_calibrated_probabilities_where_its_model_does(cube):
    as_it_is = made(small(), cube)
    edges = len(as_it_is.network.bins.edges)
    calibration = Calibration((-2.0,) * edges, ((0.5, -0.3),) * edges, ((0.1, 0.1),) * edges, (5.0, 15.0))
    model = replace(as_it_is, calibration=calibration)
    batch = export_model._real(rain_cube(str(cube)), model, (0, 0, ROWS, COLUMNS), (5.0, 15.0))
    graph = Graph(model, (5.0, 15.0), 40.0)
    with torch.no_grad():
        said = graph(*graph.inputs(batch))
    torch.testing.assert_close(said, model(batch).probability, atol=1e-6, rtol=0)
    assert (said - as_it_is(batch).probability).abs().max() > 0.01


def test_lead_times_are_cut_as_the_network_cuts_them(cube, monkeypatch):
    model = made(small(), cube)
    monkeypatch.setattr("metnet.model.PIXELS_AT_ONCE", 1)
    leads = (5.0, 15.0, 40.0)
    batch = export_model._real(rain_cube(str(cube)), model, (0, 0, ROWS, COLUMNS), leads)
    graph = Graph(model, leads, 10.0)
    with torch.no_grad():
        said = graph(*graph.inputs(batch))
    torch.testing.assert_close(said, model(batch).probability, atol=1e-6, rtol=0)


@pytest.mark.parametrize("missing", [(), (0,), (0, 1)])
def test_a_graph_carries_rain_as_the_network_does_however_late_and_far(missing):
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(32.0), indexing="ij")
    motion = torch.stack([0.01 * (y - 12), -0.01 * (x - 16)])[None]  # it turns about the middle
    frames, age = torch.rand(1, 4, 24, 32), torch.tensor([[4.0, 9.0, 14.0, 19.0]])
    frames[:, list(missing)] = torch.nan
    kept = [n for n in range(4) if n not in missing]
    order = [*kept, *missing][:3]
    shown = frames[:, order], age[:, order]
    moving = Moving(*shown, motion, torch.zeros(1, 24, 32), torch.tensor([1000.0]), RainBins.preferred())
    times = [10.0, 30.0, 50.0, 55.0, 70.0, 90.0, 180.0]
    unrolled = export_model.Unrolled(moving, oldest=24.0)
    for one, other in zip(unrolled.changes[2:], moving.changes[2:], strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)
    told = unrolled.carried(times)
    assert (~told[0, 0, 5].isnan()).any()
    torch.testing.assert_close(told, moving.carried(torch.tensor(times)), atol=1e-4, rtol=0, equal_nan=True)


@needs_onnx
@pytest.mark.compile
@pytest.mark.filterwarnings("ignore")
def test_an_onnx_model_of_a_network_that_sees_the_sun_says_what_the_network_says(cube, tmp_path):
    model, to = made(small(position=True, advection=False), cube), tmp_path / "model.onnx"
    written(model, cube, to, size=[8, 8], lead_times=(5.0,))  # which compares the two
    card = json.loads(Path(f"{to}.json").read_text())
    assert {"place", "init_time"} < {entry["name"] for entry in card["inputs"]}
    assert max(card["largest_difference"].values()) < 1e-5


@needs_onnx
@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_an_onnx_model_says_what_the_network_says(cube, tmp_path):
    import onnxruntime

    model, to = made(small(), cube), tmp_path / "model.onnx"
    written(model, cube, to, size=[8, 8], lead_times=(5.0,))
    card = json.loads(Path(f"{to}.json").read_text())
    assert max(card["largest_difference"].values()) < 1e-5
    session = onnxruntime.InferenceSession(to)
    assert [entry.name for entry in session.get_inputs()] == [entry["name"] for entry in card["inputs"]]
    assert [entry.shape for entry in session.get_outputs()] == [card["outputs"][0]["shape"]]


@needs_onnx
@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_onnx_takes_a_rate_that_rounding_put_below_an_edge_for_that_edge(tmp_path):
    """As the network does; the optimizer of ONNX leaves out a factor that is nearly 1."""

    class Classes(torch.nn.Module):
        def forward(self, rate):
            return prior._classes(RainBins.preferred(), rate)[0]

    import onnxruntime

    edges = np.array(RainBins.preferred().edges, np.float32)
    rate = torch.from_numpy(np.nextafter(edges, np.float32(0)))[None, None, None]
    program = torch.onnx.export(Classes(), (rate,), dynamo=True, opset_version=export_model.OPSET)
    program.save(tmp_path / "classes.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "classes.onnx")
    [said] = session.run(None, {session.get_inputs()[0].name: rate.numpy()})
    assert said.argmax(axis=1).ravel().tolist() == [*range(1, 20)]
    assert Classes()(rate).argmax(dim=1).flatten().tolist() == [*range(1, 20)]


def test_a_graph_that_says_something_else_leaves_nothing_behind(cube, tmp_path, monkeypatch):
    monkeypatch.setattr(export_model, "_write_pt2", lambda graph, inputs, to: to.write_bytes(b"x"))
    monkeypatch.setattr(
        export_model, "_opened", lambda path, names: lambda inputs: torch.zeros(1, 2, 20, ROWS, COLUMNS)
    )
    with pytest.raises(ValueError, match=r"on made up rain .* differs from the network by 0\.\d+, expected"):
        written(made(small(), cube), cube, tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []


def test_it_says_what_no_graph_can_be_written_for(cube, tmp_path):
    model, to = made(small(), cube), tmp_path / "model.pt2"
    with pytest.raises(ValueError, match=r"size=\[8, 18\]: .* within the 22 x 17"):
        written(model, cube, to, size=[8, 18])
    for leads in ((), (0.0,), (10.0, 5.0)):
        with pytest.raises(ValueError, match="minutes that rise from above 0"):
            written(model, cube, to, lead_times=leads)
    planes = made(small(lead_time=LeadTimePlanes(5.0, 3)), cube)
    with pytest.raises(ValueError, match="lead_time=input"):
        written(planes, cube, to)
    slow = TrainedModel(model.network, {**model.card, "cadence_minutes": [10.0]}, "")
    with pytest.raises(ValueError, match="a frame every 5 min, the model learned from 10 min"):
        written(slow, cube, to)


def test_a_cube_without_frames_is_refused(cube, tmp_path):
    like, empty = rain_cube(str(cube)), str(tmp_path / "empty")
    Cube.open_or_create(empty, like.grid, RAINFALL_RATE, like.times[0], like.cadence)
    with pytest.raises(ValueError, match="empty: holds no frame to try the graph on"):
        written(made(small(), cube), empty, tmp_path / "model.pt2")


def test_lead_times_that_a_network_never_learned_are_told(cube, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(export_model, "Graph", None)  # it is told before the long work
    for leads, told in (
        ((5.0, 15.0), []),
        ((5.0, 20.0), ["lead times beyond 15 min: the model never saw any"]),
    ):
        with pytest.raises(TypeError):
            written(made(small(), cube), cube, tmp_path / "model.pt2", lead_times=leads)
        assert caplog.messages == told


def test_of_a_published_network_no_graph_is_written_and_that_is_said(cube, tmp_path):
    network = construct({**PUBLISHED["metnet1"], "_partial_": False}, ("metnet.",))
    with pytest.raises(ValueError, match="the network is a MetNet1: no graph is written of those published"):
        written(made(network, cube), cube, tmp_path / "model.pt2")


def test_of_a_network_with_a_head_no_graph_is_written_and_that_is_said(cube, tmp_path):
    network = small()
    head = AxialHead(network.bins, (8, 8), leads=2, dim=8, heads=2)
    with pytest.raises(
        ValueError, match="the network is a Coherent: no graph is written of those with a head"
    ):
        written(made(Coherent(network, head), cube), cube, tmp_path / "model.pt2")


def run_folder(cube, folder):
    """As `metnet train` leaves it."""
    arguments = {"frames": FRAMES, "channels": 8, "fine_channels": 4, "depth": 1}
    weights = save({name: x.contiguous() for name, x in MetNet(**arguments).state_dict().items()})
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(weights)
    told = {"sha256": hashlib.sha256(weights).hexdigest(), "forward": FORWARD}
    card = dict(made(small(), cube).card) | told
    (folder / "model.json").write_text(
        json.dumps(card | {"config": {"model": {"_target_": "metnet.model.MetNet"} | arguments}})
    )
    return folder


def test_the_command_tells_a_network_from_data(cube, tmp_path, monkeypatch):
    run = run_folder(cube, tmp_path / "run")
    calls = []
    monkeypatch.setattr(export_model, "write_graph", lambda *arguments: calls.append(arguments))
    export(str(run), str(tmp_path / "model.pt2"), size=[8, 8])
    [(model, to, opened, size, leads)] = calls
    assert model.sha256 == trained(run).sha256
    assert (to, opened.path, size, leads) == (tmp_path / "model.pt2", str(cube), [8, 8], (5.0, 15.0))
    assert "6 frames of rainfall_rate" in str(export(str(cube), str(tmp_path / "radar.nc")))
    for path, place, there in ((cube, "model.pt2", "is not"), (run, "model.nc", "is")):
        with pytest.raises(ValueError, match=rf"which {there} there, and becomes .*\.pt2 or .*\.onnx"):
            export(str(path), str(tmp_path / place))
    cube.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"learned from is not here \(.*no such folder.*\); give cube=CUBE"):
        export(str(run), str(tmp_path / "model.pt2"))
    (tmp_path / "elsewhere").rename(cube)
    with pytest.raises(ValueError, match="something is there already"):
        (tmp_path / "model.onnx").touch()
        export(str(run), str(tmp_path / "model.onnx"))


def test_what_is_said_of_the_other_kind_of_export_is_refused_and_not_silently_left_out(cube, tmp_path):
    run = run_folder(cube, tmp_path / "run")
    for key, value in (("group", "static"), ("run", "newest"), ("start", "2024"), ("license", "CC0-1.0")):
        with pytest.raises(ValueError, match=f"^{key}={value}: expected of a cube or forecasts only, which"):
            export(str(run), str(tmp_path / "model.pt2"), **{key: value})
    for key, value in (("cube", str(cube)), ("size", [8, 8]), ("lead_times", [5.0])):
        with pytest.raises(ValueError, match=f"^{key}=.*: expected of a network only, which .* is not"):
            export(str(cube), str(tmp_path / "radar.nc"), **{key: value})
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_it_names_the_packages_that_onnx_needs(cube, tmp_path, monkeypatch):
    run = run_folder(cube, tmp_path / "run")
    monkeypatch.setattr(export_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install onnx onnxscript onnxruntime"):
        export(str(run), str(tmp_path / "model.onnx"))
