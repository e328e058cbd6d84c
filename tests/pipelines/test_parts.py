"""A model robbed of one part is what the others say, and nothing else."""

import shutil

import pytest
import torch
from safetensors.torch import load

from benchmarks.parts import ALL, AS_IT_IS, SHUT, main, outcomes, rows, variants, without_network
from pipelines.beginning import LOCAL
from pipelines.past import past
from pipelines.plain import rain_cube
from pipelines.trained import PRIOR, TrainedModel, trained
from tests.pipelines.training import drifting, made_cube, trained_on


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run in which every part says something, and the cube it learned from."""
    folder = tmp_path_factory.mktemp("parts")
    cube = made_cube(folder / "cube", drifting(40))
    trained_on(cube, folder / "run", 6, prior_steps=30, local_steps=60)
    return folder / "run", cube


@pytest.fixture(scope="module")
def said(made):
    """What each variant says of one past."""
    run, cube = made
    there = rain_cube(cube)
    models = dict(variants(run))
    batch = past(there, there.times[20], 2, (5.0, 15.0))
    return {name: model(batch).probability[0] for name, model in models.items()} | {"batch": batch}


def spoken(network, batch):
    return TrainedModel(network.eval(), {}, "")(batch).probability[0]


def test_as_it_is_it_is_the_run_and_every_part_says_something(made, said):
    whole = trained(made[0]).uncalibrated()(said["batch"]).probability[0]
    assert torch.equal(said[AS_IT_IS], whole)
    for name, probability in said.items():
        if name not in ("batch", AS_IT_IS):
            assert (probability - whole).abs().max() > 1e-4, name


def test_without_its_network_it_is_the_prior_and_what_is_local_as_trained(made, said):
    parts = trained(made[0]).network.state_dict()
    start = dict(variants(made[0]))["its training: prior and what is local as fitted"].network
    start.load_state_dict(
        {**start.state_dict(), **{n: parts[n] for n in parts if n[:5] in ("prior", "local")}}
    )
    torch.testing.assert_close(said["its network"], spoken(start, said["batch"]))


def test_before_its_training_it_is_what_was_fitted(made):
    start = dict(variants(made[0]))["its training: prior and what is local as fitted"].network
    for part, file in ((start.prior, PRIOR), (start.local, LOCAL)):
        fitted = load((made[0] / file).read_bytes())
        assert all(torch.equal(value, fitted[name]) for name, value in part.state_dict().items())
    assert not start.head.classify.weight.any()


def test_the_chances_alone_have_learned_nothing(made, said):
    start = dict(variants(made[0]))["its training: prior and what is local as fitted"].network
    start.local.pool.copy_(torch.tensor([ALL, 0.0]))
    seen = ~said["batch"].radar.isnan().any(dim=1)[0]
    seen[:, :12] = False  # into which what is not observed may have been carried
    alone = said["all but the chances"][:, :, seen]
    torch.testing.assert_close(alone, spoken(start, said["batch"])[:, :, seen], atol=1e-4, rtol=0)


def test_without_what_is_local_a_pixel_has_a_share_of_the_prior_and_one_of_the_chances(made, said):
    model = dict(variants(made[0]))["what is local"]
    without_network(model.network)
    pooled = model(said["batch"]).probability[0]
    model.network.local.pool.copy_(torch.tensor([SHUT, 0.0]))
    prior = model(said["batch"]).probability[0]
    model.network.local.pool.copy_(torch.tensor([ALL, 0.0]))
    chances = model(said["batch"]).probability[0]
    assert (pooled >= torch.minimum(prior, chances) - 1e-5).all()
    assert (pooled <= torch.maximum(prior, chances) + 1e-5).all()
    assert ((prior - chances).abs() > 0.05).any()


def test_the_table_tells_each_part_by_cube(made, capsys, monkeypatch):
    run, cube = made
    whole = dict(variants(run))[AS_IT_IS]
    skill = outcomes(cube, {AS_IT_IS: whole, "nothing": whole}, 5, 32)
    assert list(rows([skill, skill], 10)) == [
        "| nothing | " + " | ".join(["1.000 (1.000-1.000) / 1.000 / 1.000 / 1.000"] * 2) + " |"
    ]
    other = run.with_name("other")
    shutil.copytree(run, other)
    monkeypatch.setattr(
        "sys.argv", ["parts", str(run), cube, "--others", str(other), "--only-others", "--inits", "2"]
    )
    main()
    assert capsys.readouterr().out.splitlines() == [
        "| without | cube |",
        "|---|---|",
        f"| {other} | 1.000 / 1.000 / 1.000 / 1.000 |",
    ]


def test_a_run_without_a_start_of_its_own_is_refused(made, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(made[0], run)
    (run / LOCAL).unlink()
    with pytest.raises(ValueError, match=r"no local\.safetensors there"):
        dict(variants(run))
