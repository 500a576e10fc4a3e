from .config import TTLoraMoeConfig
from .layer import TTLoraPoolLinear
from .model import TTLoraMoeModel
from .router import PromptRouter

__all__ = ["PromptRouter", "TTLoraMoeConfig", "TTLoraMoeModel", "TTLoraPoolLinear"]
