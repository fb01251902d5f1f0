"""Choice of the run to resume."""

from __future__ import annotations

from pathlib import Path

from mira import config
from mira.core.errors import UserError
from mira.store import Store


def to_resume(
    target: Path, overrides: list[str], out: Path | None, data: Path | None, model: str | None
) -> tuple[Path, Path | None, str | None]:
    """The run folder, and the new places of its data and model. A configuration given with it must equal that of the run, apart
    from these two places. Raises UserError."""
    if target.is_dir():
        if overrides or out:
            raise UserError(
                f"--resume {target}: a run resumes with its own settings; drop --set and --out, or start a new run"
            )
        return target, data, model
    if not target.exists():
        raise UserError(f"--resume {target}: no such folder or file; name a run folder, made by 'mira run'")
    if out is None:
        raise UserError(f"--resume: name the run folder, as in 'mira run DIR --resume', or with --out beside {target}")
    asked = config.absolute(config.moved(config.load(target, overrides), data, model))
    with Store.open(out, writable=False) as store:
        started = config.recorded(store.config(), store.environment(), store.folder)
    there, here = (getattr(each.data, "path", None) for each in (started, asked))
    data = here if isinstance(there, Path) and isinstance(here, Path) else None
    differences = config.differences(
        config.moved(started, data, asked.model.name), config.dated(asked, started.prompt.date)
    )
    if differences:
        raise UserError(
            f"--resume {out}: the configuration changed: {'; '.join(differences)} (here: the run folder, there: the "
            "new one); resume it unchanged with 'mira run DIR --resume', or start a new run"
        )
    return out, data, asked.model.name
