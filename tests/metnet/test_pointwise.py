import pytest
import torch
from torch import nn

from metnet.pointwise import Pointwise


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("goes_back", [True, False])
def test_it_is_the_convolution_with_the_same_weights_and_gradients(layout, samples, goes_back):
    torch.manual_seed(0)
    convolution, product = nn.Conv2d(5, 7, 1), Pointwise(5, 7)
    product.load_state_dict(convolution.state_dict())
    x = torch.randn(samples, 5, 9, 11).contiguous(memory_format=layout).requires_grad_(goes_back)
    parts = []
    for made in (convolution, product):
        y = made(x)
        learned = [*made.parameters(), x] if goes_back else made.parameters()
        parts.append((y, *torch.autograd.grad(y.square().sum(), learned)))
    for told, expected in zip(*parts, strict=True):
        torch.testing.assert_close(told, expected, rtol=1e-4, atol=1e-4)
    assert goes_back or product(x).is_contiguous()
