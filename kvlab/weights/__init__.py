"""Published checkpoints: Hugging Face safetensors folders, read shard by shard and written back. Never pickle, never
code."""

from kvlab.weights.checkpoint import Pretrained, load_checkpoint, save_checkpoint
from kvlab.weights.files import WeightsError

__all__ = ["Pretrained", "WeightsError", "load_checkpoint", "save_checkpoint"]
