"""The law that is trained and the one that is sampled from: whose log-probs are the old ones, and what corrects."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp

from rlhf_jax.config import OnlineConfig, SamplingConfig


def hidden_filter(sampling: SamplingConfig) -> str:
    """The setting with which tokens are drawn from a part of the vocabulary that a rollout does not carry; or ''."""
    if sampling.top_k:
        return ""
    return "top_p" if sampling.top_p < 1 else "min_new_tokens" if sampling.min_new_tokens else ""


@dataclass(frozen=True)
class TrainedLaw:
    """What a method's log-probs are of, and how it corrects for tokens of another law.

    Attributes:
        temperature: logits are divided by it.
        recompute: old log-probs come from a forward pass, and are not the sampler's.
        importance: off, token or sequence (`losses.importance_weights`).
        differs: how the sampler's law differs, in words; empty where it is the same to rounding in float32.
        hidden: `hidden_filter`.
    """

    temperature: float
    recompute: bool
    importance: str
    differs: str
    hidden: str

    @classmethod
    def of(cls, settings: OnlineConfig, sampling: SamplingConfig, dtype: jnp.dtype) -> TrainedLaw:
        """Of a config, for a policy that computes in `dtype`."""
        hidden, temperature = hidden_filter(sampling), settings.train_temperature or sampling.temperature
        reasons = [dtype.name] if dtype != jnp.float32 else []
        if temperature != sampling.temperature:
            reasons.append(f"temperature {sampling.temperature:g} instead of {temperature:g}")
        asked = settings.importance not in ("auto", "off")
        if sampling.cut:
            reasons.append("weights of earlier iterations")
        recompute = settings.old_logprobs == "recompute" or (
            settings.old_logprobs == "auto" and bool(reasons or hidden or asked)
        )
        importance = settings.importance
        if importance == "auto":
            importance = "sequence" if recompute and reasons and not hidden else "off"
        return cls(temperature, recompute, importance, " and ".join(reasons), hidden)

    def remarks(self, settings: OnlineConfig) -> list[str]:
        """Lines for who starts a run; none where all is of one law."""
        if self.hidden:
            return [
                f"sampling.{self.hidden} draws from a part of the vocabulary and log-probs are of all of it, so that "
                "gradients are biased, and no weight repairs that; set sampling.top_k, whose ids are carried along"
            ]
        if self.importance == "off":
            return []
        cap = settings.importance_cap
        what = "responses" if self.importance == "sequence" else "tokens"
        beyond = f", {'none' if settings.importance_beyond == 'mask' else f'{cap:g}'} above {cap:g}" if cap else ""
        return [f"{what} are weighted by the trained law over the sampler's ({self.differs or 'float32'}){beyond}"]
