"""Makes llama_tiny.npz: what transformers computes for tiny random Llamas, for tests that have no torch.

    python -m venv peer
    peer/bin/pip install torch==2.13.0 && peer/bin/pip install transformers==5.23.0 safetensors
    peer/bin/python tests/golden/make_llama.py

Keys, for each case of CASES (float32, int64 ids; B=3 rows, S=12 left-padded tokens, T=8 new ones):
    CASE/config            config.json as bytes (uint8)
    CASE/weights/NAME      every tensor that save_pretrained would store
    CASE/input_ids         [B, S]; the padding id also occurs as a real token
    CASE/attention_mask    [B, S]
    CASE/logits            [B, S, V], zero where attention_mask is zero
    CASE/logprob           mean of log p(token t+1 | tokens up to t) over pairs of real tokens t, t+1
    CASE/grad/NAME         gradient of that mean with respect to a weight (of a tied embedding: both of its uses)
    CASE/generated         [B, T] greedy continuation, no stop token
    CASE/margin            smallest lead of a greedily chosen logit over the next best
and for the case "score", instead of the last five: CASE/scores [B], the score at the last token.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

SHAPE = {"vocab_size": 37, "hidden_size": 16, "intermediate_size": 28, "num_hidden_layers": 2, "pad_token_id": None}
SHAPE |= {"num_attention_heads": 4, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2}
CASES = {
    "gqa_tied": {"num_key_value_heads": 2, "head_dim": 6, "tie_word_embeddings": True, "rope_theta": 500.0},
    "bias_untied": {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-3},
    "mqa_wide": {"num_key_value_heads": 1, "head_dim": 8, "attention_bias": True, "hidden_act": "gelu_pytorch_tanh"},
    "score": {"num_key_value_heads": 2, "head_dim": 6, "num_labels": 1, "pad_token_id": 0},
}
PAD, LENGTHS, NEW_TOKENS = 0, (12, 5, 9), 8
GRADIENTS = tuple(
    f"model.{name}.weight" for name in ("embed_tokens", "layers.0.self_attn.q_proj", "layers.1.mlp.up_proj")
)


def make_model(name: str, generator: torch.Generator) -> torch.nn.Module:
    """A model with weights large enough for attention, norms and biases all to matter."""
    settings = SHAPE | CASES[name]
    theta = settings.pop("rope_theta", 10000.0)
    config = LlamaConfig(**settings, rope_parameters={"rope_type": "default", "rope_theta": theta}, dtype="float32")
    config._attn_implementation = "eager"
    model = (LlamaForSequenceClassification if name == "score" else LlamaForCausalLM)(config).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            scale = 0.3 if key.endswith("bias") or "norm" in key or "embed" in key else 1.5 / weight.shape[-1] ** 0.5
            weight.copy_(scale * noise + ("norm" in key))
    return model


def make_inputs(generator: torch.Generator, reuse_pad: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded ids [3, 12] and their mask."""
    length = max(LENGTHS)
    ids = torch.randint(1, SHAPE["vocab_size"], (len(LENGTHS), length), generator=generator)
    mask = torch.stack([(torch.arange(length) >= length - n).long() for n in LENGTHS])
    ids = torch.where(mask == 1, ids, PAD)
    if reuse_pad:
        ids[0, 3] = ids[2, 7] = PAD
    return ids, mask


def language_model_case(model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, np.ndarray]:
    """Logits, the mean log-probability with its gradients, and the greedy continuation."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    logprobs = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    pairs = mask[:, :-1] * mask[:, 1:]
    mean = (logprobs * pairs).sum() / pairs.sum()
    mean.backward()
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None,
        pad_token_id=PAD, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    best = torch.stack(out.logits).topk(2).values
    grads = {f"grad/{name}": dict(model.named_parameters())[name].grad.numpy() for name in GRADIENTS}
    return grads | {
        "logits": (logits * mask[..., None]).detach().numpy(),
        "logprob": mean.detach().numpy(),
        "generated": out.sequences[:, ids.shape[1] :].numpy(),
        "margin": (best[..., 0] - best[..., 1]).min().numpy(),
    }


def make_case(name: str, seed: int) -> dict[str, np.ndarray]:
    """All arrays of one case, keys without the case."""
    generator = torch.Generator().manual_seed(seed)
    model = make_model(name, generator)
    ids, mask = make_inputs(generator, reuse_pad=name != "score")  # transformers finds a row's end by its padding id
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    weights = {key: value.numpy() for key, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    arrays = {"config": np.frombuffer(json.dumps(config).encode(), np.uint8)}
    arrays |= {f"weights/{key}": value for key, value in weights.items()}
    arrays |= {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
    if name != "score":
        return arrays | language_model_case(model, ids, mask)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    scores = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    return arrays | {"scores": scores[:, 0].detach().numpy()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    golden = {f"{name}/{k}": v for i, name in enumerate(CASES) for k, v in make_case(name, seed=50 + i).items()}
    target = Path(__file__).with_name("llama_tiny.npz")
    np.savez_compressed(target, **golden)
    print(f"{target}: {target.stat().st_size} bytes", {n: float(golden[f"{n}/margin"]) for n in CASES if n != "score"})
