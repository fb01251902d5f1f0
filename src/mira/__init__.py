"""MIRA: federated multi-task LoRA fine-tuning of large language models.

Every client trains an adapter for its own task; the server pulls related clients' adapters together along a graph
(Elbakary et al., IEEE Networking Letters 2025), or combines them by one of eleven other methods.

Run::

    run = mira.run("experiment.yaml")          # or an Experiment, or a mapping of its sections
    run = mira.run({...}, model=(model, tokenizer), data={"a": examples, ...}, method=HalfWay(), callbacks=[...])
    run.metrics("validation_loss")             # a DataFrame: round × client
    run.adapter("a")                           # a PeftModel

    run         run an experiment in a new folder; returns a Run
    resume      go on with a run from its last committed round
    open_run    a run folder as a Run: .metrics(), .result, .adapter(), .evaluate(), .generate(), .export(), .report()
    compare     methods × grid × seeds over one experiment
    Experiment  everything that can be chosen, typed; Experiment.from_yaml(path) reads a file
    Client, Example        data given as objects
    Callback, EarlyStopping    functions called while a run goes, which may stop it
    UserError   the one error for what the user can mend: one line with the key, the value and the fix

Extend::

    register    offer a method, graph, data source or kind of adapter by its name
    Method      four pure functions: init, broadcast, aggregate, deployed
    Setting, ServerState, Work, Trained, Change    the nouns that these functions take and give
    mira.testing    the contract tests of methods, graphs, sources and adapters, for a plug-in's own tests
"""

from __future__ import annotations

import logging
import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mira.library import Callback as Callback
    from mira.library import Change as Change
    from mira.library import Client as Client
    from mira.library import EarlyStopping as EarlyStopping
    from mira.library import Example as Example
    from mira.library import Experiment as Experiment
    from mira.library import Method as Method
    from mira.library import Run as Run
    from mira.library import ServerState as ServerState
    from mira.library import Setting as Setting
    from mira.library import Trained as Trained
    from mira.library import UserError as UserError
    from mira.library import Work as Work
    from mira.library import compare as compare
    from mira.library import open_run as open_run
    from mira.library import register as register
    from mira.library import resume as resume
    from mira.library import run as run

_HOME = {
    "mira.config": ("Experiment",),
    "mira.core.errors": ("UserError",),
    "mira.core.types": ("Change", "Method", "ServerState", "Setting", "Trained", "Work"),
    "mira.data.types": ("Client", "Example"),
    "mira.library": ("compare", "open_run", "register", "resume", "run"),
    "mira.results.run_folder": ("Run",),
    "mira.runner.callbacks": ("Callback", "EarlyStopping"),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__all__ = [  # noqa: RUF022  in the order of the reference
    "run", "resume", "open_run", "compare", "register", "Run", "Experiment", "Client", "Example", "Callback", "EarlyStopping",
    "UserError", "Method", "Setting", "ServerState", "Work", "Trained", "Change", "__version__",
]  # fmt: skip


# Noise of libraries at every start: kernels that bitsandbytes does not find, an old name that PEFT asks transformers for.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


def __getattr__(name: str) -> Any:
    """A public name, imported when it is first used: ``mira --help`` does not wait for the deep-learning libraries."""
    if name == "__version__":
        return import_module("mira.core.versions").version_of("mira")
    if name not in _MODULE:
        raise AttributeError(f"module 'mira' has no attribute '{name}'")
    return getattr(import_module(_MODULE[name]), name)


def __dir__() -> list[str]:
    return [*__all__, *globals()]
