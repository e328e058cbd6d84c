import pytest
import torch
import torch.nn.functional as F

from metnet.conv_lstm import ConvLSTM


def written_out(lstm, x):
    """Shi et al. 2015, eq. 3 without peepholes: one convolution of [input, hidden] per time step."""
    weight = torch.cat([lstm.from_input.weight, lstm.from_hidden.weight], dim=1)
    hidden = cell = torch.zeros(x.shape[0], lstm.channels, *x.shape[3:], dtype=x.dtype)
    for t in range(x.shape[1]):
        gates = F.conv2d(torch.cat([x[:, t], hidden], dim=1), weight, lstm.from_input.bias, padding=1)
        i, f, o, g = gates.split(lstm.channels, dim=1)
        cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
        hidden = torch.sigmoid(o) * torch.tanh(cell)
    return hidden


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_it_equals_the_recurrence_written_out(steps):
    lstm = ConvLSTM(3, 4).double()
    x = torch.randn(2, steps, 3, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(lstm(x), written_out(lstm, x))


def test_the_oldest_frame_is_remembered():
    torch.manual_seed(0)
    x = torch.randn(1, 8, 3, 6, 6, requires_grad=True)
    ConvLSTM(3, 8)(x).square().sum().backward()
    share = x.grad.abs().sum(dim=(0, 2, 3, 4))
    assert share[0] > 1e-3 * share[-1]


def test_the_order_of_the_frames_matters():
    torch.manual_seed(0)
    lstm, x = ConvLSTM(3, 8), torch.randn(1, 4, 3, 6, 6)
    assert not torch.allclose(lstm(x), lstm(x.flip(1)), atol=1e-3)


def test_no_time_step_is_refused():
    with pytest.raises(ValueError, match="at least 1 time step"):
        ConvLSTM(3, 4)(torch.zeros(1, 0, 3, 4, 4))


def test_an_even_kernel_is_refused():
    with pytest.raises(ValueError, match="kernel_size=4"):
        ConvLSTM(3, 4, kernel_size=4)
