"""The layers of library.cpp as modules of PyTorch."""

import torch


class MoE(torch.nn.Module):
    """A mixture of experts with ReLU: y = layer(x, step), x and y being (..., width).

    `balance` weighs the gate's balance losses, whose gradients are part of the backward pass. Give every
    update its own step: it is what noise is drawn by. After eval(), or without a step under torch.no_grad(),
    there is no noise and no graph. Call torch.classes.load_library() before. Raises ValueError for a
    training pass without a step.
    """

    def __init__(self, width, hidden, experts, top_k, balance=0.0, seed=1, gate="TopK", dtype=torch.float32):
        super().__init__()
        name = gate + {torch.float32: "Float", torch.float64: "Double"}[dtype]
        self.layer = getattr(torch.classes.moe, name)(width, hidden, experts, top_k, balance, seed)
        self.in_order = []
        for name, tensor in self.layer.parameters().items():
            *modules, name = name.split(".")
            module = self
            for part in modules:
                if part not in module._modules:
                    module.add_module(part, torch.nn.Module())
                module = module._modules[part]
            module.register_parameter(name, torch.nn.Parameter(tensor, tensor.requires_grad))
            self.in_order.append((module, name))

    def forward(self, x, step=None):
        if step is None and self.training and torch.is_grad_enabled():
            raise ValueError("MoE: step = None, must be a number in a training pass; "
                             "call eval() or use torch.no_grad() for a pass without a graph")
        rows = x.reshape(-1, x.shape[-1])
        parameters = [getattr(*place) for place in self.in_order]
        if step is None or not self.training:
            y = self.layer.evaluate(rows, parameters)
        else:
            y = self.layer.forward(rows, parameters, step)
        return y.view(x.shape)
