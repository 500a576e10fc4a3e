from .config import PTMoeConfig
from .layer import PTMoeLayer
from .model import PTMoeModel

__all__ = ["PTMoeConfig", "PTMoeLayer", "PTMoeModel"]
