"""The numbers of a PPO run, and the sets of them that papers and libraries use."""
import dataclasses
from dataclasses import dataclass

from numformer.ops.arguments import as_integer, as_number

__all__ = ["PPOConfig"]


@dataclass
class PPOConfig:
    """What :class:`PPO` is told. Change single numbers of a preset by keyword: ``PPOConfig.trl(batch=32)``.

    The presets give the numbers that their source states for the algorithm; where it states none, the defaults below
    stay. Batches and lengths are the source's only where named there: set them to what the machine holds.

    Attributes
    ----------
    batch, minibatch : int
        Prompts of a rollout, and of an update; batch is a multiple of minibatch.
    epochs : int
        How often a rollout is gone through.
    max_new_tokens : int
    temperature : float > 0
        Of sampling, and of all log-probabilities.
    eos_id : int, optional
        The token that ends a completion.
    lr, value_lr : float
        Of the policy and of the value model (lr where None).
    warmup : int
        Iterations in which the rates rise linearly from a tenth to their peak.
    schedule : {"constant", "linear"}
        "linear" falls to 0 over `episodes`.
    episodes : int, optional
        Completions in the whole run.
    betas, eps, weight_decay : of AdamW
    adam : {"torch", "tensorflow"}
        Whether eps is added to the bias-corrected square root, or, TensorFlow's way, to the plain one.
    max_norm : float, optional
        Gradients of each model are scaled down to this global norm.
    gamma, lam : float
        Of :func:`gae`.
    clip, dual_clip, value_clip : float
        Of :func:`ppo_policy_loss` and :func:`ppo_value_loss`; the last two may be None.
    value_coef, entropy_coef : float
        Weights of the value loss and of an entropy bonus.
    kl_init, kl_target, kl_horizon : of :class:`AdaptiveKL`
        kl_target None: a fixed coefficient.
    kl_form : {"k1", "k2", "k3"}
        Of the penalty in the rewards.
    kl_measure : {"sequence", "token"}
        Whether kl_target is of the sum over a completion, as OpenAI's, or of the mean over its tokens, as verl's.
    whiten_rewards, whiten_advantages : bool
        Rewards keep their mean.
    missing_eos_penalty : float, optional
        For a completion that does not end by itself.
    missing_eos : {"subtract", "replace"}
        The penalty is subtracted from the score (TRL), or the score becomes minus the penalty (Huang et al. 2024).
    load_balancing : float
        Weight of the experts' load-balancing loss over the rollouts' tokens.
    ptx_coef : float
        Weight of the pretraining loss (InstructGPT's PPO-ptx).
    ema_decay : float, optional
        Keep a running mean of the policy's weights, renewed after each iteration.
    """

    batch: int = 64
    minibatch: int = 16
    epochs: int = 4
    max_new_tokens: int = 48
    temperature: float = 1.0
    eos_id: int | None = None
    lr: float = 1e-5
    value_lr: float | None = None
    warmup: int = 0
    schedule: str = "constant"
    episodes: int | None = None
    betas: tuple = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    adam: str = "torch"
    max_norm: float | None = 1.0
    gamma: float = 1.0
    lam: float = 0.95
    clip: float = 0.2
    dual_clip: float | None = None
    value_clip: float | None = 0.2
    value_coef: float = 1.0
    entropy_coef: float = 0.0
    kl_init: float = 0.05
    kl_target: float | None = None
    kl_horizon: float = 10000
    kl_form: str = "k1"
    kl_measure: str = "sequence"
    whiten_rewards: bool = False
    whiten_advantages: bool = True
    missing_eos_penalty: float | None = None
    missing_eos: str = "subtract"
    load_balancing: float = 0.0
    ptx_coef: float = 0.0
    ema_decay: float | None = None

    def __post_init__(self):
        choices = {"schedule": ("constant", "linear"), "adam": ("torch", "tensorflow"), "kl_form": ("k1", "k2", "k3"),
                   "kl_measure": ("sequence", "token"), "missing_eos": ("subtract", "replace")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"PPOConfig: {name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        self._check_numbers()
        if self.batch % self.minibatch:
            raise ValueError(f"PPOConfig: batch must be a multiple of minibatch, got {self.batch} and {self.minibatch}")
        if not self.temperature > 0:
            raise ValueError("PPOConfig: temperature must be above 0 (a greedy policy does not explore), "
                             f"got {self.temperature}")
        if self.schedule == "linear" and self.episodes is None:
            raise ValueError("PPOConfig: the linear schedule needs episodes, after which the rate is 0")
        if self.missing_eos_penalty is not None and self.eos_id is None:
            raise ValueError("PPOConfig: missing_eos_penalty needs eos_id")
        if self.kl_target is not None and not self.batch < 5 * self.kl_horizon:
            raise ValueError("PPOConfig: batch must be below 5 kl_horizon, or the KL's coefficient could fall below 0, "
                             f"got {self.batch} and {self.kl_horizon}")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"PPOConfig: ema_decay must be in [0, 1), got {self.ema_decay}")

    def _check_numbers(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None and field.type in (int | None, float | None):
                continue
            if field.type in (int, int | None):
                as_integer(value, "PPOConfig", field.name)
            elif field.type in (float, float | None):
                as_number(value, "PPOConfig", field.name)
        for says, fits, names in (
                ("1 or more", lambda x: x >= 1, ("batch", "minibatch", "epochs", "max_new_tokens", "episodes")),
                ("0 or more", lambda x: x >= 0, ("lr", "value_lr", "warmup", "max_norm", "kl_init")),
                ("above 0", lambda x: x > 0, ("clip", "value_clip", "kl_target", "kl_horizon")),
                ("above 1", lambda x: x > 1, ("dual_clip",)),
                ("within 0 .. 1", lambda x: 0 <= x <= 1, ("gamma", "lam"))):
            for name in names:
                value = getattr(self, name)
                if value is not None and not fits(value):
                    raise ValueError(f"PPOConfig: {name} must be {says}, got {value}")

    def learning_rate(self, iteration, peak=None):
        """The rate of an iteration, counted from 0."""
        rate = self.lr if peak is None else peak
        if iteration < self.warmup:
            return rate * (0.1 + 0.9 * iteration / self.warmup)
        if self.schedule == "linear":
            return rate * max(0.0, 1 - iteration * self.batch / self.episodes)
        return rate

    @classmethod
    def openai2019(cls, **changes):
        """Fine-tuning language models from human preferences (Ziegler et al. 2019) and its lm-human-preferences."""
        return cls(**{"batch": 512, "minibatch": 512, "epochs": 4, "temperature": 0.7, "lr": 1e-5, "schedule": "linear",
                      "episodes": 1_000_000, "eps": 1e-5, "adam": "tensorflow", "max_norm": None, "gamma": 1.0,
                      "lam": 0.95, "clip": 0.2, "value_clip": 0.2, "value_coef": 0.1, "kl_init": 0.15, "kl_target": 6.0,
                      "kl_horizon": 10000, "whiten_rewards": True, **changes})

    @classmethod
    def instructgpt(cls, **changes):
        """Training language models to follow instructions (Ouyang et al. 2022); ptx_coef 0 leaves pretraining out."""
        return cls(**{"batch": 512, "minibatch": 64, "epochs": 1, "episodes": 256_000, "warmup": 10, "clip": 0.2,
                      "value_clip": 0.2, "kl_init": 0.02, "ptx_coef": 27.8, "ema_decay": 0.992, **changes})

    @classmethod
    def trl(cls, **changes):
        """The defaults of TRL's PPOTrainer, for the numbers that make the algorithm."""
        return cls(**{"epochs": 4, "temperature": 0.7, "lr": 3e-6, "gamma": 1.0, "lam": 0.95, "clip": 0.2,
                      "value_clip": 0.2, "value_coef": 0.1, "kl_init": 0.05, **changes})

    @classmethod
    def verl(cls, **changes):
        """The defaults of verl's PPO trainer, its KL controller adaptive."""
        return cls(**{"epochs": 1, "lr": 1e-6, "value_lr": 1e-5, "weight_decay": 0.01, "gamma": 1.0, "lam": 1.0,
                      "clip": 0.2, "value_clip": 0.5, "dual_clip": 3.0, "kl_init": 0.001, "kl_target": 0.1,
                      "kl_horizon": 10000, "kl_measure": "token", **changes})
