"""What does an editor need to know to help with mesh.yaml?

The JSON Schema (draft 2020-12) of the file, from the same models that check it, with defaults, ranges and reasons.
What only shows between two values (labels that nobody carries, an unknown service) is not in it: `meshlib vet` finds
that.
"""

from __future__ import annotations

from typing import Any

from .document import Document


def json_schema() -> dict[str, Any]:
    """The JSON Schema of mesh.yaml."""
    schema = Document.model_json_schema(by_alias=True, mode="validation")
    schema.pop("description", None)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "mesh.yaml",
        "description": "The configuration of meshlib: one file for a whole system.",
        **{key: value for key, value in schema.items() if key != "title"},
    }
