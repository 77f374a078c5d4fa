"""Everything of Hugging Face's formats; `hf.load_params`, `hf.save_model` and `hf.read_config` are the door."""

from rlhf_jax.models.hf.config_json import find_family, model_directory, read_config, read_generation
from rlhf_jax.models.hf.families import FAMILIES
from rlhf_jax.models.hf.weights import has_score_head, load_params, save_model
