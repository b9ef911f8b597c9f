"""What does Django have to know of this package? Its name, and its checks."""

from __future__ import annotations

from django.apps import AppConfig
from django.core import checks

from .checks import check_settings


class MeshConfig(AppConfig):
    name = "meshlib_django"
    label = "meshlib"
    verbose_name = "Mesh"

    def ready(self) -> None:
        checks.register(check_settings, checks.Tags.security)
