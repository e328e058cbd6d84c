"""How the tests of this room let a network learn."""

import torch

from metnet.loss import cross_entropy


def learn(net, batch, steps, loss=cross_entropy, rate=5e-3):
    """The loss before, and after each step; the rate rises for a tenth of them, then falls to 0."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps + 1, pct_start=0.1)
    costs = []
    for _ in range(steps):
        cost = loss(net.logits(batch), batch.target, net.bins)
        costs.append(cost.item())
        optimizer.zero_grad()
        cost.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        costs.append(loss(net.logits(batch), batch.target, net.bins).item())
    return costs
