"""Writes what tests/io/adapters_test.cpp opens: adapters as PEFT saves them, and what PEFT computes with them.

    python3 -m venv /tmp/peft && /tmp/peft/bin/pip install torch==2.15.0 peft==0.21.2
    /tmp/peft/bin/python tests/io/adapters/make_golden.py

Each folder, of a few kB, has

    adapter_config.json, adapter_model.safetensors   as save_pretrained() writes them
    base.safetensors         the frozen mixture, by the names of a moe::MoELayer and with its matrices, which are
                             those of torch.nn.Linear transposed
    passes.safetensors       the rows x, y, dy and dx
    gradients.safetensors    the gradient of sum(y * dy) by the names of adapter_model.safetensors

All is computed and stored in float64. Another run writes the same, but for the order of "target_modules".

    make_golden.py --check FOLDER

reads FOLDER/NAME, a folder of adapters that save_adapters() wrote, for every NAME above:

    MOE_TEST_KEEP_ADAPTERS=FOLDER build/tests/moe_tests "adapters: *"

It has PeftModel.from_pretrained() put the adapters on the mixture, fails where PEFT warns, a module has an adapter
that the golden model has not, or a rank, a scale or a bit of a tensor differs, and prints how much y differs. On
2026-11-30, with Python 3.11.7, torch 2.15.0, peft 0.21.2 and safetensors 0.8.0, it printed

    plain: 8 modules with adapters; y differs by 4.440892098500626e-16
    gated: 13 modules with adapters; y differs by 5.329070518200751e-15
    stabilized: 9 modules with adapters; y differs by 8.881784197001252e-16
"""

import pathlib
import shutil
import sys
import warnings

import peft
import torch
from safetensors.torch import load_file, save_file

HERE = pathlib.Path(__file__).resolve().parent
WIDTH, HIDDEN, EXPERTS, TOKENS = 6, 5, 4, 8

# name: (the mixture, the configuration of its adapters)
GOLDEN = {
    "plain": (
        dict(gated=False, bias=True, top_k=2),
        dict(r=3, lora_alpha=10, target_modules=["up", "down"]),
    ),
    "gated": (
        dict(gated=True, bias=False, top_k=2, router_bias=True),
        dict(r=3, lora_alpha=10, target_modules=["gate", "up", "down"], rank_pattern={"^gate": 2}),
    ),
    # The router, but not the experts' maps of the same name.
    "stabilized": (
        dict(gated=True, bias=True, top_k=3),
        dict(r=3, lora_alpha=10, use_rslora=True, target_modules=r"gate|experts\.\d+\.(up|down)",
             rank_pattern={"^gate": 1}, alpha_pattern={"^gate": 7}),
    ),
}


class Expert(torch.nn.Module):
    def __init__(self, gated, bias):
        super().__init__()
        if gated:
            self.gate = torch.nn.Linear(WIDTH, HIDDEN, bias=bias)
        self.up = torch.nn.Linear(WIDTH, HIDDEN, bias=bias)
        self.down = torch.nn.Linear(HIDDEN, WIDTH, bias=bias)

    def forward(self, x):
        if hasattr(self, "gate"):
            return self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))
        return self.down(torch.relu(self.up(x)))


class Mixture(torch.nn.Module):
    def __init__(self, gated, bias, top_k, router_bias=False):
        super().__init__()
        self.top_k = top_k
        self.gate = torch.nn.Linear(WIDTH, EXPERTS, bias=router_bias)
        self.experts = torch.nn.ModuleList(Expert(gated, bias) for _ in range(EXPERTS))

    def forward(self, x):
        scores, chosen = self.gate(x).sort(descending=True)
        # A choice that rounding could change would make the files useless.
        assert (scores[:, :-1] - scores[:, 1:]).min() > 1e-3
        weights = scores[:, : self.top_k].softmax(-1)
        rows = []
        for t in range(len(x)):
            slots = zip(chosen[t, : self.top_k].tolist(), weights[t])
            rows.append(sum(weight * self.experts[e](x[t]) for e, weight in slots))
        return torch.stack(rows)


def make(name):
    torch.manual_seed(len(name))
    mixture, lora = GOLDEN[name]
    model = Mixture(**mixture).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.6)
    base = {n: p.detach().t().contiguous().clone() for n, p in model.named_parameters()}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**lora))
    adapters = {n: p for n, p in adapted.named_parameters() if "lora_" in n}
    assert all(p.dtype == torch.float64 and p.requires_grad for p in adapters.values())
    with torch.no_grad():
        for p in adapters.values():
            p.copy_(torch.randn_like(p) * 0.4)
    x = torch.randn(TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(TOKENS, WIDTH, dtype=torch.float64)
    y = adapted(x)
    y.backward(dy)
    gradients = {n.replace(".default", ""): torch.zeros_like(p) if p.grad is None else p.grad
                 for n, p in adapters.items()}

    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    adapted.save_pretrained(folder)
    (folder / "README.md").unlink()
    assert set(load_file(folder / "adapter_model.safetensors")) == set(gradients)
    save_file(base, folder / "base.safetensors")
    save_file(gradients, folder / "gradients.safetensors")
    save_file({"x": x.detach(), "y": y.detach(), "dy": dy, "dx": x.grad}, folder / "passes.safetensors")


def read(name, folder):
    """The golden mixture with the adapters of a folder."""
    mixture, _ = GOLDEN[name]
    model = Mixture(**mixture).double()
    base = load_file(HERE / name / "base.safetensors")
    model.load_state_dict({n: t.t().contiguous() for n, t in base.items()})
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of keys that are missing, for example
        adapted = peft.PeftModel.from_pretrained(model, folder)
    return adapted.eval()


def scales(model):
    """The rank and the scale of each module with an adapter."""
    return {n: (m.r["default"], m.scaling["default"]) for n, m in model.named_modules()
            if isinstance(m, peft.tuners.lora.LoraLayer)}


def check(folder):
    for name in GOLDEN:
        ours, theirs = read(name, pathlib.Path(folder) / name), read(name, HERE / name)
        expected, found = scales(theirs), scales(ours)
        assert set(found) == set(expected), set(found) ^ set(expected)
        for module, (rank, scale) in expected.items():
            assert found[module][0] == rank, (module, found[module], rank)
            assert abs(found[module][1] - scale) <= 1e-15 * scale, (module, found[module], scale)
        tensors = peft.get_peft_model_state_dict(ours)
        golden = load_file(HERE / name / "adapter_model.safetensors")
        assert set(tensors) == set(golden), set(tensors) ^ set(golden)
        assert all(torch.equal(tensors[n], golden[n]) for n in golden)
        rows = load_file(HERE / name / "passes.safetensors")
        difference = (ours(rows["x"]) - rows["y"]).abs().max().item()
        print(f"{name}: {len(found)} modules with adapters; y differs by {difference}")
        assert difference < 1e-14


if __name__ == "__main__":
    if sys.argv[1:2] == ["--check"]:
        check(*sys.argv[2:])
    else:
        for name in GOLDEN:
            make(name)
            size = sum(f.stat().st_size for f in (HERE / name).iterdir())
            print(f"{name}: {size} bytes")
