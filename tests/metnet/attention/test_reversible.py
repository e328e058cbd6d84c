"""A stack that recomputes gives what one that remembers gives, with flat memory."""

import copy
import os
import socket

import pytest
import torch
import torch.nn.functional as F
from axial_attention.reversible import ReversibleSequence as Published
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.profiler import ProfilerActivity, profile

from metnet.attention.reversible import ReversibleSequence


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors as small as these are worked out faster by one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def branch(dim=6, dropout=0.0):
    return nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1), nn.GELU(), nn.Dropout(dropout))


def pairs(depth, make=branch):
    torch.manual_seed(depth)
    return [(make(), make()) for _ in range(depth)]


def plainly(blocks, x):
    """The coupling as its equations say it, for autograd to remember."""
    x1 = x2 = x
    for f, g in blocks:
        x1 = x1 + f(x2)
        x2 = x2 + g(x1)
    return (x1 + x2) / 2


def gradients(call, x, weights, seed=0):
    torch.manual_seed(seed)
    for weight in weights:
        weight.grad = None
    x = x.detach().clone().requires_grad_()
    y = call(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(weight.grad for weight in weights)]


def assert_same(ours, theirs, tolerance=1e-12):
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).abs().max() <= tolerance * other.abs().max()


def image(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


@pytest.mark.parametrize("training", [True, False])
def test_outputs_and_gradients_are_those_of_the_plain_coupling(training):
    blocks = pairs(5)
    stack = ReversibleSequence(blocks).double().train(training)
    weights = list(stack.parameters())

    x = image(2, 6, 5, 4)
    assert_same(gradients(stack, x, weights), gradients(lambda x: plainly(blocks, x), x, weights))


def test_published_weights_load_strictly_and_give_the_published_results():
    published = Published([list(pair) for pair in pairs(3)]).double()
    ours = ReversibleSequence(pairs(3)).double()
    for weight in ours.parameters():
        nn.init.zeros_(weight)
    ours.load_state_dict(published.state_dict(), strict=True)

    x = image(2, 6, 5, 4)
    theirs = gradients(published, x, list(published.parameters()))
    assert_same(gradients(ours, x, list(ours.parameters())), theirs)


@given(st.integers(0, 3), st.integers(1, 5), st.integers(1, 5), st.integers(0, 3))
@settings(max_examples=25)
def test_any_grid_depth_and_batch_gives_the_plain_gradients(batch, y, x, depth):
    blocks = pairs(depth, lambda: nn.Sequential(nn.Linear(x, x), nn.Tanh()))
    stack = ReversibleSequence(blocks).double()
    there = image(y, batch, x, 3).permute(1, 3, 0, 2)
    weights = list(stack.parameters())
    ours, plain = gradients(stack, there, weights), gradients(lambda x: plainly(blocks, x), there, weights)
    assert len(ours) == 2 + 4 * depth
    assert ours[0].shape == there.shape
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


def test_numeric_slopes_agree():
    stack = ReversibleSequence(pairs(2, lambda: branch(2))).double()
    x = image(1, 2, 3, 2).requires_grad_()
    assert torch.autograd.gradcheck(stack, (x,))


def test_float32_gradients_through_a_smooth_deep_stack_stay_close():
    blocks = pairs(12)
    stack = ReversibleSequence(blocks)
    weights = list(stack.parameters())
    x = image(2, 6, 8, 8, dtype=torch.float32)
    assert_same(gradients(stack, x, weights), gradients(lambda x: plainly(blocks, x), x, weights), 1e-5)


def test_dropout_drops_the_same_again():
    blocks = pairs(4, lambda: branch(dropout=0.3))
    stack = ReversibleSequence(blocks).double()
    weights = list(stack.parameters())
    x = image(2, 6, 5, 4)
    ours = gradients(stack, x, weights, seed=3)
    assert_same(ours, gradients(lambda x: plainly(blocks, x), x, weights, seed=3))
    assert not torch.allclose(ours[0], gradients(stack, x, weights, seed=4)[0])


def test_two_forward_passes_before_one_backward_each_repeat_their_own_draws():
    blocks = pairs(3, lambda: branch(dropout=0.3))
    stack = ReversibleSequence(blocks).double()
    weights = list(stack.parameters())
    x = image(2, 6, 5, 4)
    twice = gradients(lambda x: stack(x) + 2 * stack(x.flip(0)), x, weights)
    assert_same(twice, gradients(lambda x: plainly(blocks, x) + 2 * plainly(blocks, x.flip(0)), x, weights))


def test_a_switch_to_evaluation_before_the_backward_pass_changes_nothing():
    stack = ReversibleSequence(pairs(3, lambda: branch(dropout=0.5))).double()
    weights = list(stack.parameters())
    x = image(2, 6, 5, 4)

    def then_evaluate(x):
        y = stack.train()(x)
        stack.eval()
        return y

    switched = gradients(then_evaluate, x, weights)
    assert not any(module.training for module in stack.modules())
    assert_same(gradients(stack.train(), x, weights), switched)


def test_the_callers_random_numbers_go_on_undisturbed():
    stack = ReversibleSequence(pairs(2, lambda: branch(dropout=0.5))).double()
    y = stack(image(1, 6, 4, 4).requires_grad_())
    torch.manual_seed(5)
    before = torch.get_rng_state()
    y.sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


class Probe(nn.Module):
    """Remembers in which precision it ran."""

    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(8, 8)
        self.ran = []

    def forward(self, x):
        y = torch.tanh(self.dense(x))
        self.ran.append(y.dtype)
        return y


def test_autocast_of_the_forward_pass_holds_in_the_backward_pass_outside_it():
    blocks = pairs(3, Probe)
    stack = ReversibleSequence(blocks)
    weights = list(stack.parameters())
    x = image(64, 8, dtype=torch.float32)

    def under_autocast(call):
        def run(x):
            with torch.autocast("cpu", torch.bfloat16):
                return call(x)

        return run

    ours = gradients(under_autocast(stack), x, weights)
    assert all(probe.ran == [torch.bfloat16] * 2 for pair in blocks for probe in pair)
    assert ours[0].dtype == torch.float32
    assert_same(ours, gradients(under_autocast(lambda x: plainly(blocks, x)), x, weights), 0.01)
    full = gradients(stack, x, weights)
    assert any((one - other).abs().max() > 1e-3 for one, other in zip(ours, full, strict=True))


def test_autocast_in_the_backward_pass_only_is_not_taken_over():
    blocks = pairs(2, Probe)
    y = ReversibleSequence(blocks)(image(4, 8, dtype=torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        y.sum().backward()
    assert all(probe.ran == [torch.float32] * 2 for pair in blocks for probe in pair)


def test_a_weight_used_in_and_after_the_stack_under_one_autocast_hears_from_both():
    f = Probe()
    stack = ReversibleSequence([(f, Probe())])
    x = image(64, 8, dtype=torch.float32)

    def both(x):
        with torch.autocast("cpu", torch.bfloat16):
            return f.dense(stack(x)).float()

    def after(x):
        with torch.autocast("cpu", torch.bfloat16):
            return f.dense(stack(x).detach()).float()

    def within(x):
        with torch.autocast("cpu", torch.bfloat16):
            return F.linear(stack(x), f.dense.weight.detach(), f.dense.bias.detach()).float()

    (whole,), (one,), (other,) = (gradients(call, x, [f.dense.weight])[2:] for call in (both, after, within))
    assert min(one.abs().max(), other.abs().max()) > 0.1
    assert_same([whole], [one + other], 0.02)


def test_weights_learn_where_the_input_needs_no_gradient():
    stack = ReversibleSequence(pairs(3)).double()
    weights = list(stack.parameters())
    x = image(2, 6, 5, 4)
    expected = gradients(stack, x, weights)[2:]
    for weight in weights:
        weight.grad = None
    stack(x).square().sum().backward()
    assert_same([weight.grad for weight in weights], expected)


def test_gradients_can_be_asked_for_and_are_then_not_accumulated():
    stack = ReversibleSequence(pairs(3)).double()
    weights = list(stack.parameters())
    x = image(2, 6, 5, 4)
    expected = gradients(stack, x, weights)[2:]
    for weight in weights:
        weight.grad = None
    found = torch.autograd.grad(stack(x).square().sum(), weights)
    assert_same(found, expected)
    assert all(weight.grad is None for weight in weights)


def test_frozen_weights_get_no_gradient_and_the_rest_theirs():
    blocks = pairs(2)
    stack = ReversibleSequence(blocks).double()
    x = image(2, 6, 5, 4)
    free = list(blocks[0][0].parameters())
    expected = gradients(stack, x, free)
    for weight in stack.parameters():
        weight.requires_grad_(any(weight is other for other in free))
        weight.grad = None
    assert_same(gradients(stack, x, free), expected)
    assert all(weight.grad is None for weight in blocks[1][1].parameters())


def test_one_module_in_every_block_gathers_all_its_gradients():
    shared = branch()
    blocks = [(shared, shared), (shared, branch())]
    stack = ReversibleSequence(blocks).double()
    weights = list(stack.parameters())
    x = image(2, 6, 5, 4)
    assert_same(gradients(stack, x, weights), gradients(lambda x: plainly(blocks, x), x, weights))


class Told(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(4, 4)

    def forward(self, x, told=None):
        return torch.tanh(self.dense(x) if told is None else self.dense(x) * told["scale"])


@pytest.mark.parametrize("route", [(True, True), (True, False), (False, True)])
def test_arguments_go_where_they_are_routed_and_get_their_gradients(route):
    blocks = pairs(3, Told)
    stack = ReversibleSequence(blocks).double()
    raw = image(1, 4).requires_grad_()
    x = image(5, 4)

    def by_hand(told):
        x1 = x2 = x
        for f, g in blocks:
            x1 = x1 + (f(x2, told) if route[0] else f(x2))
            x2 = x2 + (g(x1, told) if route[1] else g(x1))
        return (x1 + x2) / 2

    told = {"scale": raw.exp()}
    ours = stack(x, arg_route=route, told=told)
    plain = by_hand({"scale": raw.exp()})
    assert_same([ours.detach()], [plain.detach()])
    ours, plain = (torch.autograd.grad(y.square().sum(), raw) for y in (ours, plain))
    assert_same(ours, plain)


def test_running_statistics_move_once_a_step():
    norm = nn.BatchNorm2d(6, momentum=0.5)
    stack = ReversibleSequence([(norm, branch())]).double()
    x = image(4, 6, 5, 4)
    stack(x).sum().backward()
    assert torch.allclose(norm.running_mean, 0.5 * x.mean((0, 2, 3)))
    assert norm.num_batches_tracked == 1


def saved_bytes(depth, remember):
    stack = ReversibleSequence(pairs(depth), remember)
    weights = {weight.data_ptr() for weight in stack.parameters()}
    kept = {}

    def pack(tensor):
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = image(2, 6, 16, 16, dtype=torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = stack(x)
    y.sum().backward()
    return sum(kept.values()) / (x.numel() * x.element_size())


def test_what_is_kept_for_the_backward_pass_is_two_maps_at_any_depth():
    assert saved_bytes(2, remember=False) == saved_bytes(20, remember=False) == 2
    assert saved_bytes(20, remember=True) > 40


def peak_bytes(depth, remember):
    stack = ReversibleSequence(pairs(depth), remember)
    x = image(1, 6, 64, 64, dtype=torch.float32)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        stack(x).sum().backward()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def test_peak_memory_grows_with_depth_only_by_weights():
    weights = 18 * 2 * sum(4 * weight.numel() for weight in branch().parameters())
    assert peak_bytes(20, remember=False) - peak_bytes(2, remember=False) <= 1.5 * weights
    assert peak_bytes(20, remember=True) - peak_bytes(2, remember=True) > 20 * weights


def test_second_derivatives_are_refused_rather_than_cut_off():
    stack = ReversibleSequence(pairs(2)).double()
    x = image(1, 6, 4, 4).requires_grad_()
    with pytest.raises(RuntimeError, match="remember=True"):
        torch.autograd.grad(stack(x).sum(), x, create_graph=True)


def test_a_stack_that_remembers_is_the_same_function_with_second_derivatives():
    stack = ReversibleSequence(pairs(2, lambda: nn.Sequential(nn.Linear(2, 2), nn.Tanh()))).double()
    x = image(2, 2).requires_grad_()
    y = stack(x)
    stack.remember = True
    assert torch.equal(stack(x), y)
    assert torch.autograd.gradgradcheck(stack, (x,))


def test_a_second_backward_pass_needs_a_retained_graph_and_adds_the_same_again():
    stack = ReversibleSequence(pairs(2)).double()
    weight = next(stack.parameters())
    y = stack(image(1, 6, 4, 4)).sum()
    y.backward(retain_graph=True)
    once = weight.grad.clone()
    y.backward()
    assert torch.allclose(weight.grad, 2 * once)
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()


def test_weights_changed_before_the_backward_pass_are_noticed():
    stack = ReversibleSequence(pairs(2)).double()
    y = stack(image(1, 6, 4, 4)).sum()
    with torch.no_grad():
        next(stack.parameters()).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_what_is_kept_may_be_moved_elsewhere():
    stack = ReversibleSequence(pairs(3)).double()
    weights = list(stack.parameters())
    x = image(1, 6, 4, 4)

    def offloaded(x):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy(force=True), torch.from_numpy):
            return stack(x)

    assert_same(gradients(offloaded, x, weights), gradients(stack, x, weights))


def test_without_gradients_the_sums_are_the_same():
    stack = ReversibleSequence(pairs(3)).double()
    x = image(2, 6, 5, 4)
    expected = stack(x)
    with torch.no_grad():
        assert torch.equal(stack(x), expected)
    with torch.inference_mode():
        assert torch.equal(stack(x), expected)
    assert expected.requires_grad


def test_function_transforms_see_every_step():
    stack = ReversibleSequence(pairs(2)).double()
    x = image(2, 6, 5, 4)
    weights = dict(stack.named_parameters())
    expected = torch.autograd.grad(stack(x).square().sum(), list(weights.values()))
    found = torch.func.grad(lambda w: torch.func.functional_call(stack, w, (x,)).square().sum())(
        {name: weight.detach() for name, weight in weights.items()}
    )
    assert_same(list(found.values()), expected)


def test_weights_lent_for_one_call_are_those_of_its_backward_pass():
    stack = ReversibleSequence(pairs(2)).double()
    lent = {n: (w.detach() + 0.1).requires_grad_() for n, w in stack.named_parameters()}
    other = ReversibleSequence(pairs(2)).double()
    other.load_state_dict({name: weight.detach() for name, weight in lent.items()})
    x = image(2, 6, 5, 4)
    y = torch.func.functional_call(stack, lent, (x,))
    found = torch.autograd.grad(y.square().sum(), list(lent.values()))
    assert_same(found, gradients(other, x, list(other.parameters()))[2:])


def test_a_copy_of_a_used_stack_is_a_stack_of_its_own():
    stack = ReversibleSequence(pairs(2)).double()
    x = image(2, 6, 5, 4)
    stack(x)
    twin = copy.deepcopy(stack)
    gradients(twin, x, list(twin.parameters()))
    assert all(weight.grad is None for weight in stack.parameters())


def test_a_stream_keeps_its_precision():
    stack = ReversibleSequence(pairs(2)).bfloat16()
    y = stack(image(2, 6, 5, 4).bfloat16().requires_grad_())
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert all(weight.grad.isfinite().all() and weight.grad.any() for weight in stack.parameters())


def test_shapes_alone_can_go_through_and_back():
    stack = ReversibleSequence(pairs(2)).to("meta")
    y = stack(torch.empty(2, 6, 5, 4, device="meta"))
    y.sum().backward()
    assert y.shape == (2, 6, 5, 4)
    assert all(weight.grad.shape == weight.shape for weight in stack.parameters())


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"blocks\[1\] has 1 modules: expected a pair"):
        ReversibleSequence([(branch(), branch()), (branch(),)])
    narrower = ReversibleSequence([(nn.Conv2d(6, 1, 1), branch())])
    with pytest.raises(ValueError, match=r"shape \(2, 1, 5, 4\) for a stream of shape \(2, 6, 5, 4\)"):
        narrower(image(2, 6, 5, 4, dtype=torch.float32))
    with pytest.raises(ValueError, match="arg_route has 1 values: expected 2"):
        narrower(image(2, 6, 5, 4, dtype=torch.float32), arg_route=(True,))


def _train_in_parallel(rank, port, results):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    stack = nn.parallel.DistributedDataParallel(ReversibleSequence(pairs(3)).double())
    for _ in range(2):
        stack.zero_grad()
        stack(image(2, 6, 5, 4)[rank : rank + 1]).square().sum().backward()
    if rank == 0:
        torch.save([weight.grad for weight in stack.parameters()], results)
    torch.distributed.barrier()  # who leaves while the other still talks aborts, at times
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_average_their_gradients(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_train_in_parallel, (port, tmp_path / "gradients.pt"), nprocs=2)
    stack = ReversibleSequence(pairs(3)).double()
    whole = gradients(stack, image(2, 6, 5, 4), list(stack.parameters()))[2:]
    assert_same(torch.load(tmp_path / "gradients.pt"), [gradient / 2 for gradient in whole])


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler looks at it itself
def test_compiled_around_it_the_gradients_are_the_same():
    stack = ReversibleSequence(pairs(2)).double()
    weights = list(stack.parameters())
    x = image(2, 6, 5, 4)
    compiled = torch.compile(lambda x: 2 * stack(x.sin()), backend="eager")
    assert_same(gradients(compiled, x, weights), gradients(lambda x: 2 * stack(x.sin()), x, weights))


@pytest.mark.compile
def test_remembering_it_is_one_graph():
    stack = ReversibleSequence(pairs(2), remember=True).double()
    weights = list(stack.parameters())
    x = image(2, 6, 5, 4)
    compiled = torch.compile(stack, backend="aot_eager", fullgraph=True)
    assert_same(gradients(compiled, x, weights), gradients(stack, x, weights))


@pytest.mark.compile
def test_an_exported_stack_is_the_plain_coupling():
    stack = ReversibleSequence(pairs(2)).double()
    x = image(2, 6, 5, 4)
    exported = torch.export.export(stack, (x,)).module()
    assert torch.allclose(exported(x), stack(x), atol=1e-12)
