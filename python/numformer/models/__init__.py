"""Models: one a file, readable alone."""
from numformer.models.gpt import GPT as GPT
from numformer.models.gpt import GPTConfig as GPTConfig
from numformer.models.pretrained import load as load
