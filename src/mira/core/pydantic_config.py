"""Rules of all configuration classes: unknown keys are errors, docstrings document the fields, "~" is the home folder."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, ConfigDict, Field

from mira.core.errors import UserError

Count = Annotated[int, Field(strict=True, ge=1)]

STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


def expanded(path: Path) -> Path:
    """``path`` with the home folder in place of a leading "~". Raises UserError where there is no such home folder."""
    try:
        return path.expanduser()
    except RuntimeError:
        raise UserError(f"'{path}': there is no home folder of that name; write the path in full") from None


def is_folder(given: str) -> bool:
    """Tell whether ``given`` means a folder of this machine, where it may be a name on the model hub as well."""
    return given.startswith((".", "/", "~")) or Path(given).is_dir()


UserPath = Annotated[Path, AfterValidator(expanded)]
