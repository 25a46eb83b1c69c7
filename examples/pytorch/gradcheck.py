"""Checks the layers of library.cpp with torch.autograd.gradcheck and against a loop over experts, then
trains one:

    python3 gradcheck.py libmoe_torch.so
"""

import sys

import torch
from moe_torch import MoE


def loop_over_experts(layer, x, top_k):
    """What a TopK layer computes, in PyTorch's own operations."""
    scores, chosen = torch.softmax(x @ layer.gate.weight, 1).topk(top_k, 1)
    weights = scores / scores.sum(1, keepdim=True)
    y = torch.zeros_like(x)
    for e, expert in enumerate(layer.experts.children()):
        token, choice = torch.where(chosen == e)
        hidden = torch.relu(x.index_select(0, token) @ expert.up.weight + expert.up.bias)
        rows = hidden @ expert.down.weight + expert.down.bias
        y = y.index_add(0, token, rows * weights[token, choice, None])
    return y


def random_layer(gate, dtype):
    """One with entries far enough from zero that a small step changes no choice and no ReLU."""
    torch.manual_seed(1)
    layer = MoE(width=6, hidden=5, experts=4, top_k=2, gate=gate, dtype=dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer, torch.randn(7, 6, dtype=dtype, requires_grad=True)


def compare(dtype, tolerance):
    layer, x = random_layer("TopK", dtype)
    dy = torch.randn_like(x)
    inputs = [x, *layer.parameters()]
    y = layer(x, step=1)
    expected_y = loop_over_experts(layer, x, top_k=2)
    pairs = [(y, expected_y), (layer.eval()(x), expected_y)]
    pairs += zip(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected_y, inputs, dy))
    worst = max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)
    print(f"{dtype}: y, dx and all gradients differ from the loop's by at most {worst:.1e}")
    if not worst < tolerance:
        sys.exit("that is too much")


def train():
    torch.manual_seed(2)
    layer = MoE(width=8, hidden=16, experts=4, top_k=2, balance=0.1, gate="NoisyTopK")
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    x = torch.randn(4, 16, 8)  # the layer takes any shape whose last dimension is its width
    losses = []
    for step in range(200):
        optimizer.zero_grad(set_to_none=True)
        loss = torch.nn.functional.mse_loss(layer(x, step), x.abs())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if not losses[-1] < losses[0] / 4:
        sys.exit(f"the loss went from {losses[0]:.3f} to {losses[-1]:.3f} only")
    print(f"the loss falls from {losses[0]:.3f} to {losses[-1]:.3f}")


torch.classes.load_library(sys.argv[1])
for gate in ("TopK", "NoisyTopK"):
    layer, x = random_layer(gate, torch.float64)
    # The parameters are inputs too: gradcheck moves them in place, in the layer's own memory.
    torch.autograd.gradcheck(lambda x, *parameters: layer(x, step=3), (x, *layer.parameters()))
    print(f"{gate}, {'the noise of step 3' if gate == 'NoisyTopK' else 'no noise'}: the gradients are right")
compare(torch.float64, 1e-12)
compare(torch.float32, 1e-4)
train()
