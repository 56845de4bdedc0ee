"""Writes models/tiny/hf-128k: a small random Qwen2 with YaRN for 131,072 positions, and what transformers says at the end
of texts of 32,769 to 131,071 tokens.

usage: python scripts/gen_long_context.py     needs: what scripts/gen_tiny_hf.py needs for Qwen3; ten minutes

Attention is sharp, so that an answer hangs on few tokens and on exactly where they are: the script ends with an error
unless a text whose second half is one position off, or not stretched, says something else entirely.
"""

import json
import sys

import torch
from transformers import AttentionInterface, AttentionMaskInterface, Qwen2Config, Qwen2ForCausalLM

import gen_tiny_hf
from gen_tiny import OUT

NAME = "hf-128k"
CONTEXT = 131_072
LENGTHS = [32_769, 65_537, 100_000, CONTEXT - 1]


CHUNK = 512


def attend(module, query, key, value, attention_mask, scaling, **_):
    """Causal attention by its definition, some queries at a time: a mask of all pairs would take 17 GB."""
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    outputs = []
    for start in range(0, query.shape[2], CHUNK):
        end = min(start + CHUNK, query.shape[2])
        scores = query[:, :, start:end] @ key[:, :, :end].transpose(2, 3) * scaling
        later = torch.arange(end) > torch.arange(start, end)[:, None]
        outputs.append(scores.masked_fill_(later, float("-inf")).softmax(-1) @ value[:, :, :end])
    return torch.cat(outputs, dim=2).transpose(1, 2), None


AttentionInterface.register("chunked", attend)
AttentionMaskInterface.register("chunked", lambda *_, **__: None)


def prompt(length):
    """Ids that a test can write down in one line."""
    return [(i * i // 7 + i * 31) % 250 for i in range(length)]


def main():
    torch.manual_seed(128)
    config = Qwen2Config(
        vocab_size=288, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=CONTEXT, initializer_range=0.25, rms_norm_eps=1e-6,
        tie_word_embeddings=False, attn_implementation="chunked", dtype="float32",
        rope_parameters={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768,
                         "rope_theta": 1e6},
    )
    model = Qwen2ForCausalLM(config).eval()
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= 1.6
        layer.self_attn.k_proj.weight.data *= 1.6
    folder = OUT / NAME
    folder.mkdir(exist_ok=True)
    model.save_pretrained(folder)
    gen_tiny_hf.write_text_side(NAME, folder)

    ids = torch.tensor([prompt(LENGTHS[-1])])
    ends = torch.tensor([length - 1 for length in LENGTHS])

    @torch.no_grad()
    def logprobs(**how):
        return model(ids, use_cache=False, logits_to_keep=ends, **how).logits[0].log_softmax(-1)

    expected = logprobs()
    positions = torch.arange(ids.shape[1])
    positions[positions >= ids.shape[1] // 2] += 1
    shifted = logprobs(position_ids=positions[None])
    difference = (shifted - expected).abs().amax(-1)
    print("one position off from the middle on:", difference.tolist())
    plain = model.model.rotary_emb
    model.model.rotary_emb = type(plain)(Qwen2Config(**config.to_dict() | {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}))
    unstretched = (logprobs() - expected).abs().amax(-1)
    print("not stretched:", unstretched.tolist())
    if difference[2:].min() < 0.1 or unstretched.min() < 0.1:
        sys.exit("positions hardly matter to this model; make its attention sharper")
    golden = {"lengths": LENGTHS, "logprobs": [[round(value, 5) for value in row] for row in expected.tolist()]}
    (OUT / f"{NAME}.json").write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    main()
