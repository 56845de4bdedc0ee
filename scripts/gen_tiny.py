"""Writes models/tiny: small random Qwen checkpoints as GGUF, and what transformers says of them.

usage: python scripts/gen_tiny.py [NAME...]     needs: torch, transformers, tokenizers, gguf, numpy

Every checkpoint is quantised first; transformers then runs in float32 on the dequantised weights,
so the goldens hold the quantisation error and a reader has to match them closely. The same
versions of the packages write the same bytes.
"""

import json
import pathlib
import sys
from dataclasses import dataclass

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
import transformers

OUT = pathlib.Path(__file__).resolve().parent.parent / "models" / "tiny"
CONTEXT_LENGTH = 512
YARN_FACTOR = 4
NUM_GREEDY = 24
NUM_SPECIAL = 22

# Qwen's own split of text into words, and its special tokens, in their order.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROL = """<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|>
<|box_start|> <|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|>
<|vision_pad|> <|image_pad|> <|video_pad|>""".split()
USER_DEFINED = """<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|>
<|repo_name|> <|file_sep|>""".split()
MERGES = ["Ġ t", "h e", "Ġt he", "i n", "Ġ a", "o n", "r e", "a n", "Ġ s", "e r"]
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
TEXTS = [
    "the rain in the barn",
    "Hello, World! It's 2026.",
    "def f(x):\n    return x + 1\n\n",
    "你好，世界 🦀 éè",
    "<|im_start|>user\nhi<|im_end|>\n",
]


@dataclass(frozen=True)
class Variant:
    """One checkpoint. `types` maps tensor name endings to types; the first match counts."""

    name: str
    types: tuple
    hidden_size: int = 128
    num_heads: int = 2
    num_kv_heads: int = 1
    intermediate_size: int = 64
    num_layers: int = 2
    tied: bool = False
    num_padding_tokens: int = 0
    rope_theta: float = 1e6
    architecture: str = "qwen2"
    head_dim: int = 0  # 0: hidden_size / num_heads
    # Of mixtures of experts.
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    shared_intermediate_size: int = 0
    dense_layers: tuple = ()
    # Positions before they are stretched fourfold by YaRN; 0: they are not.
    original_context: int = 0

    @property
    def head_width(self):
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def context_length(self):
        return YARN_FACTOR * self.original_context or CONTEXT_LENGTH

    def is_sparse(self, layer):
        return self.num_experts and layer not in self.dense_layers


def all_of(kind):
    return (("", kind),)


K_QUANTS = (
    ("token_embd.weight", Type.Q5_K),
    ("output.weight", Type.Q6_K),
    ("attn_q.weight", Type.Q4_K),
    ("attn_k.weight", Type.Q5_K),
    ("attn_v.weight", Type.Q6_K),
    ("attn_output.weight", Type.Q3_K),
    ("ffn_gate.weight", Type.Q2_K),
    ("ffn_up.weight", Type.Q4_K),
    ("ffn_down.weight", Type.Q6_K),
)
# The mixture of the official 0.5B Q4_K_M files, whose width is no multiple of 256.
MIXED = (
    ("token_embd.weight", Type.Q5_0),
    ("output.weight", Type.Q8_0),
    ("attn_v.weight", Type.Q8_0),
    ("", Type.Q5_0),
)
# Experts of other types than the rest, and of two types beside each other.
MIXED_EXPERTS = (
    ("ffn_gate_inp.weight", Type.F32),
    ("ffn_gate_exps.weight", Type.Q5_0),
    ("ffn_up_exps.weight", Type.Q5_0),
    ("ffn_down_exps.weight", Type.Q4_1),
    ("", Type.Q8_0),
)

VARIANTS = [
    Variant("f32-untied", all_of(Type.F32), hidden_size=64, num_heads=1),
    Variant("f32-tied", all_of(Type.F32), hidden_size=64, num_heads=1, tied=True,
            num_padding_tokens=32, rope_theta=1e4),
    Variant("f16", all_of(Type.F16), tied=True),
    Variant("bf16", all_of(Type.BF16), tied=True),
    Variant("q8_0", all_of(Type.Q8_0)),
    Variant("q8_0-hd128", all_of(Type.Q8_0), hidden_size=256, num_layers=1),
    Variant("q4_0-gqa7", all_of(Type.Q4_0), hidden_size=448, num_heads=7, num_layers=1,
            intermediate_size=32, tied=True),
    Variant("q4_0", all_of(Type.Q4_0)),
    Variant("q4_1", all_of(Type.Q4_1)),
    Variant("q5_0", all_of(Type.Q5_0)),
    Variant("q5_1", all_of(Type.Q5_1)),
    Variant("mixed", MIXED),
    Variant("k-quants", K_QUANTS, hidden_size=256, intermediate_size=256, num_layers=1),
    Variant("qwen3-f16", all_of(Type.F16), architecture="qwen3", hidden_size=64, num_heads=4,
            num_kv_heads=2, head_dim=32),
    Variant("qwen3-q8_0", all_of(Type.Q8_0), architecture="qwen3", num_heads=3, head_dim=64,
            tied=True),
    Variant("qwen2moe-f16", all_of(Type.F16), architecture="qwen2moe", hidden_size=64, num_heads=1,
            num_experts=6, num_experts_per_tok=2, moe_intermediate_size=32,
            shared_intermediate_size=48, tied=True),
    Variant("qwen3moe-f16", all_of(Type.F16), architecture="qwen3moe", hidden_size=64, num_heads=2,
            head_dim=32, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=32,
            dense_layers=(0,)),
    Variant("qwen3moe-mixed", MIXED_EXPERTS, architecture="qwen3moe", num_experts=5,
            num_experts_per_tok=2, moe_intermediate_size=32, tied=True),
    Variant("yarn", all_of(Type.F16), hidden_size=64, num_heads=1, rope_theta=1e4, tied=True,
            original_context=64),
]


def byte_letters():
    """GPT-2's printable stand-in for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters, extra = {}, 0
    for byte in range(256):
        letters[byte] = chr(byte) if byte in plain else chr(256 + extra)
        extra += byte not in plain
    return letters


def vocabulary(variant):
    tokens = list(byte_letters().values()) + [merge.replace(" ", "") for merge in MERGES]
    types = [gguf.TokenType.NORMAL] * len(tokens)
    tokens += CONTROL + USER_DEFINED
    types += [gguf.TokenType.CONTROL] * len(CONTROL)
    types += [gguf.TokenType.USER_DEFINED] * len(USER_DEFINED)
    tokens += [f"[PAD{len(tokens) + i}]" for i in range(variant.num_padding_tokens)]
    types += [gguf.TokenType.UNUSED] * variant.num_padding_tokens
    return tokens, types


def reference_tokenizer():
    tokens, _ = vocabulary(VARIANTS[0])
    num_plain = len(tokens) - NUM_SPECIAL
    vocab = {token: index for index, token in enumerate(tokens[:num_plain])}
    merges = [tuple(merge.split(" ")) for merge in MERGES]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([
        AddedToken(token, normalized=False, special=token in CONTROL)
        for token in tokens[num_plain:]
    ])
    return tokenizer


def random_k_quants(rng, kind, shape):
    """Random valid blocks of a k-quant (the gguf package reads these types but cannot write them).

    Their scales are random, so every field of the block matters for the result.
    """
    block_size, type_size = gguf.GGML_QUANT_SIZES[kind]
    num_blocks = shape[0] * shape[1] // block_size
    blocks = rng.integers(0, 256, size=(num_blocks, type_size), dtype=np.uint8)
    # Where the f16 factors stand, and the offset factor that centres the values on zero.
    at, offset = {
        Type.Q2_K: ((80, 82), 1.5),
        Type.Q3_K: ((108,), None),
        Type.Q4_K: ((0, 2), 7.5),
        Type.Q5_K: ((0, 2), 15.5),
        Type.Q6_K: ((208,), None),
    }[kind]

    def set_factor(position, factors):
        blocks[:, position:position + 2] = factors.astype("<f2").view(np.uint8).reshape(-1, 2)

    def set_factors(scale):
        factors = scale * rng.uniform(0.8, 1.2, size=num_blocks)
        set_factor(at[0], factors)
        if offset is not None:
            set_factor(at[1], factors * offset)

    set_factors(np.float64(1.0 / 64))
    unscaled = gguf.quants.dequantize(blocks, kind)
    set_factors(1.0 / 64 / unscaled.std() / np.sqrt(shape[1]))
    data = blocks.reshape(shape[0], -1)
    return data, gguf.quants.dequantize(data, kind).reshape(shape)


def random_tensors(variant):
    """GGUF name -> (bytes as stored, type, float32 values), in the order of the file."""
    rng = np.random.default_rng([ord(letter) for letter in variant.name])
    hidden, inner = variant.hidden_size, variant.intermediate_size
    head_dim = variant.head_width
    query, kv = variant.num_heads * head_dim, variant.num_kv_heads * head_dim
    vocab_size = len(vocabulary(variant)[0])
    tensors = {}

    def vector(name, values):
        values = values.astype(np.float32)
        tensors[name] = (values, Type.F32, values)

    def experts(name, rows, cols, gain=1.0):
        """One matrix an expert, in one tensor."""
        kind = next(kind for ending, kind in variant.types if name.endswith(ending))
        shape = (variant.num_experts, rows, cols)
        wanted = rng.normal(0, gain / np.sqrt(cols), shape).astype(np.float32)
        data = gguf.quants.quantize(wanted, kind)
        values = gguf.quants.dequantize(data, kind).reshape(shape)
        tensors[name] = (data, kind, np.ascontiguousarray(values, dtype=np.float32))

    def matrix(name, rows, cols, gain=1.0):
        kind = next(kind for ending, kind in variant.types if name.endswith(ending))
        if kind in (Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K):
            data, values = random_k_quants(rng, kind, (rows, cols))
        else:
            wanted = rng.normal(0, gain / np.sqrt(cols), (rows, cols)).astype(np.float32)
            data = gguf.quants.quantize(wanted, kind)
            values = gguf.quants.dequantize(data, kind).reshape(rows, cols)
        tensors[name] = (data, kind, np.ascontiguousarray(values, dtype=np.float32))

    matrix("token_embd.weight", vocab_size, hidden, gain=2.0)
    for layer in range(variant.num_layers):
        prefix = f"blk.{layer}."
        has_biases = variant.architecture.startswith("qwen2")
        vector(prefix + "attn_norm.weight", rng.normal(1, 0.2, hidden))
        matrix(prefix + "attn_q.weight", query, hidden, gain=2.5)
        if has_biases:
            vector(prefix + "attn_q.bias", rng.normal(0, 0.5, query))
        matrix(prefix + "attn_k.weight", kv, hidden, gain=2.5)
        if has_biases:
            vector(prefix + "attn_k.bias", rng.normal(0, 0.5, kv))
        matrix(prefix + "attn_v.weight", kv, hidden)
        if has_biases:
            vector(prefix + "attn_v.bias", rng.normal(0, 0.1, kv))
        else:
            vector(prefix + "attn_q_norm.weight", rng.normal(1.5, 0.4, head_dim))
            vector(prefix + "attn_k_norm.weight", rng.normal(1.5, 0.4, head_dim))
        matrix(prefix + "attn_output.weight", hidden, query)
        vector(prefix + "ffn_norm.weight", rng.normal(1, 0.2, hidden))
        if variant.is_sparse(layer):
            wide = variant.moe_intermediate_size
            matrix(prefix + "ffn_gate_inp.weight", variant.num_experts, hidden, gain=2.0)
            experts(prefix + "ffn_gate_exps.weight", wide, hidden)
            experts(prefix + "ffn_up_exps.weight", wide, hidden)
            experts(prefix + "ffn_down_exps.weight", hidden, wide, gain=4.0)
            shared = variant.shared_intermediate_size
            if shared:
                vector(prefix + "ffn_gate_inp_shexp.weight", rng.normal(0, 0.3, hidden))
                matrix(prefix + "ffn_gate_shexp.weight", shared, hidden)
                matrix(prefix + "ffn_up_shexp.weight", shared, hidden)
                matrix(prefix + "ffn_down_shexp.weight", hidden, shared, gain=4.0)
            continue
        matrix(prefix + "ffn_gate.weight", inner, hidden)
        matrix(prefix + "ffn_up.weight", inner, hidden)
        matrix(prefix + "ffn_down.weight", hidden, inner, gain=4.0)
    vector("output_norm.weight", rng.normal(1, 0.2, hidden))
    if not variant.tied:
        matrix("output.weight", vocab_size, hidden, gain=2.0)
    return tensors


def write_gguf(variant, tensors, path):
    writer = gguf.GGUFWriter(path, variant.architecture)
    writer.add_name(f"tiny {variant.name}")
    writer.add_block_count(variant.num_layers)
    writer.add_context_length(variant.context_length)
    writer.add_embedding_length(variant.hidden_size)
    writer.add_feed_forward_length(variant.intermediate_size)
    writer.add_head_count(variant.num_heads)
    writer.add_head_count_kv(variant.num_kv_heads)
    writer.add_rope_freq_base(variant.rope_theta)
    writer.add_layer_norm_rms_eps(1e-6)
    if variant.head_dim:
        writer.add_key_length(variant.head_dim)
        writer.add_value_length(variant.head_dim)
    if variant.num_experts:
        writer.add_expert_count(variant.num_experts)
        writer.add_expert_used_count(variant.num_experts_per_tok)
        writer.add_expert_feed_forward_length(variant.moe_intermediate_size)
    if variant.shared_intermediate_size:
        writer.add_expert_shared_feed_forward_length(variant.shared_intermediate_size)
    if variant.original_context:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(YARN_FACTOR)
        writer.add_rope_scaling_orig_ctx_len(variant.original_context)
    tokens, types = vocabulary(variant)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_pad_token_id(tokens.index("<|endoftext|>"))
    writer.add_bos_token_id(tokens.index("<|endoftext|>"))
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)
    for name, (data, kind, _) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def hugging_face_name(name):
    if not name.startswith("blk."):
        return {
            "token_embd.weight": "model.embed_tokens.weight",
            "output_norm.weight": "model.norm.weight",
            "output.weight": "lm_head.weight",
        }[name]
    _, layer, part, kind = name.split(".")
    part = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "ffn_gate_inp": "mlp.gate",
        "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
        "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
        "ffn_up_shexp": "mlp.shared_expert.up_proj",
        "ffn_down_shexp": "mlp.shared_expert.down_proj",
    }[part]
    return f"model.layers.{layer}.{part}.{kind}"


def reference_state(variant, tensors):
    """The parameters under transformers' names, which have gates and ups of all experts in one."""
    state = {}
    for name, (_, _, values) in tensors.items():
        values = torch.from_numpy(values.copy())
        if "_exps." not in name:
            name = hugging_face_name(name)
            state[name] = values.reshape(1, -1) if "shared_expert_gate" in name else values
    for layer in filter(variant.is_sparse, range(variant.num_layers)):
        gate, up, down = (torch.from_numpy(tensors[f"blk.{layer}.ffn_{part}_exps.weight"][2].copy())
                          for part in ("gate", "up", "down"))
        prefix = f"model.layers.{layer}.mlp.experts."
        state[prefix + "gate_up_proj"] = torch.cat([gate, up], dim=1)
        state[prefix + "down_proj"] = down
    if variant.tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return state


def reference_model(variant, tensors, is_stretched):
    class_name = {"qwen2": "Qwen2", "qwen3": "Qwen3", "qwen2moe": "Qwen2Moe",
                  "qwen3moe": "Qwen3Moe"}[variant.architecture]
    rope = {"rope_type": "default", "rope_theta": variant.rope_theta}
    if is_stretched:
        rope |= {"rope_type": "yarn", "factor": float(YARN_FACTOR),
                 "original_max_position_embeddings": variant.original_context}
    options = {}
    if variant.num_experts:
        options = dict(
            num_experts=variant.num_experts,
            num_experts_per_tok=variant.num_experts_per_tok,
            moe_intermediate_size=variant.moe_intermediate_size,
            norm_topk_prob=variant.architecture == "qwen3moe",
            decoder_sparse_step=1,
            mlp_only_layers=list(variant.dense_layers),
            experts_implementation="eager",
        )
    if variant.shared_intermediate_size:
        options |= dict(shared_expert_intermediate_size=variant.shared_intermediate_size)
    if variant.head_dim:
        options |= dict(head_dim=variant.head_dim)
    config = getattr(transformers, class_name + "Config")(
        vocab_size=len(vocabulary(variant)[0]),
        hidden_size=variant.hidden_size,
        intermediate_size=variant.intermediate_size,
        num_hidden_layers=variant.num_layers,
        num_attention_heads=variant.num_heads,
        num_key_value_heads=variant.num_kv_heads,
        max_position_embeddings=variant.context_length,
        rms_norm_eps=1e-6,
        rope_parameters=rope,
        tie_word_embeddings=variant.tied,
        use_sliding_window=False,
        attn_implementation="eager",
        **options,
    )
    model = getattr(transformers, class_name + "ForCausalLM")(config).float().eval()
    state = reference_state(variant, tensors)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all("inv_freq" in name for name in missing), (missing, unexpected)
    return model


def digits(values):
    return [float(f"{value:.6g}") for value in values]


def golden(model, prompt_ids, every_position):
    """Logits after the prompt (or after each of its tokens), log-probabilities of its tokens, and
    the greedy continuation with the distance between the two best logits of each step."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt_ids])).logits[0]
        logprobs = torch.log_softmax(logits, dim=-1)
        ids, margins = [], []
        for _ in range(NUM_GREEDY):
            last = model(torch.tensor([prompt_ids + ids])).logits[0, -1]
            best = torch.topk(last, 2)
            ids.append(int(best.indices[0]))
            margins.append(float(best.values[0] - best.values[1]))
    shown = logits if every_position else logits[-1:]
    return {
        "prompt_ids": prompt_ids,
        "first_logits_position": len(prompt_ids) - len(shown),
        "logits": [digits(row.tolist()) for row in shown],
        "prompt_logprobs": digits(
            logprobs[i, prompt_ids[i + 1]].item() for i in range(len(prompt_ids) - 1)),
        "greedy_ids": ids,
        "greedy_margins": digits(margins),
    }


def prompts():
    """Token ids, and whether the logits of every position are wanted."""
    rng = np.random.default_rng(1)
    tokenizer = reference_tokenizer()
    return [
        ([65], False),
        (tokenizer.encode(TEXTS[0]).ids[:6], True),
        (rng.integers(0, 266, 40).tolist(), False),
        # Longer than several cache blocks, and no multiple of their size.
        (rng.integers(0, 266, 173).tolist(), False),
    ]


def write_golden(name, goldens):
    text = json.dumps(goldens).replace('], "', '],\n "').replace('}, {', '},\n{')
    (OUT / f"{name}.json").write_text(text + "\n")


def generate(variant):
    tensors = random_tensors(variant)
    path = OUT / f"{variant.name}.gguf"
    write_gguf(variant, tensors, path)
    model = reference_model(variant, tensors, is_stretched=False)
    # Positions are stretched for texts only that would not do without.
    stretched = reference_model(variant, tensors, True) if variant.original_context else model
    goldens = {
        "checkpoint": path.name,
        "engine": "transformers, float32, eager, on the dequantised weights",
        "hidden_size": variant.hidden_size,
        "num_attention_heads": variant.num_heads,
        "num_key_value_heads": variant.num_kv_heads,
        "num_hidden_layers": variant.num_layers,
        "architecture": variant.architecture,
        "tie_word_embeddings": variant.tied,
        "vocab_size": len(vocabulary(variant)[0]),
        "prompts": [
            golden(model if len(ids) + NUM_GREEDY <= variant.original_context else stretched, ids,
                   every_position)
            for ids, every_position in prompts()
        ],
    }
    write_golden(variant.name, goldens)
    margins = [m for prompt in goldens["prompts"] for m in prompt["greedy_margins"]]
    print(f"{variant.name}: {path.stat().st_size} bytes, smallest greedy margin {min(margins):.4f}")


def generate_tokenization():
    tokenizer = reference_tokenizer()
    cases = [{"text": text, "ids": tokenizer.encode(text).ids} for text in TEXTS]
    for case in cases:
        case["decoded"] = tokenizer.decode(case["ids"], skip_special_tokens=True)
    path = OUT / "tokenization.json"
    path.write_text(json.dumps(cases, ensure_ascii=False, indent=1) + "\n")


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    wanted = sys.argv[1:]
    if not wanted:
        generate_tokenization()
    for variant in VARIANTS:
        if not wanted or variant.name in wanted:
            generate(variant)


if __name__ == "__main__":
    main()
