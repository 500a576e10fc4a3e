from .config import TTLoraConfig
from .layer import TTLoraLinear
from .model import TTLoraModel

__all__ = ["TTLoraConfig", "TTLoraLinear", "TTLoraModel"]
