"""Sparse image generators: networks that restore one image by being fitted to it, pruned at initialisation.

Everything is imported when it is first used, so that `import sparse_gen` costs nothing; `__init__.pyi` lists it.
"""

import lazy_loader

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
