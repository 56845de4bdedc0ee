"""A small GGUF writer, and models to measure and compare with. Needs nothing but Python.

`random_qwen2` also needs torch and transformers: it makes a Qwen2 model, saves it as GGUF and says what
transformers computes from it.
"""

import struct

F32, F16, BF16 = 0, 1, 30
ALIGNMENT = 32

CONTROL = """<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|>
<|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|>
<|video_pad|> <tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|>
<|repo_name|> <|file_sep|>""".split()
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def _text(value):
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value):
    """A metadata value with its type: a pair (type, value), or a string, float, list or number."""
    if isinstance(value, bool):
        return struct.pack("<IB", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    if value and isinstance(value[0], int):
        return struct.pack("<IIQ", 9, 5, len(value)) + struct.pack(f"<{len(value)}i", *value)
    return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_text, value))


def write_gguf(path, metadata, tensors):
    """`tensors` are (name, shape with the outermost dimension first, type, bytes or None for a hole)."""
    sizes = {F32: 4, F16: 2, BF16: 2}
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, value in metadata.items():
        header += _text(key) + _value(value)
    offset, places = 0, []
    for name, shape, kind, _ in tensors:
        num_bytes = sizes[kind]
        for size in shape:
            num_bytes *= size
        header += _text(name) + struct.pack("<I", len(shape))
        header += struct.pack(f"<{len(shape)}Q", *reversed(shape)) + struct.pack("<IQ", kind, offset)
        places.append((offset, num_bytes))
        offset += (num_bytes + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
    header += bytes(-len(header) % ALIGNMENT)
    with open(path, "wb") as file:
        file.write(header)
        for (name, _, _, data), (start, num_bytes) in zip(tensors, places):
            if data is not None:
                assert len(data) == num_bytes, name
                file.seek(len(header) + start)
                file.write(data)
        file.truncate(len(header) + offset)


def vocabulary(size):
    """Every byte, then made-up tokens, then Qwen's special ones."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    tokens = [chr(code) for code in printable] + [chr(256 + i) for i in range(68)]
    tokens += [f"<{i}>" for i in range(256, size - len(CONTROL))] + CONTROL
    types = [1] * (size - len(CONTROL)) + [3] * len(CONTROL)
    return tokens, types


def metadata(hidden_size, num_heads, num_kv_heads, intermediate_size, num_layers, vocab_size, theta=1e6):
    tokens, types = vocabulary(vocab_size)
    end = vocab_size - len(CONTROL)
    return {
        "general.architecture": "qwen2",
        "general.name": "random",
        "qwen2.block_count": num_layers,
        "qwen2.context_length": 4096,
        "qwen2.embedding_length": hidden_size,
        "qwen2.feed_forward_length": intermediate_size,
        "qwen2.attention.head_count": num_heads,
        "qwen2.attention.head_count_kv": num_kv_heads,
        "qwen2.rope.freq_base": float(theta),
        "qwen2.attention.layer_norm_rms_epsilon": 1e-6,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.eos_token_id": end + 2,
        "tokenizer.ggml.padding_token_id": end,
        "tokenizer.ggml.bos_token_id": end,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def write_one_layer(path):
    """A layer, and the vocabulary of the real models: its steps are little but what the host does."""
    hidden, heads, kv_heads, intermediate, vocab = 256, 4, 2, 512, 151_936
    query, key = 64 * heads, 64 * kv_heads
    tensors = [
        ("token_embd.weight", (vocab, hidden), BF16, None),
        ("output_norm.weight", (hidden,), F32, None),
        ("blk.0.attn_norm.weight", (hidden,), F32, None),
        ("blk.0.ffn_norm.weight", (hidden,), F32, None),
        ("blk.0.attn_q.weight", (query, hidden), BF16, None),
        ("blk.0.attn_k.weight", (key, hidden), BF16, None),
        ("blk.0.attn_v.weight", (key, hidden), BF16, None),
        ("blk.0.attn_q.bias", (query,), F32, None),
        ("blk.0.attn_k.bias", (key,), F32, None),
        ("blk.0.attn_v.bias", (key,), F32, None),
        ("blk.0.attn_output.weight", (hidden, query), BF16, None),
        ("blk.0.ffn_gate.weight", (intermediate, hidden), BF16, None),
        ("blk.0.ffn_up.weight", (intermediate, hidden), BF16, None),
        ("blk.0.ffn_down.weight", (hidden, intermediate), BF16, None),
    ]
    write_gguf(path, metadata(hidden, heads, kv_heads, intermediate, 1, vocab), tensors)


# Hugging Face's names and GGUF's.
NAMES = [
    ("model.embed_tokens.", "token_embd."),
    ("model.norm.", "output_norm."),
    ("lm_head.", "output."),
    ("model.layers.", "blk."),
    ("input_layernorm.", "attn_norm."),
    ("post_attention_layernorm.", "ffn_norm."),
    ("self_attn.q_proj.", "attn_q."),
    ("self_attn.k_proj.", "attn_k."),
    ("self_attn.v_proj.", "attn_v."),
    ("self_attn.o_proj.", "attn_output."),
    ("mlp.gate_proj.", "ffn_gate."),
    ("mlp.up_proj.", "ffn_up."),
    ("mlp.down_proj.", "ffn_down."),
]


def random_qwen2(path, dtype, num_greedy=16):
    """Saves a random model with matrices of `dtype` ("f16" or "bf16") and returns what transformers, in
    32-bit floats and with the same rounded matrices, says of three prompts."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(7)
    vocab = 2048
    config = Qwen2Config(
        vocab_size=vocab, hidden_size=512, intermediate_size=1536, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=4096,
        rms_norm_eps=1e-6, tie_word_embeddings=False, use_sliding_window=False,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Qwen2ForCausalLM(config).float().eval().to(device)
    half = torch.float16 if dtype == "f16" else torch.bfloat16
    kind = F16 if dtype == "f16" else BF16
    tensors = []
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                # Logits of a few units, so that some tokens are clearly more likely than others.
                gain = 2.5 if name.startswith(("lm_head", "model.embed_tokens")) else 1.0
                parameter.normal_(0.0, gain * parameter.shape[1] ** -0.5)
                parameter.copy_(parameter.to(half).float())
                data = parameter.to(half).view(torch.int16).contiguous()
            else:
                around = 1.0 if "norm" in name else 0.0
                parameter.normal_(around, 0.1)
                data = parameter.contiguous()
            gguf_name = name
            for theirs, ours in NAMES:
                gguf_name = gguf_name.replace(theirs, ours)
            is_matrix = parameter.dim() == 2
            tensors.append(
                (gguf_name, tuple(parameter.shape), kind if is_matrix else F32, bytes_of(data))
            )
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    theta = parameters.get("rope_theta") or getattr(config, "rope_theta", 10_000.0)
    write_gguf(path, metadata(512, 8, 2, 1536, 4, vocab, theta), tensors)
    prompts = [[(i * 37 + 11 * n) % (vocab - 30) for i in range(length)]
               for n, length in enumerate((5, 64, 200))]
    return [reference(model, prompt, num_greedy) for prompt in prompts]


def bytes_of(tensor):
    import ctypes

    size = tensor.numel() * tensor.element_size()
    return ctypes.string_at(tensor.cpu().data_ptr(), size)


def reference(model, prompt, num_greedy):
    """Log-probabilities of the prompt's tokens and of greedy ones, and how clear each of these was."""
    import torch

    ids = list(prompt)
    greedy, margins = [], []
    with torch.no_grad():
        for _ in range(num_greedy):
            logits = model(torch.tensor([ids], device=model.device)).logits[0]
            best = torch.topk(logits[-1], 2)
            greedy.append(int(best.indices[0]))
            margins.append(float(best.values[0] - best.values[1]))
            ids.append(greedy[-1])
        logprobs = torch.log_softmax(logits.double(), -1)
    logprobs = [float(logprobs[i, ids[i + 1]]) for i in range(len(ids) - 2)]
    return {"prompt": prompt, "greedy": greedy, "margins": margins, "logprobs": logprobs}
