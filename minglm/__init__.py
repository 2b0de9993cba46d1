"""GLM-4.5 you can read in an afternoon: forward and backward in NumPy.

The book is `minglm.model`; this is its public face.
"""

from minglm.api import Model, load, new
from minglm.config import PRESETS, Config
from minglm.model.kvcache import KVCache
from minglm.model.params import walk

__version__ = "0.1.0"
__all__ = ["PRESETS", "Config", "KVCache", "Model", "load", "new", "walk"]
