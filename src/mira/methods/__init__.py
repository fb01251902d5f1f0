"""Methods: the row that each client trains from, and how trained rows are combined. One file and one line here for each."""

from mira.core.registry import Registry
from mira.methods.cfl import CFL
from mira.methods.ditto import Ditto
from mira.methods.fedalt import FedALT
from mira.methods.fedamp import FedAMP
from mira.methods.fedavg_ft import FedAvgFT
from mira.methods.feddpa import FedDPA
from mira.methods.fedex_lora import FedExLoRA
from mira.methods.fedit import FedIT
from mira.methods.fedprox import FedProx
from mira.methods.fedsa_lora import FedSALoRA
from mira.methods.fedsvd import FedSVD
from mira.methods.fedtreelora import FedTreeLoRA
from mira.methods.ffa_lora import FFALoRA
from mira.methods.flexlora import FlexLoRA
from mira.methods.flora import FLoRA
from mira.methods.ifca import IFCA
from mira.methods.local import Local
from mira.methods.mira import Mira
from mira.methods.mr_mtl import MRMTL
from mira.methods.pfedgraph import PFedGraph
from mira.methods.pfedme import PFedMe
from mira.methods.rolora import RoLoRA
from mira.methods.scaffold import Scaffold
from mira.methods.server_optimizers import FedAdam, FedAvgM

METHODS = Registry(
    "method",
    "name",
    "mira.methods",
    ("init", "broadcast", "aggregate", "deployed"),
    "mira",
    {
        "mira": Mira,
        "local": Local,
        "fedit": FedIT,
        "fedavg-ft": FedAvgFT,
        "fedprox": FedProx,
        "scaffold": Scaffold,
        "ditto": Ditto,
        "mr-mtl": MRMTL,
        "pfedme": PFedMe,
        "pfedgraph": PFedGraph,
        "fedamp": FedAMP,
        "cfl": CFL,
        "fedtreelora": FedTreeLoRA,
        "ifca": IFCA,
        "ffa-lora": FFALoRA,
        "rolora": RoLoRA,
        "fedsvd": FedSVD,
        "fedsa-lora": FedSALoRA,
        "fedalt": FedALT,
        "feddpa": FedDPA,
        "flexlora": FlexLoRA,
        "fedex-lora": FedExLoRA,
        "flora": FLoRA,
        "fedavgm": FedAvgM,
        "fedadam": FedAdam,
    },
)
