"""Writes models/tiny/{hf,gptq,awq,fp8}-*: small random repositories with safetensors, and what transformers
says of them.

usage: python scripts/gen_tiny_hf.py [NAME...]     needs: what scripts/gen_tiny.py needs

Like scripts/gen_tiny.py: weights are stored first, in the way of the format's own tools, and
transformers runs in float32 on what is stored, dequantised by the format's definition.
"""

import json
import shutil
import sys
from dataclasses import dataclass

import numpy as np
import torch
import transformers

import gen_tiny
from gen_tiny import CHAT_TEMPLATE, CONTEXT_LENGTH, OUT

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


@dataclass(frozen=True)
class Variant:
    """One repository. `form` says how the projections are stored, `floats` everything else."""

    name: str
    form: str = "float"
    floats: str = "F16"
    hidden_size: int = 128
    num_heads: int = 2
    num_kv_heads: int = 1
    intermediate_size: int = 192
    num_layers: int = 1
    tied: bool = True
    num_shards: int = 1
    bits: int = 4
    group_size: int = 128
    sym: bool = True
    act_order: bool = False
    checkpoint_format: str = "gptq"
    rope_theta: float = 1e6
    family: str = "Qwen2"  # of transformers' classes
    num_experts: int = 0
    moe_intermediate_size: int = 0
    shared_intermediate_size: int = 0

    @property
    def has_biases(self):
        return self.family.startswith("Qwen2")


EXPERTS = dict(num_experts=5, moe_intermediate_size=64)
VARIANTS = [
    Variant("hf-bf16", floats="BF16", intermediate_size=64),
    Variant("hf-f16", tied=False, intermediate_size=32),
    Variant("hf-f32", floats="F32", hidden_size=64, num_heads=1, intermediate_size=64),
    Variant("hf-sharded", floats="BF16", hidden_size=64, num_heads=1, intermediate_size=64,
            num_layers=2, tied=False, num_shards=3),
    Variant("gptq-int4", form="gptq"),
    Variant("gptq-int4-act-order", form="gptq", group_size=32, act_order=True),
    Variant("gptq-int4-asym", form="gptq", group_size=64, sym=False),
    Variant("gptq-int4-v2", form="gptq", group_size=-1, sym=False, checkpoint_format="gptq_v2"),
    Variant("gptq-int8", form="gptq", bits=8, group_size=-1),
    Variant("gptq-int8-asym", form="gptq", bits=8, group_size=32, sym=False, act_order=True),
    Variant("awq", form="awq", group_size=64, sym=False),
    Variant("fp8-block", form="fp8-block", floats="BF16"),
    Variant("fp8-tensor", form="fp8-tensor", floats="BF16"),
    Variant("fp8-channel", form="fp8-channel", floats="BF16"),
    Variant("gptq-int4-qwen2moe", form="gptq", group_size=64, family="Qwen2Moe", shared_intermediate_size=96,
            **EXPERTS),
    Variant("gptq-int4-qwen3moe", form="gptq", family="Qwen3Moe", **EXPERTS),
    Variant("awq-qwen3moe", form="awq", group_size=32, sym=False, family="Qwen3Moe", **EXPERTS),
    Variant("fp8-block-qwen3moe", form="fp8-block", floats="BF16", family="Qwen3Moe", **EXPERTS),
]


def stored_floats(values, kind):
    """(type, bytes, the values that these bytes mean)."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    if kind == "F32":
        return "F32", values.tobytes(), values
    if kind == "F16":
        half = values.astype(np.float16)
        return "F16", half.tobytes(), half.astype(np.float32)
    words = values.view(np.uint32).astype(np.uint64)
    words = ((words + 0x7FFF + ((words >> 16) & 1)) >> 16).astype(np.uint16)
    return "BF16", words.tobytes(), (words.astype(np.uint32) << 16).view(np.float32)


def e4m3_values():
    """What each byte means: no infinities, two NaNs."""
    values = []
    for byte in range(256):
        exponent, mantissa = byte >> 3 & 15, byte & 7
        size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        values.append(np.nan if byte & 127 == 127 else -size if byte & 128 else size)
    return np.array(values, dtype=np.float32)


def e4m3(values):
    """The nearest bytes."""
    positive = e4m3_values()[:127]
    middles = (positive[1:] + positive[:-1]) / 2
    sizes = np.searchsorted(middles, np.abs(values)).astype(np.uint8)
    return sizes | (np.signbit(values).astype(np.uint8) << 7)


def packed_words(integers, bits, axis):
    """Neighbours along an axis side by side in words of 32 bits, the first one lowest."""
    per_word = 32 // bits
    integers = np.moveaxis(integers.astype(np.uint32), axis, 0)
    words = np.zeros((integers.shape[0] // per_word, *integers.shape[1:]), np.uint32)
    for place in range(per_word):
        words |= integers[place::per_word] << np.uint32(bits * place)
    return np.ascontiguousarray(np.moveaxis(words, 0, axis)).view(np.int32)


def grouped(variant, weights, g_idx):
    """Integers `[in, out]`, scales and zeros `[groups, out]`, and the values they mean."""
    columns = weights.T
    num_groups = int(g_idx.max()) + 1
    top = 2**variant.bits - 1
    scales = np.zeros((num_groups, columns.shape[1]), np.float16)
    zeros = np.zeros_like(scales, dtype=np.int64)
    integers = np.zeros(columns.shape, np.int64)
    for group in range(num_groups):
        mine = columns[g_idx == group]
        low, high = np.minimum(mine.min(0), 0), np.maximum(mine.max(0), 0)
        if variant.sym:
            high = np.maximum(high, -low)
            low = -high
        scales[group] = (high - low) / top
        step = scales[group].astype(np.float32)
        zeros[group] = (top + 1) // 2 if variant.sym else np.clip(np.round(-low / step), 1, top)
        integers[g_idx == group] = np.clip(np.round(mine / step) + zeros[group], 0, top)
    values = scales.astype(np.float32)[g_idx] * (integers - zeros[g_idx]).astype(np.float32)
    return integers, scales, zeros, np.ascontiguousarray(values.T)


def group_of_columns(variant, num_cols, order):
    size = num_cols if variant.group_size == -1 else variant.group_size
    g_idx = np.empty(num_cols, np.int64)
    g_idx[order if variant.act_order else np.arange(num_cols)] = np.arange(num_cols) // size
    return g_idx


def stored_projection(variant, name, weights, order):
    """{tensor name: (type, shape, bytes)} and the values they mean."""
    def ints(array):
        return "I32", list(array.shape), array.astype(np.int32).tobytes()

    if variant.form == "float":
        kind, data, values = stored_floats(weights, variant.floats)
        return {f"{name}.weight": (kind, list(weights.shape), data)}, values
    if variant.form in ("gptq", "awq"):
        g_idx = group_of_columns(variant, weights.shape[1], order)
        integers, scales, zeros, values = grouped(variant, weights, g_idx)
        stored = {f"{name}.scales": ("F16", list(scales.shape), scales.tobytes())}
        if variant.form == "gptq":
            shift = 1 if variant.checkpoint_format == "gptq" else 0
            stored[f"{name}.qweight"] = ints(packed_words(integers, variant.bits, axis=0))
            stored[f"{name}.qzeros"] = ints(packed_words(zeros - shift, variant.bits, axis=1))
            stored[f"{name}.g_idx"] = ints(g_idx)
        else:
            def interleaved(array):
                return array.reshape(len(array), -1, 8)[:, :, AWQ_ORDER].reshape(array.shape)
            stored[f"{name}.qweight"] = ints(packed_words(interleaved(integers), 4, axis=1))
            stored[f"{name}.qzeros"] = ints(packed_words(interleaved(zeros), 4, axis=1))
        return stored, values
    rows, cols = weights.shape
    block_rows, block_cols = {
        "fp8-block": (128, 128), "fp8-tensor": (rows, cols), "fp8-channel": (1, cols),
    }[variant.form]
    scales = np.zeros((-(-rows // block_rows), -(-cols // block_cols)), np.float32)
    for row in range(scales.shape[0]):
        for col in range(scales.shape[1]):
            block = weights[row * block_rows:(row + 1) * block_rows, col * block_cols:(col + 1) * block_cols]
            scales[row, col] = np.abs(block).max() / 448
    scale_kind, scale_bytes, scales = stored_floats(scales, "BF16" if variant.form == "fp8-block" else "F32")
    spread = scales.repeat(block_rows, 0)[:rows].repeat(block_cols, 1)[:, :cols]
    data = e4m3(weights / spread)
    suffix = "weight_scale_inv" if variant.form == "fp8-block" else "weight_scale"
    shape = [1] if variant.form == "fp8-tensor" else list(scales.shape)
    return {
        f"{name}.weight": ("F8_E4M3", [rows, cols], data.tobytes()),
        f"{name}.{suffix}": (scale_kind, shape, scale_bytes),
    }, e4m3_values()[data] * spread


def quantization_config(variant):
    if variant.form == "gptq":
        return {
            "quant_method": "gptq", "bits": variant.bits, "group_size": variant.group_size,
            "desc_act": variant.act_order, "sym": variant.sym, "damp_percent": 0.01,
            "static_groups": False, "true_sequential": True, "model_name_or_path": None,
            "model_file_base_name": "model", "checkpoint_format": variant.checkpoint_format,
        }
    if variant.form == "awq":
        return {
            "quant_method": "awq", "bits": 4, "group_size": variant.group_size, "version": "gemm",
            "zero_point": True, "modules_to_not_convert": None,
        }
    if variant.form == "fp8-block":
        return {
            "quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3",
            "weight_block_size": [128, 128],
        }
    strategy = {"fp8-tensor": "tensor", "fp8-channel": "channel"}[variant.form]
    return {
        "quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"],
        "config_groups": {"group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True,
                        "dynamic": False},
            "input_activations": {"num_bits": 8, "type": "float", "strategy": "token",
                                  "symmetric": True, "dynamic": True},
        }},
    }


def random_model(variant):
    """Stored tensors in order, and the values under transformers' names."""
    rng = np.random.default_rng([ord(letter) for letter in variant.name])
    hidden, inner = variant.hidden_size, variant.intermediate_size
    kv = variant.num_kv_heads * hidden // variant.num_heads
    vocab_size = len(gen_tiny.vocabulary(gen_tiny.VARIANTS[0])[0])
    stored, state = {}, {}

    def floats(name, values):
        kind, data, values = stored_floats(values, variant.floats)
        stored[name], state[name] = (kind, list(values.shape), data), values

    def projections(prefix, shapes, cols):
        order = rng.permutation(cols)
        for name, (rows, gain) in shapes.items():
            weights = rng.normal(0, gain / np.sqrt(cols), (rows, cols)).astype(np.float32)
            # Columns of unequal size, so that it matters which group one is in.
            weights *= rng.uniform(0.4, 1.6, cols).astype(np.float32)
            tensors, values = stored_projection(variant, prefix + name, weights, order)
            stored.update(tensors)
            state[f"{prefix}{name}.weight"] = values

    floats("model.embed_tokens.weight", rng.normal(0, 2.0 / np.sqrt(hidden), (vocab_size, hidden)))
    for layer in range(variant.num_layers):
        prefix = f"model.layers.{layer}."
        floats(prefix + "input_layernorm.weight", rng.normal(1, 0.2, hidden))
        if variant.has_biases:
            for name, rows, size in (("q", hidden, 0.5), ("k", kv, 0.5), ("v", kv, 0.1)):
                floats(f"{prefix}self_attn.{name}_proj.bias", rng.normal(0, size, rows))
        else:
            for name in "qk":
                floats(f"{prefix}self_attn.{name}_norm.weight", rng.normal(1.5, 0.4, hidden // variant.num_heads))
        attention = prefix + "self_attn."
        projections(attention, {"q_proj": (hidden, 2.5), "k_proj": (kv, 2.5), "v_proj": (kv, 1.0)}, hidden)
        projections(attention, {"o_proj": (hidden, 1.0)}, hidden)
        floats(prefix + "post_attention_layernorm.weight", rng.normal(1, 0.2, hidden))
        def feed_forward(prefix, inner):
            projections(prefix, {"gate_proj": (inner, 1.0), "up_proj": (inner, 1.0)}, hidden)
            projections(prefix, {"down_proj": (hidden, 4.0)}, inner)

        if variant.num_experts:
            # The choice of experts is not quantised.
            floats(prefix + "mlp.gate.weight", rng.normal(0, 2.0 / np.sqrt(hidden), (variant.num_experts, hidden)))
            for expert in range(variant.num_experts):
                feed_forward(f"{prefix}mlp.experts.{expert}.", variant.moe_intermediate_size)
            if variant.shared_intermediate_size:
                floats(prefix + "mlp.shared_expert_gate.weight", rng.normal(0, 0.3, (1, hidden)))
                feed_forward(prefix + "mlp.shared_expert.", variant.shared_intermediate_size)
            continue
        feed_forward(prefix + "mlp.", inner)
        if variant.name == "gptq-int4":
            # As older tools do, which give every projection a bias.
            for name, rows in ("gate", inner), ("up", inner), ("down", hidden):
                floats(f"{prefix}mlp.{name}_proj.bias", np.zeros(rows))
                del state[f"{prefix}mlp.{name}_proj.bias"]
    floats("model.norm.weight", rng.normal(1, 0.2, hidden))
    if variant.tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    else:
        floats("lm_head.weight", rng.normal(0, 2.0 / np.sqrt(hidden), (vocab_size, hidden)))
    return stored, state


def write_safetensors(path, tensors):
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, (kind, shape, data) in tensors.items():
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    bodies = b"".join(data for _, _, data in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + bodies)


def write_weights(variant, folder, stored):
    if variant.num_shards == 1:
        write_safetensors(folder / "model.safetensors", stored)
        return
    names, weight_map = list(stored), {}
    for shard in range(variant.num_shards):
        file = f"model-{shard + 1:05}-of-{variant.num_shards:05}.safetensors"
        mine = names[shard::variant.num_shards]
        write_safetensors(folder / file, {name: stored[name] for name in mine})
        weight_map.update({name: file for name in mine})
    total = sum(len(data) for _, _, data in stored.values())
    write_json(folder / "model.safetensors.index.json",
               {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def write_json(path, value):
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def model_config(variant):
    options = {}
    if variant.num_experts:
        options = dict(
            num_experts=variant.num_experts, num_experts_per_tok=2, decoder_sparse_step=1, mlp_only_layers=[],
            moe_intermediate_size=variant.moe_intermediate_size, norm_topk_prob=variant.family == "Qwen3Moe",
            experts_implementation="eager",
        )
    if variant.shared_intermediate_size:
        options |= dict(shared_expert_intermediate_size=variant.shared_intermediate_size)
    if not variant.has_biases:
        options |= dict(head_dim=variant.hidden_size // variant.num_heads)
    return getattr(transformers, variant.family + "Config")(
        vocab_size=len(gen_tiny.vocabulary(gen_tiny.VARIANTS[0])[0]),
        hidden_size=variant.hidden_size,
        intermediate_size=variant.intermediate_size,
        num_hidden_layers=variant.num_layers,
        num_attention_heads=variant.num_heads,
        num_key_value_heads=variant.num_kv_heads,
        max_position_embeddings=CONTEXT_LENGTH,
        rms_norm_eps=1e-6,
        rope_theta=variant.rope_theta,
        tie_word_embeddings=variant.tied,
        use_sliding_window=False,
        attn_implementation="eager",
        **options,
    )


def write_descriptions(variant, folder):
    config = model_config(variant).to_dict()
    config |= {"architectures": [variant.family + "ForCausalLM"], "_name_or_path": f"tiny {variant.name}"}
    config |= {"torch_dtype": {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[variant.floats]}
    if variant.form != "float":
        config["quantization_config"] = quantization_config(variant)
    write_json(folder / "config.json", config)
    write_text_side(variant.name, folder)


def write_text_side(name, folder):
    tokens, _ = gen_tiny.vocabulary(gen_tiny.VARIANTS[0])
    end = [tokens.index("<|im_end|>"), tokens.index("<|endoftext|>")]
    write_json(folder / "generation_config.json", {
        "bos_token_id": end[1], "pad_token_id": end[1], "do_sample": True, "eos_token_id": end,
        "repetition_penalty": 1.05, "temperature": 0.7, "top_p": 0.8, "top_k": 20,
    })
    tokenizer = json.loads(gen_tiny.reference_tokenizer().to_str())
    for token in tokenizer["added_tokens"]:
        token["special"] = token["content"] in gen_tiny.CONTROL
    settings = {
        "add_bos_token": False, "add_prefix_space": False, "bos_token": None,
        "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": {
            str(token.pop("id")): token for token in json.loads(json.dumps(tokenizer["added_tokens"]))},
    }
    # Two ways each to write merges and the template: one repository has the newer ones.
    if name == "hf-sharded":
        tokenizer["model"]["merges"] = [merge.split(" ") for merge in gen_tiny.MERGES]
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    else:
        settings["chat_template"] = CHAT_TEMPLATE
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, ensure_ascii=False) + "\n")


def reference_model(variant, state):
    model = getattr(transformers, variant.family + "ForCausalLM")(model_config(variant)).float().eval()
    state = {name: torch.from_numpy(np.array(values)) for name, values in state.items()}
    if variant.num_experts:
        stack_experts(variant, state)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all("inv_freq" in name for name in missing), (missing, unexpected)
    return model


def stack_experts(variant, state):
    """Puts the matrices of a layer's experts into one tensor each, as transformers has them in memory."""
    for layer in range(variant.num_layers):
        prefix = f"model.layers.{layer}.mlp.experts."
        gate, up, down = (
            [state.pop(f"{prefix}{expert}.{name}_proj.weight") for expert in range(variant.num_experts)]
            for name in ("gate", "up", "down")
        )
        state[prefix + "gate_up_proj"] = torch.stack([torch.cat(pair) for pair in zip(gate, up)])
        state[prefix + "down_proj"] = torch.stack(down)


def generate(variant):
    folder = OUT / variant.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    stored, state = random_model(variant)
    write_weights(variant, folder, stored)
    write_descriptions(variant, folder)
    prompts = gen_tiny.prompts()
    model = reference_model(variant, state)
    goldens = {
        "checkpoint": variant.name,
        "engine": "transformers, float32, eager, on the dequantised weights",
        "prompts": [gen_tiny.golden(model, ids, every_position) for ids, every_position in prompts],
    }
    gen_tiny.write_golden(variant.name, goldens)
    size = sum(file.stat().st_size for file in folder.iterdir())
    margins = [margin for prompt in goldens["prompts"] for margin in prompt["greedy_margins"]]
    print(f"{variant.name}: {size} bytes, smallest greedy margin {min(margins):.4f}")


# Repositories as transformers itself writes them, one for each architecture beside Qwen2.
SAVED = {
    "hf-qwen3": ("Qwen3", dict(head_dim=32, num_attention_heads=4, num_key_value_heads=2)),
    "hf-qwen2moe": ("Qwen2Moe", dict(
        num_experts=6, num_experts_per_tok=2, moe_intermediate_size=32,
        shared_expert_intermediate_size=64, norm_topk_prob=False, mlp_only_layers=[1])),
    "hf-qwen3moe": ("Qwen3Moe", dict(
        num_experts=6, num_experts_per_tok=3, moe_intermediate_size=32, norm_topk_prob=True,
        decoder_sparse_step=2, head_dim=32)),
    "hf-sliding": ("Qwen2", dict(use_sliding_window=True, sliding_window=20, max_window_layers=1)),
    # With heads that cards compute, and the other layer.
    "hf-sliding-hd64": ("Qwen2", dict(
        use_sliding_window=True, sliding_window=20, head_dim=64,
        layer_types=["sliding_attention", "full_attention"])),
    # Rows that no type of blocks fits, so that quantising leaves every bit as it is.
    "hf-narrow": ("Qwen2", dict(
        hidden_size=40, intermediate_size=56, num_attention_heads=5, num_key_value_heads=1, head_dim=8,
        use_sliding_window=True, sliding_window=20, layer_types=["sliding_attention", "full_attention"],
        max_position_embeddings=gen_tiny.YARN_FACTOR * 64,
        rope_parameters=dict(rope_type="yarn", rope_theta=1e6, factor=float(gen_tiny.YARN_FACTOR),
                             original_max_position_embeddings=64))),
    "hf-yarn": ("Qwen2", dict(
        max_position_embeddings=gen_tiny.YARN_FACTOR * 64,
        rope_parameters=dict(rope_type="yarn", rope_theta=1e6, factor=float(gen_tiny.YARN_FACTOR),
                             original_max_position_embeddings=64))),
}


def generate_saved(name):
    class_name, options = SAVED[name]
    options = dict(
        vocab_size=len(gen_tiny.vocabulary(gen_tiny.VARIANTS[0])[0]), hidden_size=64,
        intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=CONTEXT_LENGTH, rms_norm_eps=1e-6, initializer_range=0.25,
        rope_parameters=dict(rope_type="default", rope_theta=1e6), tie_word_embeddings=False,
        use_sliding_window=False, attn_implementation="eager", dtype="bfloat16",
    ) | options
    plain = options | dict(rope_parameters=dict(rope_type="default", rope_theta=1e6))
    config_class = getattr(transformers, class_name + "Config")
    model_class = getattr(transformers, class_name + "ForCausalLM")
    torch.manual_seed(len(name))
    model = model_class(config_class(**options)).to(torch.bfloat16).eval()
    folder = OUT / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    write_text_side(name, folder)
    # Models of their own, whose rotary frequencies were never rounded to half precision.
    stretched, unstretched = (
        model_class(config_class(**options)).float().eval() for options in (options, plain))
    for reference in stretched, unstretched:
        reference.load_state_dict(model.state_dict())
    trained = options["rope_parameters"].get("original_max_position_embeddings", CONTEXT_LENGTH)
    goldens = {
        "checkpoint": name,
        "engine": "transformers, float32, eager",
        "prompts": [
            gen_tiny.golden(
                unstretched if len(ids) + gen_tiny.NUM_GREEDY <= trained else stretched, ids, every)
            for ids, every in gen_tiny.prompts()
        ],
    }
    gen_tiny.write_golden(name, goldens)
    margins = [margin for prompt in goldens["prompts"] for margin in prompt["greedy_margins"]]
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{name}: {size} bytes, smallest greedy margin {min(margins):.4f}")


def main():
    torch.manual_seed(0)
    for name in SAVED:
        if not sys.argv[1:] or name in sys.argv[1:]:
            generate_saved(name)
    for variant in VARIANTS:
        if not sys.argv[1:] or variant.name in sys.argv[1:]:
            generate(variant)


if __name__ == "__main__":
    main()
