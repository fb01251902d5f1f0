"""Choice of the run to resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mira import config
from mira.core.errors import UserError
from mira.store import Store


def to_resume(
    target: Path, overrides: list[str], out: Path | None, data: Path | None, model: str | None
) -> tuple[Path, Path | None, str | None, dict[str, Any]]:
    """The run folder, the new places of its data and model, and the devices or workers that are given. A configuration given with
    it must equal that of the run, apart from these. Raises UserError."""
    if target.is_dir():
        if out:
            raise UserError(f"--resume {target}: is the run folder; drop --out, or start a new run")
        return target, data, model, config.placement_in(overrides)
    if not target.exists():
        raise UserError(f"--resume {target}: no such folder or file; name a run folder, made by 'mira run'")
    if out is None:
        raise UserError(f"--resume: name the run folder, as in 'mira run DIR --resume', or with --out beside {target}")
    asked = config.resolved(config.moved(config.load(target, overrides), data, model))
    with Store.open(out, writable=False) as store:
        started = config.recorded(store.config(), store.environment(), store.folder)
    there, here = (getattr(each.data, "path", None) for each in (started, asked))
    data = here if isinstance(there, Path) and isinstance(here, Path) else None
    given = config.placement_of(asked)
    differences = config.differences(
        config.placed(config.moved(started, data, asked.model.name), given), config.dated(asked, started.prompt.date)
    )
    if differences:
        raise UserError(
            f"--resume {out}: the configuration changed: {'; '.join(differences)} (here: the run folder, there: the "
            "new one); resume it unchanged with 'mira run DIR --resume', or start a new run"
        )
    return out, data, asked.model.name, given
