"""`ReversibleSequence`: a stack that recomputes instead of remembering (Gomez et al., arXiv 1707.04585)."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree


class Deterministic(nn.Module):
    """One branch of a pair; `net` is where published checkpoints keep its weights."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """What the branch adds to the other stream."""
        change: Tensor = self.net(x, **kwargs)
        return change


class ReversibleBlock(nn.Module):
    """A pair of branches between two streams: `y1 = x1 + f(x2)`, `y2 = x2 + g(y1)`."""

    def __init__(self, f: nn.Module, g: nn.Module):
        super().__init__()
        self.f = Deterministic(f)
        self.g = Deterministic(g)


class ReversibleSequence(nn.Module):
    """Two streams that start as `x` and end as their mean; each branch reads one and adds to the other.

    Only the two ends are kept for the backward pass, which rebuilds the input of every block from its
    outputs (`x2 = y2 - g(y1)`, `x1 = y1 - f(x2)`): activations do not grow with depth, at the price of one
    more forward. Each call keeps the random states, autocast and train or eval modes of its branches, so that
    their recomputation repeats what they did. Gradients reach `x`, all weights and every tensor among the
    `kwargs`, but no tensor that a branch holds otherwise.

    Where nothing is to be rebuilt (no gradient wanted, `torch.export`, `torch.func`) the sums run plainly.

    Args:
        blocks: pairs (f, g) of modules that keep the shape of what they read.
        remember: keep all activations, as plain autograd does: the same function in less time and more
            memory, with second derivatives, and in one graph for `torch.compile`, which otherwise leaves
            the stack uncompiled.

    Raises:
        ValueError: for a block that is no pair.
    """

    def __init__(self, blocks: Iterable[Iterable[nn.Module]], remember: bool = False):
        super().__init__()
        pairs = [tuple(pair) for pair in blocks]
        for n, pair in enumerate(pairs):
            if len(pair) != 2:
                raise ValueError(f"blocks[{n}] has {len(pair)} modules: expected a pair (f, g)")
        self.blocks = nn.ModuleList(ReversibleBlock(f, g) for f, g in pairs)
        self.remember = remember

    def forward(
        self, x: Float[Tensor, "batch *rest"], arg_route: Sequence[bool] = (True, True), **kwargs: Any
    ) -> Float[Tensor, "batch *rest"]:
        """The mean of the two streams after all blocks.

        Args:
            x: what both streams start as.
            arg_route: whether `f` and whether `g` of each block are given the `kwargs`.
            **kwargs: more arguments of the branches.

        Raises:
            ValueError: for a branch that changes the shape, or an `arg_route` of another length than 2.
            RuntimeError: from a backward pass with `create_graph=True`, unless `remember` is on.
        """
        if len(arg_route) != 2:
            raise ValueError(f"arg_route has {len(arg_route)} values: expected 2, for f and g")
        f_args, g_args = (kwargs if told else {} for told in arg_route)
        branches = []
        for block in self.blocks:
            branches += [(block.get_submodule("f"), f_args), (block.get_submodule("g"), g_args)]
        if self.remember or _nothing_is_rebuilt():
            return _mean(*_ends(x, [partial(branch, **given) for branch, given in branches]))
        return _recomputed(x, branches)


def _nothing_is_rebuilt() -> bool:
    """Whether no backward pass follows, or whoever makes one must see every step."""
    return (
        not torch.is_grad_enabled()
        or torch.compiler.is_exporting()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
    )


# torch.compiler.disable would import the compiler together with this file
@torch._disable_dynamo  # type: ignore[attr-defined]
def _recomputed(x: Tensor, branches: Sequence[tuple[nn.Module, Mapping[str, Any]]]) -> Tensor:
    call = _Call(x.device)
    runs = [call.branch(net, given) for net, given in branches]
    tensors, call.tensors = call.tensors, []  # what is kept of them is kept, and checked, by autograd
    out: Tensor = _Recomputed.apply(runs, x, *tensors)  # type: ignore[no-untyped-call]
    return out


def _ends(x: Tensor, branches: Iterable[Callable[[Tensor], Tensor]]) -> tuple[Tensor, Tensor]:
    """Both streams after the branches f, g, f, g, ...: the one last read from, and the one last added to."""
    into = read = x
    for branch in branches:
        into, read = read, _added(into, branch(read))
    return into, read


def _mean(one: Tensor, other: Tensor) -> Tensor:
    return (one + other) / 2


def _added(stream: Tensor, change: Tensor, sign: int = 1) -> Tensor:
    """The stream with the change added (or, with sign -1, taken away again), in the stream's dtype.

    Raises:
        ValueError: for another shape, which addition would silently broadcast.
    """
    if change.shape != stream.shape:
        raise ValueError(
            f"a branch gives shape {tuple(change.shape)} for a stream of shape {tuple(stream.shape)}: "
            "f and g must keep the shape of what they read"
        )
    return torch.add(stream, change.to(stream.dtype), alpha=sign)


class _Place(NamedTuple):
    """Stands for a tensor that the call holds, so that no graph is held through the arguments of a branch."""

    at: int


class _Call:
    """One pass through the stack: the tensors that its branches read, each once, and what surrounded them."""

    def __init__(self, device: torch.device):
        self.device = device
        self.tensors: list[Tensor] = []
        self.places: dict[int, _Place] = {}
        self.states: tuple[Tensor, ...] = ()
        self.autocast = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
            for kind in dict.fromkeys(("cpu", device.type))
            if torch.amp.is_autocast_available(kind)
        ]

    def branch(self, net: nn.Module, kwargs: Mapping[str, Any]) -> "_Branch":
        """A branch of this call, which knows its weights and arguments by their place."""
        weights = {name: self.place(weight) for name, weight in net.named_parameters(remove_duplicate=False)}
        values, layout = pytree.tree_flatten(dict(kwargs))
        values = [self.place(value) if isinstance(value, Tensor) else value for value in values]
        return _Branch(self, net, weights, values, layout)

    def place(self, tensor: Tensor) -> _Place:
        """The place of a tensor of this call, which is given one if it is new."""
        if id(tensor) not in self.places:
            self.places[id(tensor)] = _Place(len(self.tensors))
            self.tensors.append(tensor)
        return self.places[id(tensor)]

    def random_states(self) -> tuple[Tensor, ...]:
        """The random states of the CPU and of the device; the same objects until something is drawn."""
        states = _random_states(self.device)
        if not (self.states and all(map(torch.equal, states, self.states))):
            self.states = states
        return self.states


class _Branch:
    """One branch in one call, which can be run again as it ran then."""

    def __init__(
        self,
        call: _Call,
        net: nn.Module,
        weights: Mapping[str, _Place],
        values: Sequence[Any],
        layout: pytree.TreeSpec,
    ):
        self.call = call
        self.net = net
        self.weights = weights
        self.values = values
        self.layout = layout
        self.modes = [(module, module.training) for module in net.modules()]
        self.states: tuple[Tensor, ...] = ()

    def reads(self) -> list[int]:
        """The places of all tensors that it reads beside its stream."""
        places = [*self.weights.values(), *(v for v in self.values if isinstance(v, _Place))]
        return list(dict.fromkeys(place.at for place in places))

    def run(self, x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """For the first time; autocast must not keep weights that were cast where no gradient is wanted."""
        self.states = self.call.random_states()
        with ExitStack() as stack:
            for kind, dtype, enabled in self.call.autocast:
                stack.enter_context(torch.autocast(kind, dtype, enabled, cache_enabled=False))
            change: Tensor = self.net(x, **self._arguments(tensors))
        return change

    def again(self, x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """As it ran then: the same draws, precision and modes; its running statistics stay as they are."""
        named = {name: tensors[place.at] for name, place in self.weights.items()}
        named |= {name: kept.clone() for name, kept in self.net.named_buffers(remove_duplicate=False)}
        with ExitStack() as stack:
            stack.enter_context(_modes(self.modes))
            stack.enter_context(_drawing_from(self.states, self.call.device))
            for kind, dtype, enabled in self.call.autocast:
                stack.enter_context(torch.autocast(kind, dtype, enabled, cache_enabled=False))
            change: Tensor = functional_call(self.net, named, (x,), self._arguments(tensors))
        return change

    def _arguments(self, tensors: Sequence[Tensor]) -> dict[str, Any]:
        values = [tensors[value.at] if isinstance(value, _Place) else value for value in self.values]
        arguments: dict[str, Any] = pytree.tree_unflatten(values, self.layout)
        return arguments


class _Recomputed(torch.autograd.Function):
    """`_ends` and `_mean`, with a backward pass that rebuilds what the forward pass forgot."""

    @staticmethod
    def forward(ctx: Any, branches: list[_Branch], x: Tensor, *tensors: Tensor) -> Tensor:
        """The mean of both ends; `tensors` is everything that the branches read."""
        ends = _ends(x, [partial(branch.run, tensors=tensors) for branch in branches])
        ctx.branches = branches
        ctx.save_for_backward(*ends, *tensors)
        return _mean(*ends)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of `x` and of every tensor, block by block from the end.

        Raises:
            RuntimeError: where the gradients themselves should be differentiable.
        """
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True: a stack that recomputes gives no second derivatives; "
                "set remember=True on the ReversibleSequence (or AxialImageTransformer) for them"
            )
        wanted = ctx.needs_input_grad[2:]
        read, added, *tensors = ctx.saved_tensors
        tensors = [t.detach().requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)]
        slopes: list[Tensor | None] = [None] * len(tensors)
        slope_read = slope_added = slope / 2
        for branch in reversed(ctx.branches):
            places = [at for at in branch.reads() if wanted[at]]
            with torch.enable_grad():
                x = read.detach().requires_grad_()
                change = branch.again(x, tensors)
            through, *found = _gradients(change, [x, *(tensors[at] for at in places)], slope_added)
            for at, gradient in zip(places, found, strict=True):
                slopes[at] = _total(slopes[at], gradient)
            read, added = _added(added, change.detach(), sign=-1), read
            del change, x
            slope_read, slope_added = slope_added, slope_read if through is None else slope_read + through
        return None, slope_read + slope_added, *slopes


def _gradients(change: Tensor, inputs: Sequence[Tensor], slope: Tensor) -> Sequence[Tensor | None]:
    """The gradients of the inputs; None for those that `change` does not depend on."""
    if not change.requires_grad:
        return [None] * len(inputs)
    return torch.autograd.grad(change, inputs, slope.to(change.dtype), allow_unused=True)


def _total(so_far: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    if so_far is None or gradient is None:
        return gradient if so_far is None else so_far
    return so_far + gradient


def _random_states(device: torch.device) -> tuple[Tensor, ...]:
    if device.type in ("cpu", "meta"):
        return (torch.get_rng_state(),)
    which = () if device.type == "mps" else (device,)  # mps has one device, and takes none
    return torch.get_rng_state(), torch.get_device_module(device).get_rng_state(*which)


def _set_random_states(states: Sequence[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        which = () if device.type == "mps" else (device,)
        torch.get_device_module(device).set_rng_state(states[1], *which)


@contextmanager
def _drawing_from(states: Sequence[Tensor], device: torch.device) -> Iterator[None]:
    """Random numbers as they were drawn from `states`; the caller's go on afterwards where they were."""
    before = _random_states(device)
    _set_random_states(states, device)
    try:
        yield
    finally:
        _set_random_states(before, device)


@contextmanager
def _modes(then: Sequence[tuple[nn.Module, bool]]) -> Iterator[None]:
    """The modules train or evaluate as they did then."""
    before = [(module, module.training) for module, _ in then]
    for module, training in then:
        module.training = training
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
