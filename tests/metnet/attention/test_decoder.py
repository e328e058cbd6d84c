"""The axial decoder: a proper distribution over maps, and a sampler that draws from it."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from metnet.attention.decoder import AxialDecoder, AxialSliceDecoder, ChannelEncoder, DecoderBlock, gumbel


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors as small as these are worked out faster by one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def shaken(module, seed=0):
    """The module with weights that matter, where its own start makes all logits equal."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double()
    for weight in module.parameters():
        weight.data.normal_(std=0.4, generator=generator)
    return module


def decoder(height=3, width=4, bins=3, dim=8, heads=2, outer=2, inner=1, **kwargs):
    return shaken(AxialDecoder(height, width, bins, dim, heads, outer, inner, **kwargs))


def series(height=2, width=3, bins=3, slices=3, cond_dim=None, **kwargs):
    encoder = ChannelEncoder(height, width, bins, slices, 8, 2, 2, cond_dim=cond_dim, **kwargs)
    return shaken(AxialSliceDecoder(encoder, AxialDecoder(height, width, bins, 8, 2, 2, 1, cond_dim=8)))


def maps(*shape, bins=3, seed=1):
    return torch.randint(bins, shape, generator=torch.Generator().manual_seed(seed))


def conditions(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def noise_for(*shape, seed=3):
    return gumbel(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(w, name, x):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def norm(w, name, x):
    standard = (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt()
    return standard * w[f"{name}.weight"] + w[f"{name}.bias"]


def block_by_hand(w, name, lines, masked, heads):
    """A block over one line: a list of vectors, each from those it may see."""
    normed = [norm(w, f"{name}.ln1", x) for x in lines]
    q, k, v = ([dense(w, f"{name}.{to}", x).view(heads, -1) for x in normed] for to in "qkv")
    out = []
    for t, x in enumerate(lines):
        seen = range(t + 1) if masked else range(len(lines))
        scores = torch.stack([(q[t] * k[s]).sum(-1) for s in seen]) / math.sqrt(q[t].shape[-1])
        weights = scores.exp() / scores.exp().sum(0)
        mixed = sum(weight[:, None] * v[s] for weight, s in zip(weights, seen, strict=True))
        x = x + dense(w, f"{name}.o", mixed.flatten())
        wide = dense(w, f"{name}.mlp_in", norm(w, f"{name}.ln2", x))
        out.append(x + dense(w, f"{name}.mlp_out", wide / (1 + (-1.702 * wide).exp())))
    return out


def logits_by_hand(module, bins, cond, heads):
    """The equations of the decoder for one map, pixel by pixel."""
    w = dict(module.state_dict())
    height, width = bins.shape
    nothing = torch.zeros_like(w["pos_h"][0])
    pixels = [[w["emb.weight"][b] for b in row] for row in bins]
    here = [
        [w["pos_h"][i] + w["pos_w"][j] + (0 if cond is None else dense(w, "cond_proj", cond[i, j]))
         for j in range(width)]
        for i in range(height)
    ]  # fmt: skip
    u = [[pixels[i][j] + here[i][j] for j in range(width)] for i in range(height)]
    for n in range(len(module.outer)):
        if n % 2 == 0:
            u = [block_by_hand(w, f"outer.{n}", row, False, heads) for row in u]
        else:
            columns = [block_by_hand(w, f"outer.{n}", list(c), True, heads) for c in zip(*u, strict=True)]
            u = [list(row) for row in zip(*columns, strict=True)]
    rows = []
    for i in range(height):
        above = u[i - 1] if i else [nothing] * width
        left = [nothing, *pixels[i][:-1]]
        row = [left[j] + above[j] + here[i][j] for j in range(width)]
        for n in range(len(module.inner)):
            row = block_by_hand(w, f"inner.{n}", row, True, heads)
        rows.append(torch.stack([dense(w, "final", norm(w, "final_ln", r)) for r in row]))
    return torch.stack(rows)


@pytest.mark.parametrize("cond_dim", [None, 5])
@pytest.mark.parametrize(("grid", "outer", "inner", "factor"), [((3, 4), 2, 1, 1), ((2, 3), 4, 2, 3)])
def test_logits_follow_from_the_equations(grid, outer, inner, factor, cond_dim):
    module = decoder(*grid, outer=outer, inner=inner, mlp_factor=factor, cond_dim=cond_dim)
    x = maps(2, *grid)
    cond = None if cond_dim is None else conditions(2, *grid, cond_dim)
    by_hand = [logits_by_hand(module, x[b], None if cond is None else cond[b], 2) for b in range(2)]
    assert torch.allclose(module.logits(x, cond), torch.stack(by_hand), atol=1e-10)


def changed(one, other):
    """Which pixels' logits differ, by more than the rounding of another summation."""
    return ((one - other).abs().amax(-1) > 1e-9).flatten(1)


@pytest.mark.parametrize("grid", [(3, 4), (1, 5), (5, 1), (4, 3)])
def test_each_pixel_reads_exactly_the_pixels_before_it(grid):
    module = decoder(*grid)
    x = maps(1, *grid)
    n = x.numel()
    others = x.flatten().repeat(n, 1)
    others[range(n), range(n)] = (others[range(n), range(n)] + 1) % 3
    found = changed(module.logits(others.view(n, *grid)), module.logits(x))
    assert torch.equal(found, torch.ones(n, n).triu(1).bool())


def test_each_pixel_reads_the_conditions_of_its_own_and_all_earlier_places():
    module = decoder(3, 4, cond_dim=2)
    x, cond = maps(1, 3, 4), conditions(1, 3, 4, 2)
    others = cond.flatten(1, 2).repeat(12, 1, 1)
    others[range(12), range(12)] += 1.0
    found = changed(module.logits(x.repeat(12, 1, 1), others.view(12, 3, 4, 2)), module.logits(x, cond))
    assert torch.equal(found, torch.ones(12, 12).triu().bool())


def every_map(*shape, bins):
    return torch.tensor(list(itertools.product(range(bins), repeat=math.prod(shape)))).view(-1, *shape)


@pytest.mark.parametrize(("grid", "bins"), [((2, 2), 3), ((1, 5), 2), ((5, 1), 2), ((1, 1), 7), ((2, 3), 1)])
@pytest.mark.parametrize("cond_dim", [None, 2])
def test_the_probabilities_of_all_maps_add_up_to_one(grid, bins, cond_dim):
    module = decoder(*grid, bins=bins, cond_dim=cond_dim)
    every = every_map(*grid, bins=bins)
    cond = None if cond_dim is None else conditions(1, *grid, cond_dim)
    probability = module.log_prob(every, cond).exp()
    assert probability.sum().item() == pytest.approx(1, abs=1e-10)
    assert bins == 1 or probability.std() > 0.01 * probability.mean()


def test_at_the_start_every_map_is_equally_likely():
    torch.manual_seed(0)
    module = AxialDecoder(4, 5, 6, dim=16, heads=2, num_outer_layers=2, num_inner_layers=2)
    assert torch.allclose(module.log_prob(maps(3, 4, 5, bins=6)), torch.tensor(-20 * math.log(6)), atol=1e-2)
    assert module.emb.weight.std().item() == pytest.approx(5 / 4, rel=0.25)
    assert module.outer[0].q.weight.std().item() == pytest.approx(1 / 4, rel=0.1)
    assert module.outer[0].q.weight.abs().max() < 0.6
    assert 0 < module.inner[0].o.weight.std() < 1e-5


def naively(module, noise, *cond):
    """All pixels worked out anew for each."""
    x = torch.zeros(noise.shape[:-1], dtype=torch.long)
    for at in itertools.product(*map(range, noise.shape[1:-1])):
        here = (slice(None), *at)
        x[here] = (module.logits(x, *cond) + noise)[here].argmax(-1)
    return x


@given(st.integers(0, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.booleans())
@settings(max_examples=15)
def test_the_sampler_draws_what_the_naive_one_draws(batch, height, width, bins, conditioned):
    module = decoder(height, width, bins, outer=4, inner=2, cond_dim=3 if conditioned else None)
    cond = [conditions(batch, height, width, 3)] if conditioned else []
    noise = noise_for(batch, height, width, bins)
    assert torch.equal(module.sample(noise, *cond), naively(module, noise, *cond))


def test_samples_come_as_often_as_they_are_likely():
    module = decoder(2, 2, 2)
    drawn = module.sample(noise_for(20000, 2, 2, 2))
    every = every_map(2, 2, bins=2)
    expected = module.log_prob(every).exp()
    found = (drawn[:, None] == every).all((2, 3)).double().mean(0)
    assert ((found - expected).abs() < 4.5 * (expected * (1 - expected) / 20000).sqrt()).all()
    assert expected.max() > 2 * expected.min()


def test_samples_depend_on_what_they_are_conditioned_on():
    module = decoder(4, 4, 5, cond_dim=2)
    noise = noise_for(50, 4, 4, 5)
    one, other = (module.sample(noise, scale * conditions(1, 4, 4, 2)) for scale in (0.0, 3.0))
    assert (one != other).any(0).double().mean() > 0.8


def test_members_of_an_ensemble_are_drawn_together_as_they_are_alone():
    module = decoder(4, 4, 5, cond_dim=2)
    cond, noise = conditions(1, 4, 4, 2), noise_for(6, 4, 4, 5)
    together = module.sample(noise, cond)
    assert torch.equal(together, torch.cat([module.sample(each[None], cond) for each in noise]))
    assert torch.equal(together, module.sample(noise, cond.expand(6, -1, -1, -1)))
    assert len(together.flatten(1).unique(dim=0)) == 6


def test_at_temperature_zero_the_likeliest_bin_is_drawn_whatever_the_noise():
    module = decoder(3, 4, 4)
    coldest = module.sample(noise_for(1, 3, 4, 4), temperature=0)
    assert torch.equal(coldest, module.sample(noise_for(1, 3, 4, 4, seed=9), temperature=0))
    assert torch.equal(coldest, module.logits(coldest).argmax(-1))


def test_temperature_divides_the_logits():
    module = decoder(3, 4, 4)
    noise = noise_for(2, 3, 4, 4)
    hot = module.sample(noise, temperature=2.5)
    assert torch.equal(hot, naively(module, 2.5 * noise))
    nn.init.normal_(module.final.weight)
    halved = shaken(AxialDecoder(3, 4, 4, 8, 2, 2, 1))
    halved.load_state_dict(module.state_dict())
    with torch.no_grad():
        halved.final.weight /= 2.5
        halved.final.bias /= 2.5
    assert torch.equal(halved.sample(noise), module.sample(noise, temperature=2.5))


def test_dropout_acts_in_training_but_never_on_samples():
    module = decoder(dropout=0.5).train()
    x, noise = maps(2, 3, 4), noise_for(2, 3, 4, 3)
    assert not torch.equal(module.logits(x), module.logits(x))
    drawn = module.sample(noise)
    assert torch.equal(drawn, module.eval().sample(noise))
    assert torch.equal(drawn, naively(module, noise))


def test_a_drawn_pixel_goes_through_every_layer_once():
    module = decoder(5, 7, 3, inner=2)
    pushed = {}

    def count(name):
        return lambda _, args: pushed.__setitem__(name, pushed.get(name, 0) + args[0].shape[:-1].numel())

    for name, part in module.named_modules():
        if isinstance(part, nn.Linear):
            part.register_forward_pre_hook(count(name))
    module.sample(noise_for(2, 5, 7, 3))
    inner = {name: count for name, count in pushed.items() if not name.startswith("outer")}
    outer = {name: count for name, count in pushed.items() if name.startswith("outer")}
    assert set(inner.values()) == {2 * 5 * 7}
    assert set(outer.values()) == {2 * 4 * 7}  # nothing lies below the last row


@pytest.mark.slow
def test_sampling_costs_a_twentieth_of_recomputing_and_members_share_every_step():
    torch.manual_seed(0)
    module = AxialDecoder(24, 24, 8, dim=16, heads=2, num_outer_layers=2, num_inner_layers=2)
    noise = gumbel(8, 24, 24, 8)
    with torch.no_grad(), FlopCounterMode(display=False) as whole_map:
        module.logits(maps(1, 24, 24, bins=8))
    with FlopCounterMode(display=False) as one:
        module.sample(noise[:1])
    with Calls() as steps_of_one:
        module.sample(noise[:1])
    with Calls() as steps_of_eight:
        module.sample(noise)

    assert 24 * 24 * whole_map.get_total_flops() > 20 * one.get_total_flops()
    assert steps_of_eight.count < steps_of_one.count + 10


class Calls(TorchDispatchMode):
    """Counts operators."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def test_gradients_reach_every_weight_and_agree_with_numeric_slopes():
    module = decoder(3, 2, 2, dim=4, cond_dim=2)
    x = maps(2, 3, 2, bins=2)
    cond = conditions(2, 3, 2, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda c: module.log_prob(x, c), (cond,))
    module.log_prob(x, cond.detach()).sum().backward()
    reached = {name: weight.grad.abs().max().item() for name, weight in module.named_parameters()}
    # a softmax only compares keys, so what is common to all of them cancels
    assert all(slope > 1e-6 for name, slope in reached.items() if not name.endswith(".k.bias"))


def test_what_always_falls_is_learned():
    torch.manual_seed(0)
    module = AxialDecoder(4, 4, 3, dim=16, heads=2, num_outer_layers=2, num_inner_layers=1)
    fallen = maps(4, 4, 4)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    for _ in range(60):
        loss = -module.log_prob(fallen).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < math.log(4) + 0.5  # four maps, equally often: no model can do better than log 4
    drawn = module.sample(gumbel(12, 4, 4, 3, generator=torch.Generator().manual_seed(0)))
    assert (drawn[:, None] == fallen).all((2, 3)).any(1).sum() >= 8


def test_keys_are_the_canonical_ones_and_go_through_a_safe_file():
    module = decoder(cond_dim=2)
    parts = ("ln1", "q", "k", "v", "o", "ln2", "mlp_in", "mlp_out")
    blocks = [f"{group}.{part}" for group in ("outer.0", "outer.1", "inner.0") for part in parts]
    layers = [*blocks, "final_ln", "final", "cond_proj"]
    named = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    assert set(module.state_dict()) == named | {"emb.weight", "pos_h", "pos_w"}

    twin = AxialDecoder(3, 4, 3, 8, 2, 2, 1, cond_dim=2).double()
    twin.load_state_dict(load(save(module.state_dict())), strict=True)
    x, cond = maps(1, 3, 4), conditions(1, 3, 4, 2)
    assert torch.equal(twin.logits(x, cond), module.logits(x, cond))


@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_is_finite_and_near(autocast):
    module = decoder().float()
    x = maps(2, 3, 4)
    full = module.log_prob(x)
    if not autocast:
        module = module.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        near = module.log_prob(x)
        drawn = module.sample(noise_for(2, 3, 4, 3).float())
    near.sum().backward()
    assert near.dtype == torch.float32
    assert (near - full).abs().max() < 0.05 * full.abs().max()
    assert drawn.min() >= 0
    assert drawn.max() < 3
    assert all(w.grad.isfinite().all() for w in module.parameters())


def test_gumbel_noise_has_its_distribution():
    drawn = noise_for(200_000)
    assert drawn.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert drawn.std().item() == pytest.approx(math.pi / math.sqrt(6), abs=0.01)
    assert torch.equal(drawn, noise_for(200_000))


def test_a_masked_block_sees_itself_and_what_is_before():
    block = shaken(DecoderBlock(4, 2, "column", masked=True))
    x = conditions(1, 5, 2, 4).requires_grad_()
    (seen,) = torch.autograd.grad(block(x)[0, 2, 0].sum(), x)
    assert seen[0].abs().sum(-1).bool().tolist() == [[True, False]] * 3 + [[False, False]] * 2


@pytest.mark.parametrize("cond_dim", [None, 2])
def test_the_probabilities_of_all_series_add_up_to_one(cond_dim):
    module = series(1, 2, bins=2, slices=3, cond_dim=cond_dim)
    cond = None if cond_dim is None else conditions(1, 1, 2, 2).expand(64, -1, -1, -1)
    probability = module.log_prob(every_map(3, 1, 2, bins=2), cond).exp()
    assert probability.sum().item() == pytest.approx(1, abs=1e-10)
    assert probability.std() > 0.01 * probability.mean()


def test_each_pixel_of_a_series_reads_exactly_those_before_it_and_all_earlier_slices():
    module = series(2, 3)
    x = maps(1, 3, 2, 3)
    others = x.flatten().repeat(18, 1)
    others[range(18), range(18)] = (others[range(18), range(18)] + 1) % 3
    found = changed(module.logits(others.view(18, 3, 2, 3)), module.logits(x))
    assert torch.equal(found, torch.ones(18, 18).triu(1).bool())


def test_a_series_is_drawn_slice_after_slice_as_the_naive_sampler_does():
    module = series(2, 3, cond_dim=2).train()
    cond, noise = conditions(2, 2, 3, 2), noise_for(2, 3, 2, 3, 3)
    assert torch.equal(module.sample(noise, cond), naively(module, noise, cond))


def test_dropout_of_the_encoder_never_acts_on_samples():
    module = series(2, 3, dropout=0.5).train()
    x, noise = maps(1, 3, 2, 3), noise_for(1, 3, 2, 3, 3)
    assert not torch.equal(module.log_prob(x), module.log_prob(x))
    assert torch.equal(module.sample(noise), module.eval().sample(noise))


def test_slices_drawn_at_random_add_up_to_the_series():
    module = series(2, 3)
    x = maps(2, 3, 2, 3)
    each = [module.slice_log_prob(x, torch.tensor([n, (n + 1) % 3])) for n in range(3)]
    assert torch.allclose(sum(each), module.log_prob(x), atol=1e-10)


def test_the_encoder_is_a_convolution_positions_and_unmasked_blocks():
    encoder = series(2, 3, cond_dim=2).encoder
    slices, cond = maps(1, 3, 2, 3), conditions(1, 2, 3, 2)
    planes = torch.zeros(1, 6, 2, 3, dtype=torch.float64)
    planes[0, 0] = slices[0, 0] / 2
    planes[0, 4] = 1
    told = F.conv2d(planes, encoder.conv.weight, encoder.conv.bias, padding=1).permute(0, 2, 3, 1)
    told = told + encoder.pos_h[:, None] + encoder.pos_w + encoder.cond_proj(cond)
    w = encoder.state_dict()
    rows = torch.stack([torch.stack(block_by_hand(w, "layers.0", list(row), False, 2)) for row in told[0]])
    columns = [block_by_hand(w, "layers.1", list(c), False, 2) for c in rows.unbind(1)]
    by_hand = torch.stack([torch.stack(c) for c in columns], dim=1)
    assert torch.allclose(encoder(slices, torch.tensor([1]), cond)[0], by_hand, atol=1e-10)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_outer_layers": 3}, "num_outer_layers=3: expected 2, 4"),
        ({"num_outer_layers": 0}, "num_outer_layers=0: expected at least 1"),
        ({"num_inner_layers": 0}, "num_inner_layers=0: expected at least 1"),
        ({"heads": 3}, "dim=8 must be a multiple of heads=3"),
        ({"num_bins": 0}, "num_bins=0"),
        ({"height": 0}, "height=0"),
    ],
)
def test_wrong_arguments_are_named(kwargs, message):
    right = {"height": 3, "width": 4, "num_bins": 3, "dim": 8, "heads": 2}
    with pytest.raises(ValueError, match=message):
        AxialDecoder(**{**right, "num_outer_layers": 2, "num_inner_layers": 1, **kwargs})


def test_wrong_inputs_are_told_what_was_expected():
    module, told = decoder(), decoder(cond_dim=2)
    x, noise = maps(2, 3, 4), noise_for(2, 3, 4, 3)
    with pytest.raises(ValueError, match=r"x has shape \(2, 1, 4\): expected \(batch, \(3, 4\)\)"):
        module.logits(x[:, :1])
    with pytest.raises(ValueError, match=r"x holds 0..3: expected 0..2 for num_bins=3"):
        module.log_prob(x.clamp(max=1) * 3)
    with pytest.raises(ValueError, match="cond is given"):
        module.logits(x, conditions(2, 3, 4, 2))
    with pytest.raises(ValueError, match="cond is missing"):
        told.logits(x)
    with pytest.raises(ValueError, match=r"cond has shape \(2, 3, 4, 3\): expected \(2, 3, 4, 2\)"):
        told.logits(x, conditions(2, 3, 4, 3))
    with pytest.raises(ValueError, match=r"noise has shape \(2, 3, 4, 2\): expected"):
        module.sample(noise[..., :2])
    with pytest.raises(ValueError, match="noise holds NaN"):
        module.sample(noise / 0 * 0)
    with pytest.raises(ValueError, match="temperature=-1"):
        module.sample(noise, temperature=-1)
    some = series(3, 4)
    frames = torch.zeros(2, some.encoder.num_slices, 3, 4, dtype=torch.int8)
    for index, message in (
        ([0], r"index has shape \(1,\): expected one for each of 2 series"),
        ([0, -1], r"index holds -1\.\.0: expected 0"),
        ([0, some.encoder.num_slices], r"index holds 0\.\..*: expected 0"),
    ):
        with pytest.raises(ValueError, match=message):
            some.slice_log_prob(frames, torch.tensor(index))
    assert some.slice_log_prob(frames, torch.tensor([0, 1])).isfinite().all()  # of bytes too
    with pytest.raises(ValueError, match="cond_dim=2: expected the encoder's dim=8"):
        AxialSliceDecoder(series(3, 4).encoder, told)
    with pytest.raises(ValueError, match="height=2 and 3: expected the same"):
        AxialSliceDecoder(series(2, 4).encoder, decoder(cond_dim=8))


@pytest.mark.compile
def test_logits_compile_into_one_graph_and_export():
    module = decoder(cond_dim=2)
    x, cond = maps(2, 3, 4), conditions(2, 3, 4, 2)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x, cond), module.logits(x, cond), atol=1e-10)
    exported = torch.export.export(module, (x, cond)).module()
    assert torch.allclose(exported(x, cond), module.logits(x, cond), atol=1e-10)
