"""In: parameter groups, the ``optimizer`` and ``method`` sections, flat layouts of the slices.
Out: torch optimizers whose update rules work on whole tensors; learning-rate schedules.
Must not know: the engine, ZeRO stages, the training loop.
"""

from megalr.optim.galore import Apollo, ApolloMini, Fira, GaLore, GoLore
from megalr.optim.loro import LORO
from megalr.optim.muon import Muon, NorMuon
from megalr.optim.scale import SCALE
from megalr.optim.spam import SPAM
from megalr.optim.spectron import Spectron
from megalr.optim.stable_spam import StableSPAM

__all__ = [
    "LORO",
    "SCALE",
    "SPAM",
    "Apollo",
    "ApolloMini",
    "Fira",
    "GaLore",
    "GoLore",
    "Muon",
    "NorMuon",
    "Spectron",
    "StableSPAM",
]
