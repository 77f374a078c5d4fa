"""Everything of Hugging Face's formats; `hf.load_params`, `hf.save_model` and `hf.read_config` are the door."""

from rlhf_jax.models.hf.config_json import find_family
from rlhf_jax.models.hf.directory import layers_of, model_directory
from rlhf_jax.models.hf.heads import has_score_head, members_of, own_adapters
from rlhf_jax.models.hf.stored import read_config, read_generation
from rlhf_jax.models.hf.table import FAMILIES
from rlhf_jax.models.hf.weights import check_params, load_params, save_model
