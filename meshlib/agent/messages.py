"""What do the messages of the SPIFFE Workload API look like?

As the standard writes them, and nothing besides. They are described here and not generated, and live in a pool of descriptors of their
own: the package `spiffe` registers the same names in protobuf's common one, and both may be in one process.
"""

from __future__ import annotations

from typing import Any, Final

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, struct_pb2

# Not everything of protobuf is typed, whichever way it is installed.
_shapes: Final[Any] = descriptor_pb2
_pools: Final[Any] = descriptor_pool
_classes: Final[Any] = message_factory
_Field: Final = _shapes.FieldDescriptorProto
_TYPES: Final = {"text": _Field.TYPE_STRING, "bytes": _Field.TYPE_BYTES}
_STRUCT: Final = ".google.protobuf.Struct"

# Message: field: number and type; `[…]` is repeated, `{…}` a map from texts. A capital is a message.
_MESSAGES: Final[dict[str, dict[str, tuple[int, str]]]] = {
    "X509SVIDRequest": {},
    "X509SVID": {
        "spiffe_id": (1, "text"),
        "x509_svid": (2, "bytes"),
        "x509_svid_key": (3, "bytes"),
        "bundle": (4, "bytes"),
        "hint": (5, "text"),
    },
    "X509SVIDResponse": {"svids": (1, "[X509SVID]"), "crl": (2, "[bytes]"), "federated_bundles": (3, "{bytes}")},
    "X509BundlesRequest": {},
    "X509BundlesResponse": {"crl": (1, "[bytes]"), "bundles": (2, "{bytes}")},
    "JWTSVIDRequest": {"audience": (1, "[text]"), "spiffe_id": (2, "text")},
    "JWTSVID": {"spiffe_id": (1, "text"), "svid": (2, "text"), "hint": (3, "text")},
    "JWTSVIDResponse": {"svids": (1, "[JWTSVID]")},
    "JWTBundlesRequest": {},
    "JWTBundlesResponse": {"bundles": (1, "{bytes}")},
    "ValidateJWTSVIDRequest": {"audience": (1, "text"), "svid": (2, "text")},
    "ValidateJWTSVIDResponse": {"spiffe_id": (1, "text"), "claims": (2, _STRUCT)},
}


def _made() -> dict[str, Any]:
    pool = _pools.DescriptorPool()
    pool.AddSerializedFile(struct_pb2.DESCRIPTOR.serialized_pb)
    file = _shapes.FileDescriptorProto(name="workload.proto", syntax="proto3", dependency=[struct_pb2.DESCRIPTOR.name])
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, (number, kind) in fields.items():
            _add(message, field, number, kind)
    pool.AddSerializedFile(file.SerializeToString())
    return {name: _classes.GetMessageClass(pool.FindMessageTypeByName(name)) for name in _MESSAGES}


def _add(message: Any, name: str, number: int, kind: str) -> None:
    field = message.field.add(name=name, number=number, label=_Field.LABEL_OPTIONAL)
    if kind[0] in "[{":
        field.label = _Field.LABEL_REPEATED
    inner = kind.strip("[]{}")
    if kind[0] == "{":
        # A map is a repeated message of a key and a value, of which the compiler makes up the name.
        entry = message.nested_type.add(name="".join(part.capitalize() for part in name.split("_")) + "Entry")
        entry.options.map_entry = True
        _add(entry, "key", 1, "text")
        _add(entry, "value", 2, inner)
        inner = f".{message.name}.{entry.name}"
    if inner in _TYPES:
        field.type = _TYPES[inner]
    else:
        field.type = _Field.TYPE_MESSAGE
        field.type_name = inner if inner.startswith(".") else f".{inner}"


_CLASSES: Final = _made()

X509SVIDRequest: Final[Any] = _CLASSES["X509SVIDRequest"]
X509SVID: Final[Any] = _CLASSES["X509SVID"]
X509SVIDResponse: Final[Any] = _CLASSES["X509SVIDResponse"]
X509BundlesRequest: Final[Any] = _CLASSES["X509BundlesRequest"]
X509BundlesResponse: Final[Any] = _CLASSES["X509BundlesResponse"]
JWTSVIDRequest: Final[Any] = _CLASSES["JWTSVIDRequest"]
JWTSVID: Final[Any] = _CLASSES["JWTSVID"]
JWTSVIDResponse: Final[Any] = _CLASSES["JWTSVIDResponse"]
JWTBundlesRequest: Final[Any] = _CLASSES["JWTBundlesRequest"]
JWTBundlesResponse: Final[Any] = _CLASSES["JWTBundlesResponse"]
ValidateJWTSVIDRequest: Final[Any] = _CLASSES["ValidateJWTSVIDRequest"]
ValidateJWTSVIDResponse: Final[Any] = _CLASSES["ValidateJWTSVIDResponse"]
