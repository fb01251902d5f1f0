"""The one pydantic setting of every hyper-parameter class: unknown keys are errors, docstrings document the fields."""

from pydantic import ConfigDict

STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
