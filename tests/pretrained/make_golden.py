"""Writes the checkpoints that the tests of moe/io/pretrained open, and what their mixtures compute:

    python3 -m venv /tmp/golden && /tmp/golden/bin/pip install torch transformers==5.24.0
    /tmp/golden/bin/python tests/pretrained/make_golden.py

Each folder has a tiny random model as save_pretrained() writes it (config.json and safetensors files),
passes.safetensors with the rows x, y, dy and dx of one layer's mixture, and gradients/, which is the same
model with the gradient of sum(y * dy) in place of each weight. All is computed in float64: where a model
casts to float32, float64 is put in its place. What a folder stores in fewer bits was rounded before the pass.

    make_golden.py --check FOLDER NAME

puts FOLDER/layer.safetensors, which a C++ program wrote from a layer of the model NAME, in the place of that
layer's mixture, has transformers read the model without a name or shape that does not fit, and prints how much
its y then differs from the one in NAME's folder: some 1e-7 for the families of DeepSeek and GLM, whose routers
from_pretrained() keeps in float32.
"""

import contextlib
import json
import os
import pathlib
import shutil
import sys
import tempfile

import torch
import transformers
from safetensors.torch import load_file, save_file

HERE = pathlib.Path(__file__).resolve().parent
WIDTH, HIDDEN = 6, 5

SMALL = dict(
    hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, vocab_size=3,
    max_position_embeddings=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True,
)
LATENT = dict(
    num_key_value_heads=2, q_lora_rank=None, kv_lora_rank=2, qk_rope_head_dim=2, qk_nope_head_dim=2,
    v_head_dim=2,
)

# name: (class of the configuration, its options, the layer that is run, how the weights are stored)
MODELS = {
    "mixtral": ("MixtralConfig", dict(intermediate_size=HIDDEN, num_local_experts=4), 1, {}),
    "olmoe": (
        "OlmoeConfig",
        dict(intermediate_size=HIDDEN, num_experts=5, num_experts_per_tok=3),
        0, dict(dtype=torch.float16),
    ),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        dict(moe_intermediate_size=HIDDEN, shared_expert_intermediate_size=3 * HIDDEN, num_experts=4,
             num_experts_per_tok=2, intermediate_size=4, decoder_sparse_step=2),
        1, {},
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        dict(moe_intermediate_size=HIDDEN, num_experts=6, num_experts_per_tok=3, intermediate_size=4,
             head_dim=2, norm_topk_prob=True, mlp_only_layers=[1]),
        0, dict(save_original_format=False),
    ),
    "deepseek_v2": (
        "DeepseekV2Config",
        dict(LATENT, moe_intermediate_size=HIDDEN, n_routed_experts=6, n_shared_experts=2,
             num_experts_per_tok=2, topk_method="group_limited_greedy", n_group=3, topk_group=2,
             routed_scaling_factor=1.5, intermediate_size=4, first_k_dense_replace=1),
        1, dict(max_shard_size="2KB"),
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        dict(LATENT, moe_intermediate_size=HIDDEN, n_routed_experts=6, n_shared_experts=1,
             num_experts_per_tok=3, n_group=3, topk_group=2, intermediate_size=4,
             first_k_dense_replace=1),
        1, dict(fp8_block=(4, 3)),
    ),
    "glm4_moe": (
        "Glm4MoeConfig",
        dict(moe_intermediate_size=HIDDEN, n_routed_experts=4, n_shared_experts=1, head_dim=2,
             num_experts_per_tok=2, intermediate_size=4, first_k_dense_replace=1),
        1, {},
    ),
    "granitemoe": (
        "GraniteMoeConfig",
        dict(intermediate_size=HIDDEN, num_local_experts=4, num_experts_per_tok=2),
        0, dict(dtype=torch.bfloat16),
    ),
    "switch_transformers": (
        "SwitchTransformersConfig",
        dict(d_model=WIDTH, d_kv=2, d_ff=HIDDEN, num_heads=2, num_layers=2, num_sparse_encoder_layers=1,
             num_decoder_layers=2, num_sparse_decoder_layers=2, num_experts=3, expert_capacity=1,
             vocab_size=3, router_bias=True, decoder_start_token_id=0),
        "decoder.block.1.layer.2.mlp", {},
    ),
    "gpt_oss": (
        "GptOssConfig",
        dict(hidden_size=32, intermediate_size=32, num_local_experts=3, num_experts_per_tok=2, head_dim=2,
             num_hidden_layers=1),
        0, dict(mxfp4=True),
    ),
    # For docs/pretrained.md, which shows how a family is added.
    "jamba": (
        "JambaConfig",
        dict(intermediate_size=HIDDEN, num_experts=4, num_experts_per_tok=2, attn_layer_period=2,
             attn_layer_offset=1, mamba_d_state=2, mamba_d_conv=2, mamba_expand=1, mamba_dt_rank=1),
        1, {},
    ),
    "llama4": (
        "Llama4TextConfig",
        dict(intermediate_size=HIDDEN, intermediate_size_mlp=4, num_local_experts=3, head_dim=2,
             num_experts_per_tok=1, interleave_moe_layer_step=2),
        1, {},
    ),
    # As FP8 files of Llama 4 are: a tensor for each map of each expert, with scales of rows.
    "llama4_fp8": (
        "Llama4TextConfig",
        dict(intermediate_size=HIDDEN, intermediate_size_mlp=4, num_local_experts=3, head_dim=2,
             num_experts_per_tok=1, interleave_moe_layer_step=2),
        1, dict(fp8_rows=True),
    ),
}


@contextlib.contextmanager
def in_double():
    """Casts to float32 become casts to float64."""
    single, to_single = torch.float32, torch.Tensor.float
    torch.float32 = torch.float = torch.float64
    torch.Tensor.float = torch.Tensor.double
    try:
        yield
    finally:
        torch.float32 = torch.float = single
        torch.Tensor.float = to_single


def make_model(name):
    config_class, options, layer, storage = MODELS[name]
    common = {} if name == "switch_transformers" else SMALL
    config = getattr(transformers, config_class)(**{**common, **options})
    config._experts_implementation = "eager"
    model_class = {
        "switch_transformers": transformers.SwitchTransformersForConditionalGeneration,
        "llama4": transformers.Llama4ForCausalLM,
        "llama4_fp8": transformers.Llama4ForCausalLM,
    }.get(name, transformers.AutoModelForCausalLM)
    if model_class is transformers.AutoModelForCausalLM:
        model = model_class.from_config(config, experts_implementation="eager")
    else:
        model = model_class(config)
    return model.double().eval(), layer, storage


def mixture_of(model, layer):
    if isinstance(layer, str):
        return model.get_submodule(layer)
    block = model.model.layers[layer]
    for part in ("mlp", "block_sparse_moe", "feed_forward"):
        if hasattr(block, part):
            return getattr(block, part)
    raise AssertionError(block)


def run(mixture, x):
    with in_double():
        if hasattr(mixture, "router") and hasattr(mixture.router, "dtype"):
            mixture.router.dtype = torch.float64
        y = mixture(x)
    y = (y[0] if isinstance(y, tuple) else y).reshape(x.shape)
    assert y.dtype == torch.float64
    return y


def fp8(weight, block):
    """F8_E4M3 values and the scale of each block; the weight becomes what they stand for."""
    rows, columns = block
    scale = torch.zeros(-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
    narrow = torch.zeros_like(weight, dtype=torch.float8_e4m3fn)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            part = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
            scale[i, j] = (weight[part].abs().max() / 448).float()
            narrow[part] = (weight[part] / scale[i, j].double()).to(torch.float8_e4m3fn)
            weight[part] = narrow[part].double() * scale[i, j].double()
    return narrow.contiguous(), scale


def mxfp4(weight):
    """Blocks and scales of gpt-oss for weight [E, out, in]; the weight becomes what they stand for."""
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]).double()
    parts = weight.reshape(*weight.shape[:2], -1, 32)
    exponent = torch.floor(torch.log2(parts.abs().amax(-1, keepdim=True))) - 2
    code = (parts / 2**exponent).unsqueeze(-1).sub(values).abs().argmin(-1)
    parts.copy_(values[code] * 2**exponent)
    blocks = (code[..., 0::2] | code[..., 1::2] << 4).to(torch.uint8)
    return blocks, (exponent.squeeze(-1) + 127).to(torch.uint8)


def narrow(model, storage):
    """Rounds the weights to what will be stored, and returns the tensors to replace, by name."""
    if "dtype" in storage:
        for p in model.parameters():
            p.copy_(p.to(storage["dtype"]).double())
    replaced = {}
    for i, layer in enumerate(model.model.layers if hasattr(model, "model") else []):
        if "fp8_block" in storage and hasattr(layer.mlp, "experts"):
            name = f"model.layers.{i}.mlp."
            experts = layer.mlp.experts
            weights = {}
            for e in range(experts.gate_up_proj.shape[0]):
                weights[f"experts.{e}.gate_proj"], weights[f"experts.{e}.up_proj"] = (
                    experts.gate_up_proj[e].chunk(2))
                weights[f"experts.{e}.down_proj"] = experts.down_proj[e]
            for part in ("gate_proj", "up_proj", "down_proj"):
                weights[f"shared_experts.{part}"] = getattr(layer.mlp.shared_experts, part).weight
            for part, weight in weights.items():
                values, scale = fp8(weight, storage["fp8_block"])
                replaced[f"{name}{part}.weight"] = {"weight": values, "weight_scale_inv": scale}
        if "fp8_rows" in storage and hasattr(layer.feed_forward, "experts"):
            name = f"model.layers.{i}.feed_forward."
            experts = layer.feed_forward.experts
            gate_up, down = {}, {}
            for e in range(experts.down_proj.shape[0]):
                gate, up = experts.gate_up_proj[e].T.chunk(2)
                for part, weight, of in (("gate_proj", gate, gate_up), ("up_proj", up, gate_up),
                                         ("down_proj", experts.down_proj[e].T, down)):
                    values, scale = fp8(weight, (1, weight.shape[1]))
                    of |= {f"{e}.{part}.weight": values, f"{e}.{part}.weight_scale": scale}
            replaced[f"{name}experts.gate_up_proj"] = gate_up
            replaced[f"{name}experts.down_proj"] = down
            for part in ("gate_proj", "up_proj", "down_proj"):
                weight = getattr(layer.feed_forward.shared_expert, part).weight
                values, scale = fp8(weight, tuple(weight.shape))
                replaced[f"{name}shared_expert.{part}.weight"] = {
                    "weight": values, "weight_scale": scale[0], "input_scale": torch.full((1,), 0.5)}
        if "mxfp4" in storage:
            for part in ("gate_up_proj", "down_proj"):
                weight = getattr(layer.mlp.experts, part)
                rows = weight.transpose(1, 2).contiguous()
                blocks, scales = mxfp4(rows)
                weight.copy_(rows.transpose(1, 2))
                replaced[f"model.layers.{i}.mlp.experts.{part}"] = {
                    f"{part}_blocks": blocks, f"{part}_scales": scales}
    return replaced


def save(model, folder, replaced, storage, name):
    kept = {k: v for k, v in storage.items() if k in ("max_shard_size", "save_original_format")}
    if "dtype" in storage:
        model.to(storage["dtype"])
    model.save_pretrained(folder, **kept)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if replaced:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        for old, new in replaced.items():
            del tensors[old]
            for part, tensor in new.items():
                tensors[old.rsplit(".", 1)[0] + "." + part] = tensor
        save_file(tensors, file, metadata={"format": "pt"})
    if "fp8_block" in storage:
        file = folder / "config.json"
        config = json.loads(file.read_text())
        config["quantization_config"] = {
            "quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(storage["fp8_block"])}
        file.write_text(json.dumps(config, indent=2) + "\n")
    if name.startswith("llama4"):
        # Published checkpoints are of the model that sees pictures too.
        file = folder / "config.json"
        config = {"model_type": "llama4", "text_config": json.loads(file.read_text())}
        file.write_text(json.dumps(config, indent=2) + "\n")
        file = folder / "model.safetensors"
        tensors = {f"language_model.{k}": v for k, v in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})


def make(name):
    torch.manual_seed(len(name))
    model, layer, storage = make_model(name)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.7)
        for n, b in model.named_buffers():
            if n.endswith("e_score_correction_bias"):
                b.copy_(torch.randn_like(b) * 0.3)
        replaced = narrow(model, storage)
    mixture = mixture_of(model, layer)
    width = model.config.hidden_size
    x = torch.randn(2, 4, width, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(2, 4, width, dtype=torch.float64)
    y = run(mixture, x)
    y.backward(dy)
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    rows = dict(x=x, y=y, dy=dy, dx=x.grad)
    gradients = make_model(name)[0]
    of_model = dict(model.named_parameters())
    with torch.no_grad():
        for n, p in gradients.named_parameters():
            g = of_model[n].grad
            p.copy_(torch.zeros_like(p) if g is None else g)
        for n, b in gradients.named_buffers():
            if n.endswith("e_score_correction_bias"):
                b.zero_()
    kept = {k: v for k, v in storage.items() if k == "save_original_format"}
    save(gradients, folder / "gradients", {}, kept, name)
    save(model, folder, replaced, storage, name)
    save_file({k: v.detach().reshape(-1, width).contiguous() for k, v in rows.items()},
              folder / "passes.safetensors")


def check(folder, name):
    written = load_file(pathlib.Path(folder) / "layer.safetensors")
    prefix = os.path.commonprefix(list(written)).rpartition(".")[0]
    tensors = {}
    for file in (HERE / name).glob("model*.safetensors"):
        tensors.update(load_file(file))
    kept = {k: v for k, v in tensors.items() if not k.startswith(prefix + ".")}
    config = json.loads((HERE / name / "config.json").read_text())
    config.pop("quantization_config", None)  # what was written is wide
    with tempfile.TemporaryDirectory() as target:
        target = pathlib.Path(target)
        save_file({**kept, **written}, target / "model.safetensors", metadata={"format": "pt"})
        (target / "config.json").write_text(json.dumps(config))
        model, layer, _ = make_model(name)
        model, report = type(model).from_pretrained(
            target, dtype=torch.float64, output_loading_info=True, experts_implementation="eager")
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    rows = load_file(HERE / name / "passes.safetensors")
    y = run(mixture_of(model, layer), rows["x"].reshape(2, 4, -1))
    difference = (y.reshape(rows["y"].shape) - rows["y"]).abs().max().item()
    print(f"{name}: {len(written)} tensors in place of {prefix}; y differs by {difference}")


if __name__ == "__main__":
    assert transformers.__version__ == "5.24.0", transformers.__version__
    if sys.argv[1:2] == ["--check"]:
        check(*sys.argv[2:])
    else:
        for name in sys.argv[1:] or MODELS:
            make(name)
            size = sum(f.stat().st_size for f in (HERE / name).rglob("*") if f.is_file())
            print(f"{name}: {size} bytes")
