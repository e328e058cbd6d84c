"""What every attention block must hold, whatever it computes: `check_block(make)`."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


def awake(block: nn.Module) -> nn.Module:
    """`block` with no weight at 0 or 1, where a path could be off or a fault could hide."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for weight in block.parameters():
            weight.add_(0.2 * torch.randn(weight.shape, generator=generator).to(weight))
    return block


def check_block(
    make: Callable[[], nn.Module],
    shape: Sequence[int] = (2, 16, 6, 5),
    out_shape: Sequence[int] | None = None,
    silent: Sequence[str] = (),
) -> None:
    """Fails unless the block that `make` builds behaves.

    Args:
        make: builds the block, in float32.
        shape: of an input, batch first.
        out_shape: of its output; by default the same.
        silent: ends of the names of weights whose gradient is 0 by the block's own equations.
    """
    torch.manual_seed(5)
    block, x = awake(make()), torch.randn(*shape)
    _check_shape_and_gradients(block, x, tuple(out_shape or shape), silent)
    _check_samples_apart(block.eval(), x)
    _check_inputs(block, x)
    _check_state(make, block, x)
    _check_low_precision(block.train(), x)


def _check_shape_and_gradients(
    block: nn.Module, x: Tensor, out_shape: tuple[int, ...], silent: Sequence[str]
) -> None:
    leaf = x.clone().requires_grad_()
    y = block(leaf)
    assert y.shape == out_shape and y.dtype == x.dtype
    assert y.std() > 0, "the output says nothing"
    (y * torch.randn_like(y)).sum().backward()
    assert leaf.grad is not None and leaf.grad.isfinite().all() and leaf.grad.abs().sum() > 0
    for name, weight in block.named_parameters():
        assert weight.grad is not None, f"{name}: no gradient"
        assert weight.grad.isfinite().all(), f"{name}: gradient not finite"
        assert name.endswith(tuple(silent) or ("\0",)) or weight.grad.abs().max() > 0, f"{name}: gradient 0"
    block.zero_grad()


def _check_samples_apart(block: nn.Module, x: Tensor) -> None:
    """One sample's output does not depend on the others; a batch of none gives none."""
    with torch.no_grad():
        together = block(x)
        for n in range(len(x)):
            torch.testing.assert_close(block(x[n : n + 1])[0], together[n], rtol=1e-4, atol=1e-5)
    none = block(x[:0])
    assert none.shape == (0, *together.shape[1:])
    none.sum().backward()
    assert all(weight.grad is not None for weight in block.parameters()), "a batch of none cuts a weight off"
    block.zero_grad()


def _check_inputs(block: nn.Module, x: Tensor) -> None:
    """Any strides will do, and the input is left alone."""
    kept = x.clone()
    with torch.no_grad():
        expected = block(x)
        assert torch.equal(x, kept), "the input was changed"
        for strided in (
            x.transpose(1, -1).contiguous().transpose(1, -1),
            x.repeat_interleave(2, -1)[..., ::2],
        ):
            torch.testing.assert_close(block(strided), expected, rtol=1e-4, atol=1e-5)
        constant = block(torch.zeros_like(x))
        assert constant.isfinite().all(), "not finite over a field of zeros"


def _check_state(make: Callable[[], nn.Module], block: nn.Module, x: Tensor) -> None:
    """The state goes through a file and a copy, strictly, with no two weights in one memory."""
    other = make().eval()
    other.load_state_dict(load(save(block.state_dict())), strict=True)
    with torch.no_grad():
        assert torch.equal(other(x), block(x))
        assert torch.equal(copy.deepcopy(block)(x), block(x))
    places = [weight.untyped_storage().data_ptr() for weight in block.parameters()]
    assert len(set(places)) == len(places), "weights share memory"


def _check_low_precision(block: nn.Module, x: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        leaf = x.clone().requires_grad_()
        y = block(leaf)
    assert y.isfinite().all()
    with torch.no_grad():
        expected = block(x)
    assert (y - expected).norm() < 0.1 * expected.norm(), "autocast strays too far"
    y.float().sum().backward()
    assert leaf.grad is not None and leaf.grad.isfinite().all()
    low = copy.deepcopy(block).bfloat16()
    leaf = x.bfloat16().requires_grad_()
    y = low(leaf)
    assert y.dtype == torch.bfloat16 and y.isfinite().all()
    y.float().sum().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in low.parameters())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert (low(x.bfloat16()) - expected).norm() < 0.2 * expected.norm(), "autocast of a low block strays"
        torch.testing.assert_close(block.double()(x.double()), expected.double(), rtol=1e-3, atol=1e-4)


class Largest(TorchDispatchMode):
    """Watches which tensor was the largest that any operation made; `elements` of it."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(made):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return made
