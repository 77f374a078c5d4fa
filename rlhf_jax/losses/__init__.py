"""Every loss: arrays in, (scalar, metrics) out.

Log-probs are in nats. `weights` are zero off the response and sum to one over the optimiser batch (all microbatches,
all hosts), so that losses and metrics of microbatches add up. Keyword-only arguments are filled from the config
fields of the same name.
"""

from rlhf_jax.losses.group import cispo_policy_loss, reference_kl_loss, sequence_mean_policy_loss, sequence_policy_loss
from rlhf_jax.losses.importance import importance_weights
from rlhf_jax.losses.policy import clipped_policy_loss, clipped_value_loss, next_token_loss
from rlhf_jax.losses.preference import (
    apo_down_loss,
    apo_zero_loss,
    apo_zero_unpaired_loss,
    bco_loss,
    cpo_loss,
    discopop_loss,
    dpo_loss,
    exo_loss,
    hinge_loss,
    ipo_loss,
    kto_loss,
    length_normalised_dpo_loss,
    nca_loss,
    orpo_loss,
    robust_dpo_loss,
    rrhf_ranking_loss,
    simpo_loss,
    sppo_loss,
)
from rlhf_jax.losses.reward import (
    best_of_n_reward_loss,
    kwise_reward_loss,
    ordinal_rating_loss,
    pairwise_reward_loss,
    plackett_luce_reward_loss,
    squared_rating_loss,
)
