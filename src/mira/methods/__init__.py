"""Methods: which row goes to whom, and how rows come together. One file and one line here for each."""

from mira.methods.fedit import FedIT
from mira.methods.local import Local
from mira.methods.mira import Mira

METHODS = {"mira": Mira, "local": Local, "fedit": FedIT}
