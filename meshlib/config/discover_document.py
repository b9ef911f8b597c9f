"""What may a user write about where services are?

The types of a service's `discover` and `register`, and of `registries`; the rest of the file is in `document.py`, where it
is said how these classes are meant. What a registry's package understands beside these keys, it gets as it is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field

from .defaults import setting
from .section import Closed, Section
from .secure_values import PluginName, Record
from .values import DnsAddress, EndpointAddress, Label, ListenAddress, Name, Seconds, SpiffeId, SrvName


def _from_address(value: Any) -> Any:
    return {"address": value} if isinstance(value, str) else value


class EndpointSettings(Section):
    """One endpoint with what is special about it."""

    address: EndpointAddress = Field(description="host:port, or unix:/path of a socket")
    labels: dict[str, Label] = Field(default_factory=dict, description="What backends select by, such as {version: v2}.")
    zone: str = setting("discover.zone")
    weight: float = setting("discover.weight")
    identity: SpiffeId | None = Field(default=None, description="Another SPIFFE ID than the service's.")


Endpoint = Annotated[EndpointSettings, BeforeValidator(_from_address, json_schema_input_type=EndpointSettings | str)]


def _from_registry(value: Any) -> Any:
    return {"registry": value} if isinstance(value, str) else value


class Discover(Closed):
    """Where the endpoints of a service are: exactly one of `static`, `file`, `dns`, `srv`, `registry`."""

    model_config = ConfigDict(extra="allow")

    static: tuple[Endpoint, ...] | None = Field(default=None, min_length=1, description="The endpoints, written here.")
    file: str | None = Field(default=None, min_length=1, description="A YAML list of endpoints, watched; relative to this file.")
    dns: DnsAddress | None = Field(default=None, description="A name and port; all its addresses are endpoints.")
    srv: SrvName | None = Field(default=None, description="A name of SRV records, which tell host, port and weight.")
    registry: Name | None = Field(default=None, description="One of `registries`; it gets all keys beside this one.")
    every: Seconds = setting("discover.every")

    @property
    def settings(self) -> Mapping[str, Any]:
        """What is for the registry's package."""
        return MappingProxyType(dict(self.model_extra or {}))


DiscoverOrWord = Annotated[Discover, BeforeValidator(_from_registry, json_schema_input_type=Discover | str)]


class Register(Closed):
    """How the processes of a service enter themselves in a registry, which gets all keys beside these."""

    model_config = ConfigDict(extra="allow")

    registry: Name = Field(description="One of `registries`.")
    address: ListenAddress | None = Field(
        default=None, description="Where others reach it. Default: `listen`, on this host's address."
    )


RegisterOrWord = Annotated[Register, BeforeValidator(_from_registry, json_schema_input_type=Register | str)]


class Registry(Closed):
    """A system that knows where services are. Other keys than these are passed on to its package as they are."""

    model_config = ConfigDict(extra="allow")

    plugin: PluginName | None = Field(default=None, description="The package's word for it. Default: the name of this entry.")
    cache: Record = setting("registries.cache")
