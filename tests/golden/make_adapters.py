"""Makes adapters.npz: LoRA adapters that peft made on tiny random models, and what they compute with peft.

    python -m venv peer
    peer/bin/pip install torch==2.13.0 transformers==5.23.0 peft==0.21.2 safetensors
    peer/bin/python tests/golden/make_adapters.py

Under CASE/ stand: config and weights (config.json and model.safetensors of the base, as bytes), adapter_config and
adapter_weights (as save_pretrained of peft writes them, as bytes), tokens int64[B, S], and logits [B, S, V], or of a
classifier scores [B]. Adapters are random in A and B, weights multiples of 1/32.

With a directory as argument it is the other way round: reads the models that rlhf-jax wrote in its folders (base with
config.json, model with the adapter, inputs.npy) and writes outputs.npy, what peft computes with base and adapter.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.utils import logging


class Case(NamedTuple):
    """A model's config.json and the settings of its adapter."""

    settings: dict[str, Any]
    adapter: dict[str, Any]
    save: dict[str, Any] = {}  # noqa: RUF012 (of save_pretrained)


LLAMA = {
    "model_type": "llama", "vocab_size": 24, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32, "tie_word_embeddings": True,
}  # fmt: skip
GPT2 = {
    "model_type": "gpt2", "vocab_size": 24, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32,
    "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0,
}  # fmt: skip
NEOX = {
    "model_type": "gpt_neox", "vocab_size": 24, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
SCORE = {"num_labels": 1, "pad_token_id": 0}
UNTIED, BARE = {"tie_word_embeddings": False}, {"save_embedding_layers": False}
CASES = {
    "llama": Case(LLAMA, {"target_modules": "all-linear", "r": 3, "lora_alpha": 5}),
    "patterns": Case(LLAMA, {
        "target_modules": ["q_proj", "v_proj", "mlp.down_proj"], "r": 2, "lora_alpha": 6, "use_rslora": True,
        "rank_pattern": {"v_proj": 4}, "alpha_pattern": {"layers.1.mlp.down_proj": 3},
    }),
    "gpt2": Case(GPT2, {
        "target_modules": ["c_attn", "c_proj", "c_fc"], "r": 3, "lora_alpha": 5, "fan_in_fan_out": True,
    }),
    "score": Case(LLAMA | SCORE, {
        "task_type": "SEQ_CLS", "target_modules": ["q_proj", "o_proj"], "r": 2, "lora_alpha": 4,
        "modules_to_save": ["score"],
    }),
    # Of a tied pair PEFT gives one alone new weights, unless it is told to keep them tied.
    "embedding": Case(LLAMA, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "embedding_tied": Case(LLAMA, {
        "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True,
    }),
    "head_pair": Case(LLAMA, {"target_modules": ["lm_head"], "modules_to_save": ["embed_tokens"], "r": 3}),
    "table": Case(LLAMA, {"target_modules": ["embed_tokens", "q_proj"], "r": 3, "lora_alpha": 5}),
    "table_tied": Case(GPT2, {"target_modules": ["wte", "wpe"], "ensure_weight_tying": True, "r": 2}),
    "table_bound": Case(LLAMA, {"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True, "r": 2}, BARE),
    "gpt2_table": Case(GPT2, {"target_modules": ["c_attn"], "modules_to_save": ["wte"], "ensure_weight_tying": True}),
    # A weight that is named as a parameter gets its pair as it lies, also that of Conv1D.
    "weights": Case(LLAMA, {
        "target_modules": ["q_proj"], "target_parameters": ["mlp.up_proj.weight", "layers.1.mlp.down_proj.weight"],
        "r": 2, "lora_alpha": 6, "alpha_pattern": {"up_proj.weight": 3, "mlp.down_proj": 5},
    }),
    "gpt2_weights": Case(GPT2, {
        "target_modules": [], "target_parameters": ["attn.c_proj.weight", "c_fc.weight"], "exclude_modules": ["c_fc"],
    }),
    # fan_in_fan_out is saved as it was right for the last layer, the head, though c_proj is Conv1D and square.
    "gpt2_head": Case(GPT2 | UNTIED, {"target_modules": ["attn.c_proj", "lm_head"], "r": 2}, BARE),
    "gpt2_tied": Case(GPT2, {"target_modules": ["attn.c_proj", "lm_head"], "modules_to_save": ["wpe", "wte"]}),
    "neox_head": Case(NEOX | UNTIED, {"target_modules": ["dense"], "modules_to_save": ["lm_head"]}),
    "neox_pair": Case(NEOX, {"target_modules": ["dense", "lm_head"], "alpha_pattern": {"lm_head": 5}, "r": 2}, BARE),
}  # fmt: skip


def as_array(data: bytes) -> np.ndarray:
    """Bytes as an array."""
    return np.frombuffer(data, np.uint8)


def make_case(case: Case, folder: Path) -> dict[str, np.ndarray]:
    """All arrays of one case, keys without the case."""
    config = AutoConfig.for_model(**case.settings)
    kind = AutoModelForSequenceClassification if "num_labels" in case.settings else AutoModelForCausalLM
    model = kind.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randint(-16, 17, weight.shape) / 32 + (weight.ndim == 1))
    model.save_pretrained(folder / "base")
    adapted = get_peft_model(model, LoraConfig(init_lora_weights=False, **case.adapter)).eval()
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                weight.copy_(torch.randint(-16, 17, weight.shape) / 32)
        tokens = torch.randint(1, 24, (3, 9))
        found = adapted(input_ids=tokens).logits.numpy()
    adapted.save_pretrained(folder / "adapter", **case.save)
    files = {"config": "base/config.json", "weights": "base/model.safetensors",
             "adapter_config": "adapter/adapter_config.json",
             "adapter_weights": "adapter/adapter_model.safetensors"}  # fmt: skip
    arrays = {name: as_array((folder / file).read_bytes()) for name, file in files.items()}
    result = {"scores": found[:, 0]} if "num_labels" in case.settings else {"logits": found}
    return arrays | result | {"tokens": tokens.numpy()}


def write() -> None:
    """Make all cases and write the file."""
    arrays = {}
    for name, case in CASES.items():
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            arrays |= {f"{name}/{key}": array for key, array in make_case(case, Path(folder)).items()}
    target = Path(__file__).with_name("adapters.npz")
    np.savez_compressed(target, **arrays)
    print(f"{target.name}: {target.stat().st_size} bytes")


def read_back(folder: Path) -> None:
    """What peft computes with the base that the adapter of rlhf-jax in `folder`/model names."""
    where = folder / "model" / "adapter"
    raw = json.loads((where / "adapter_config.json").read_text())
    kind, more = AutoModelForCausalLM, {}
    if raw["task_type"] == "SEQ_CLS":
        kind, more = AutoModelForSequenceClassification, SCORE
    base = kind.from_pretrained(raw["base_model_name_or_path"], experts_implementation="eager", **more)
    model = PeftModel.from_pretrained(base, where).eval()
    with torch.no_grad():
        found = model(input_ids=torch.from_numpy(np.load(folder / "inputs.npy")).long()).logits
    np.save(folder / "outputs.npy", found.numpy())


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    read_back(Path(sys.argv[1])) if sys.argv[1:] else write()
