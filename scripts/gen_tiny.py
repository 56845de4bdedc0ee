"""Writes models/tiny: small random Qwen2 checkpoints as GGUF, and what transformers says of them.

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
from transformers import Qwen2Config, Qwen2ForCausalLM

OUT = pathlib.Path(__file__).resolve().parent.parent / "models" / "tiny"
CONTEXT_LENGTH = 512
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
    head_dim = hidden // variant.num_heads
    kv = variant.num_kv_heads * head_dim
    vocab_size = len(vocabulary(variant)[0])
    tensors = {}

    def vector(name, values):
        values = values.astype(np.float32)
        tensors[name] = (values, Type.F32, values)

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
        vector(prefix + "attn_norm.weight", rng.normal(1, 0.2, hidden))
        matrix(prefix + "attn_q.weight", hidden, hidden, gain=2.5)
        vector(prefix + "attn_q.bias", rng.normal(0, 0.5, hidden))
        matrix(prefix + "attn_k.weight", kv, hidden, gain=2.5)
        vector(prefix + "attn_k.bias", rng.normal(0, 0.5, kv))
        matrix(prefix + "attn_v.weight", kv, hidden)
        vector(prefix + "attn_v.bias", rng.normal(0, 0.1, kv))
        matrix(prefix + "attn_output.weight", hidden, hidden)
        vector(prefix + "ffn_norm.weight", rng.normal(1, 0.2, hidden))
        matrix(prefix + "ffn_gate.weight", inner, hidden)
        matrix(prefix + "ffn_up.weight", inner, hidden)
        matrix(prefix + "ffn_down.weight", hidden, inner, gain=4.0)
    vector("output_norm.weight", rng.normal(1, 0.2, hidden))
    if not variant.tied:
        matrix("output.weight", vocab_size, hidden, gain=2.0)
    return tensors


def write_gguf(variant, tensors, path):
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_name(f"tiny {variant.name}")
    writer.add_block_count(variant.num_layers)
    writer.add_context_length(CONTEXT_LENGTH)
    writer.add_embedding_length(variant.hidden_size)
    writer.add_feed_forward_length(variant.intermediate_size)
    writer.add_head_count(variant.num_heads)
    writer.add_head_count_kv(variant.num_kv_heads)
    writer.add_rope_freq_base(variant.rope_theta)
    writer.add_layer_norm_rms_eps(1e-6)
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
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }[part]
    return f"model.layers.{layer}.{part}.{kind}"


def reference_model(variant, tensors):
    config = Qwen2Config(
        vocab_size=len(vocabulary(variant)[0]),
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
    )
    model = Qwen2ForCausalLM(config).float().eval()
    state = {hugging_face_name(name): torch.from_numpy(values.copy())
             for name, (_, _, values) in tensors.items()}
    if variant.tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
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
    model = reference_model(variant, tensors)
    goldens = {
        "checkpoint": path.name,
        "engine": "transformers, float32, eager, on the dequantised weights",
        "hidden_size": variant.hidden_size,
        "num_attention_heads": variant.num_heads,
        "num_key_value_heads": variant.num_kv_heads,
        "num_hidden_layers": variant.num_layers,
        "tie_word_embeddings": variant.tied,
        "vocab_size": len(vocabulary(variant)[0]),
        "prompts": [golden(model, ids, every_position) for ids, every_position in prompts()],
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
    generate_tokenization()
    for variant in VARIANTS:
        if not wanted or variant.name in wanted:
            generate(variant)


if __name__ == "__main__":
    main()
