"""Optimizers: update rules on logical tensors, on plain parameters and in ZeRO's flat slices."""

from megalr.optim.apollo import Apollo, ApolloMini
from megalr.optim.galore import Fira, GaLore
from megalr.optim.golore import GoLore
from megalr.optim.loro import LORO
from megalr.optim.muon import Muon
from megalr.optim.spam import SPAM
from megalr.optim.stable_spam import StableSPAM

__all__ = [
    "LORO",
    "SPAM",
    "Apollo",
    "ApolloMini",
    "Fira",
    "GaLore",
    "GoLore",
    "Muon",
    "StableSPAM",
]
