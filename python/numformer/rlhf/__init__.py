"""Alignment: the losses as plain functions on (B, T) arrays, reward and value models, and PPO as a readable loop."""
from numformer.rlhf.advantages import AdaptiveKL as AdaptiveKL
from numformer.rlhf.advantages import gae as gae
from numformer.rlhf.advantages import grpo_advantages as grpo_advantages
from numformer.rlhf.advantages import kl_penalty as kl_penalty
from numformer.rlhf.losses import dpo_loss as dpo_loss
from numformer.rlhf.losses import ppo_policy_loss as ppo_policy_loss
from numformer.rlhf.losses import ppo_value_loss as ppo_value_loss
from numformer.rlhf.losses import reward_accuracy as reward_accuracy
from numformer.rlhf.losses import reward_model_loss as reward_model_loss
from numformer.rlhf.masked import explained_variance as explained_variance
from numformer.rlhf.masked import masked_mean as masked_mean
from numformer.rlhf.masked import masked_sum as masked_sum
from numformer.rlhf.masked import masked_whiten as masked_whiten
