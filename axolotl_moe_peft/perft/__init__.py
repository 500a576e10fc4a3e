from .calibration import calibrate_experts
from .config import PerftConfig
from .layer import PerftLayer
from .model import PerftModel

__all__ = ["PerftConfig", "PerftLayer", "PerftModel", "calibrate_experts"]
