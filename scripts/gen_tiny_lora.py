"""Writes models/tiny/lora-*: small random adapters as PEFT saves them, each beside what transformers
and PEFT compute with it in float32 on one of the tiny repositories.

usage: python scripts/gen_tiny_lora.py [NAME...]     needs: what scripts/gen_tiny.py needs, and peft

Weights are rounded to the type they are stored in first, so that the golden is of what is stored.
"""

import json
import shutil
import sys
from dataclasses import dataclass, field

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import gen_tiny
from gen_tiny import OUT

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Adapter:
    """One adapter of a repository."""

    name: str
    base: str
    dtype: torch.dtype
    options: dict = field(default_factory=dict)


ADAPTERS = [
    Adapter("lora-qwen2-all", "hf-sharded", torch.float32, dict(r=4, lora_alpha=8, target_modules=ALL)),
    Adapter("lora-qwen2-patterns", "hf-sharded", torch.bfloat16, dict(
        r=8, lora_alpha=4, use_rslora=True, target_modules=["q_proj", "v_proj", "down_proj"],
        rank_pattern={"v_proj": 3}, alpha_pattern={"layers.1.self_attn.q_proj": 10})),
    Adapter("lora-qwen3-all", "hf-qwen3", torch.float16, dict(
        r=3, lora_alpha=6, target_modules="all-linear")),
    Adapter("lora-qwen3-layer", "hf-qwen3", torch.bfloat16, dict(
        r=5, lora_alpha=10, target_modules=["o_proj", "gate_proj", "up_proj"], layers_to_transform=[1])),
    Adapter("lora-qwen2moe", "hf-qwen2moe", torch.bfloat16, dict(
        r=4, lora_alpha=8, target_modules=r".*self_attn\.[qkvo]_proj")),
]


def fill(model, dtype):
    """Random matrices, as the type stores them. PEFT begins with zeros in B, which change nothing."""
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                size = 0.3 if ".lora_A." in name else 0.12
                parameter.copy_((torch.randn(parameter.shape) * size).to(dtype).float())


def generate(adapter):
    torch.manual_seed(len(adapter.name))
    base = AutoModelForCausalLM.from_pretrained(
        OUT / adapter.base, dtype=torch.float32, attn_implementation="eager").eval()
    base.name_or_path = base.config.name_or_path = f"tiny {adapter.base}"
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **adapter.options)).eval()
    fill(model, adapter.dtype)
    goldens = {
        "checkpoint": adapter.name,
        "engine": "transformers and PEFT, float32, eager",
        "prompts": [gen_tiny.golden(model, ids, every) for ids, every in gen_tiny.prompts()],
    }
    gen_tiny.write_golden(adapter.name, goldens)
    folder = OUT / adapter.name
    shutil.rmtree(folder, ignore_errors=True)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapter.dtype)
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    config = folder / "adapter_config.json"
    settings = json.loads(config.read_text())
    if isinstance(settings["target_modules"], list):
        settings["target_modules"].sort()
    config.write_text(json.dumps(settings, indent=1, sort_keys=True) + "\n")
    for file in folder.iterdir():
        file.chmod(0o644)
    margins = [margin for prompt in goldens["prompts"] for margin in prompt["greedy_margins"]]
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{adapter.name}: {size} bytes, smallest greedy margin {min(margins):.4f}")


def main():
    wanted = sys.argv[1:]
    for adapter in ADAPTERS:
        if not wanted or adapter.name in wanted:
            generate(adapter)


if __name__ == "__main__":
    main()
