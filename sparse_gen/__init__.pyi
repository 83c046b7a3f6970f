from . import analysis as analysis
from . import engine as engine
from . import experiments as experiments
from . import fitting as fitting
from . import generators as generators
from . import inverse as inverse
from . import masks as masks
from . import ops as ops
from .checkpoint import Checkpoints as Checkpoints
from .checkpoint import RunInterrupted as RunInterrupted
from .engine import compile as compile
from .engine import stack as stack
from .fitting import FitResult as FitResult
from .fitting import fit as fit
from .fitting import stop as stop
from .generators import noise_input as noise_input
from .masks import DisconnectedMaskWarning as DisconnectedMaskWarning
from .masks import Mask as Mask
from .masks import SearchResult as SearchResult
from .masks import masked_output as masked_output
from .masks import search_mask as search_mask

__version__: str
